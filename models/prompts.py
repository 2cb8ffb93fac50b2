r"""Prompts with weights, written as users of the well-known web interfaces write them.

(words)       1.1 times the attention; nested ((words)) 1.21 times
(words:1.3)   1.3 times
[words]       1 / 1.1 times
\( \) \[ \]   plain brackets; \: a plain colon
a cat AND a dog :0.7   two prompts for one image, the second with weight 0.7 (`models.diffusion.guidance.Joined`)

What is read here has meaning for sampling alone; the captions of a data set are plain text.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from conf.errors import UserError
from models.text import END, TextTower, common

STEP = 1.1  # factor of a pair of brackets without a number
TOKENS = re.compile(r"\\[()\[\]:\\]|[()\[\]]|:[^()\[\]:\\]*(?=\))|[^()\[\]:\\]+|.", re.DOTALL)
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"(.*?)\s*(?::\s*([-+]?\d*\.?\d+)\s*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One text in pieces of equal weight, and its own weight among those joined by AND."""

    pieces: tuple[tuple[str, float], ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Without the marks of the syntax."""
        return "".join(piece for piece, _ in self.pieces)


def plain(text: str) -> list[ParsedPrompt]:
    """A text in which brackets mean nothing."""
    return [ParsedPrompt(((text, 1.0),))]


def parse(text: str) -> list[ParsedPrompt]:
    """The prompts that a text joins by AND, at least one.

    Raises:
        UserError: brackets that do not match, or a weight that is no number.
    """
    parts = AND.split(text)
    if len(parts) == 1:
        return [ParsedPrompt(parse_pieces(text))]
    prompts = []
    for part in parts:
        found = WEIGHT.fullmatch(part.strip())
        assert found is not None  # it matches everything
        prompts.append(ParsedPrompt(parse_pieces(found[1]), float(found[2] or 1)))
    return prompts


def parse_pieces(text: str) -> tuple[tuple[str, float], ...]:
    """Pieces of a prompt without AND, neighbours of the same weight joined."""
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # brackets, each with the number of pieces before it
    number: str | None = None  # between the colon and the bracket that follows it
    for match in TOKENS.finditer(text):
        token = match[0]
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif token in (")", "]"):
            if not opened or opened[-1][0] != {")": "(", "]": "["}[token]:
                raise UserError(rf"prompt '{text}': '{token}' closes nothing; write \{token} for a plain bracket")
            _, start = opened.pop()
            factor = weight_of(text, number) if number is not None else STEP if token == ")" else 1 / STEP
            pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]
            number = None
        elif token[0] == ":" and text[match.end() :][:1] == ")" and opened and opened[-1][0] == "(":
            number = token[1:]
        else:
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    if opened:
        bracket = opened[-1][0]
        raise UserError(rf"prompt '{text}': '{bracket}' is never closed; write \{bracket} for a plain bracket")
    return join_pieces(pieces)


def weight_of(prompt: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(rf"prompt '{prompt}': ':{number})' has no weight; write (words:1.3), or \: for a plain colon")
    return weight


def join_pieces(pieces: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + text, weight
        else:
            merged.append((text, weight))
    return tuple(merged) or (("", 1.0),)


def text_states(tower: TextTower, prompts: list[ParsedPrompt], device: torch.device) -> Tensor:
    """States [R, L, D] of the prompts' texts, each token's times the weight of its piece.

    As the web interface that made the syntax known, all states of a prompt are then scaled by one factor, so that
    their mean over tokens and channels is what it was without weights.
    """
    states = tower.text_states(tower.tokenize([prompt.text for prompt in prompts]).to(device))  # [R, L, D]
    rows = []
    for state, prompt in zip(states, prompts, strict=True):
        if any(weight != 1 for _, weight in prompt.pieces):
            weighted = state * token_weights(tower, prompt).to(state).unsqueeze(-1)
            state = weighted * (state.mean() / weighted.mean())
        rows.append(state)
    return torch.stack(rows)


def token_weights(tower: TextTower, prompt: ParsedPrompt) -> Tensor:
    """Weights [L] of the tokens: that of the piece that they come from, 1 for start, end and padding.

    A piece ends where its text, cut off there, is no longer tokenised as the whole. A token across that place belongs
    to the next piece.
    """
    texts = ["", *("".join(text for text, _ in prompt.pieces[: i + 1]) for i in range(len(prompt.pieces)))]
    *begun, whole, longer = tower.tokenize([*texts, prompt.text + END])
    ends = [common(tokens, whole) for tokens in (*begun, longer)]
    weights = torch.ones(len(whole))
    for (start, end), (_, weight) in zip(pairwise(ends), prompt.pieces, strict=True):
        weights[start : min(end, len(whole) - 1)] = weight  # the last one is an end token, also of a text cut off
    return weights
