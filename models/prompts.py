r"""Prompts with weights, written as users of the well-known web interfaces write them.

(words)       1.1 times their effect; nested ((words)) 1.21 times
(words:1.3)   1.3 times; (words:0) as if they were not there
(words:1.3@0.5)   in the first half of the steps, (words:1.3@0.2-0.5) from a fifth of them to the half
[words]       1 / 1.1 times
\( \) \[ \]   plain brackets; \: a plain colon
a cat AND a dog :0.7   two prompts for one image, the second with weight 0.7 (`models.diffusion.guidance.Joined`)

A word's weight multiplies the difference that the word makes, wherever the text encoder has put its meaning:

    prediction = P(prompt) + (w - 1) (P(prompt) - P(prompt without the words))

At weight 0 that is the prompt without the words, whose text is left out from the start; below 0 it leads away from
them. Guidance multiplies all of this by its scale, but for what a word weighs above 1: that is added once, or a weight
of 2 at scale 7.5 would be one of 8.5 without guidance, and the rest of the image would give way to it. Words with one
weight are left out together: a prompt costs one prediction for each of its weights. It is the composition of Liu et al.
2022 ("Compositional visual generation with composable diffusion models"), with weights whose sum is 1, which need no
prediction without a prompt.

What is read here has meaning for sampling alone; the captions of a data set are plain text.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Weighting
from conf.schema.editing import window_of
from models.text import END, WORD, TextTower, common

STEP = 1.1  # factor of a pair of brackets without a number
TOKENS = re.compile(r"\\[()\[\]:\\]|[()\[\]]|:[^()\[\]:\\]*(?=\))|[^()\[\]:\\]+|.", re.DOTALL)
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"(.*?)\s*(?::\s*([-+]?\d*\.?\d+)\s*)?", re.DOTALL)
Window = tuple[float, float] | None  # shares of the steps between which a weight holds; None: as suits it
ARTICLES = {"a", "an", "the"}
PREPOSITIONS = {
    *("with", "without", "in", "inside", "into", "on", "onto", "under", "over", "above", "below"),
    *("at", "by", "of", "from", "behind", "beside", "near"),
}
JOINTS = {"and", "or", ",", ";"}
CLOSING = {*PREPOSITIONS, *JOINTS, ".", "!", "?", ":"}  # what stands after the last word of a phrase
ALL_STEPS, FIRST_HALF = (0.0, 1.0), (0.0, 0.5)


class WeightedText(NamedTuple):
    """Words with one weight."""

    text: str
    weight: float = 1.0
    window: Window = None

    @property
    def masked(self) -> bool:
        """Whether the words are as if they were not there, in all steps."""
        return self.weight == 0 and self.window in (None, ALL_STEPS)

    @property
    def kind(self) -> tuple[float, tuple[float, float]]:
        """The weight and the steps in which it holds.

        More than is written holds in the first half by itself: to the end it would wash out what that half has made.
        """
        return self.weight, self.window or (FIRST_HALF if self.weight > 1 else ALL_STEPS)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One text in pieces of equal weight, and its own weight among those joined by AND."""

    pieces: tuple[WeightedText, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Without the marks of the syntax."""
        return "".join(piece.text for piece in self.pieces)


def plain(text: str) -> list[ParsedPrompt]:
    """A text in which brackets mean nothing."""
    return [ParsedPrompt((WeightedText(text),))]


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


def parse_pieces(text: str) -> tuple[WeightedText, ...]:
    """Pieces of a prompt without AND, neighbours of the same weight joined."""
    pieces: list[WeightedText] = []
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
            factor, window = (STEP if token == ")" else 1 / STEP, None) if number is None else weight_of(text, number)
            pieces[start:] = [
                WeightedText(piece, weight * factor, own or window) for piece, weight, own in pieces[start:]
            ]
            number = None
        elif token[0] == ":" and text[match.end() :][:1] == ")" and opened and opened[-1][0] == "(":
            number = token[1:]
        else:
            pieces.append(WeightedText(token[1:] if len(token) == 2 and token[0] == "\\" else token))
    if opened:
        bracket = opened[-1][0]
        raise UserError(rf"prompt '{text}': '{bracket}' is never closed; write \{bracket} for a plain bracket")
    return join_pieces(pieces)


def weight_of(prompt: str, number: str) -> tuple[float, Window]:
    """A weight, and the steps in which it holds where they are named, written `1.3`, `1.3@0.5` or `1.3@0.2-0.5`."""
    written, at, steps = number.partition("@")
    try:
        weight, window = float(written), window_of(steps) if at else None
    except ValueError:
        weight, window = math.nan, None
    if not math.isfinite(weight):
        raise UserError(
            rf"prompt '{prompt}': ':{number})' has no weight; write (words:1.3), (words:1.3@0.2-0.5) for some of the "
            rf"steps, or \: for a plain colon"
        )
    return weight, window


def join_pieces(pieces: list[WeightedText]) -> tuple[WeightedText, ...]:
    """Neighbours of the same weight as one; none is empty, unless there is no other."""
    merged: list[WeightedText] = []
    for piece in pieces:
        if not piece.text:
            continue
        if merged and merged[-1][1:] == piece[1:]:
            merged[-1] = piece._replace(text=merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return tuple(merged) or (WeightedText(""),)


def reweighted(prompt: ParsedPrompt, span: tuple[int, int], weight: float, window: Window = None) -> ParsedPrompt:
    """A prompt in which the characters of a span count `weight` times as much."""
    pieces, begin = list[WeightedText](), 0
    for piece in prompt.pieces:
        low, high = (min(max(place - begin, 0), len(piece.text)) for place in span)
        inside = WeightedText(piece.text[low:high], piece.weight * weight, window or piece.window)
        pieces += [piece._replace(text=piece.text[:low]), inside, piece._replace(text=piece.text[high:])]
        begin += len(piece.text)
    return ParsedPrompt(join_pieces(pieces), prompt.weight)


@dataclass(frozen=True, slots=True)
class Term:
    """A text whose prediction takes part in that of an image."""

    image: int
    prompt: ParsedPrompt
    weights: tuple[float, ...]  # at each step, without what words weigh above 1
    above: tuple[float, ...]  # that, at each step

    def weights_at(self, scale: float) -> tuple[float, ...]:
        """The weights [steps] under guidance of this scale, which does not multiply what words weigh above 1."""
        return tuple(weight + more / max(scale, 1) for weight, more in zip(self.weights, self.above, strict=True))


def terms_of(images: Sequence[Sequence[ParsedPrompt]], steps: int, weighting: Weighting) -> list[Term]:
    """The terms of some images, of each by the prompts that are joined for it; those of whole prompts come last.

    Raises:
        UserError: weights of some steps alone, which tokens cannot have.
    """
    wholes, differences, none = list[Term](), list[Term](), (0.0,) * steps
    for image, prompts in enumerate(images):
        for prompt in prompts:
            if weighting is Weighting.tokens:
                require_all_steps(prompt)
                wholes.append(Term(image, prompt, (prompt.weight,) * steps, none))
                continue
            shown, below, above = without_masked(prompt), [prompt.weight] * steps, [0.0] * steps
            for kind in dict.fromkeys(piece.kind for piece in shown.pieces if piece.weight != 1):
                weight, (begin, end) = kind
                more = [prompt.weight * (weight - 1) * (begin <= step / steps < end) for step in range(steps)]
                total = above if weight > 1 else below
                total[:] = [sum(pair) for pair in zip(total, more, strict=True)]
                less = tuple(-share for share in more)
                rest = unweighted(without(shown, [piece.kind == kind for piece in shown.pieces]))
                differences.append(Term(image, rest, *((none, less) if weight > 1 else (less, none))))
            wholes.append(Term(image, unweighted(shown), tuple(below), tuple(above)))
    return [*differences, *wholes]


def require_all_steps(prompt: ParsedPrompt) -> None:
    """Refuse a weight that holds in some of the steps."""
    for piece in prompt.pieces:
        if piece.window is not None:
            raise UserError(f"'{piece.text}' is weighted in some of the steps: that needs weighting=difference")


def unweighted(prompt: ParsedPrompt) -> ParsedPrompt:
    """The text alone."""
    return ParsedPrompt((WeightedText(prompt.text),))


def without_masked(prompt: ParsedPrompt) -> ParsedPrompt:
    """The prompt as if the words of weight 0 were not there."""
    return without(prompt, [piece.masked for piece in prompt.pieces])


def without(prompt: ParsedPrompt, left_out: Sequence[bool]) -> ParsedPrompt:
    """A prompt without the words of some pieces, and without what only joins them to the rest.

    Where the end of a phrase is left out, its articles go as well, and the "and", the comma or the preposition that
    led to it: "with two eyes and [horns] on" becomes "with two eyes on", "under a sky with a [sun]" "under a sky".
    """
    if not any(left_out):
        return prompt
    text, spans = prompt.text, list(pairwise([0, *accumulate(len(piece.text) for piece in prompt.pieces)]))
    out = [span for span, whether in zip(spans, left_out, strict=True) if whether]
    words = list(WORD.finditer(text))
    gone = {i for i, word in enumerate(words) if any(begin <= word.start() < end for begin, end in out)}
    while loose := _loose([word[0].lower() for word in words], gone):
        gone |= loose
    kept = [True] * len(text)
    for number in sorted(gone):  # each with the spaces behind it, the last ones with those before
        first = max((words[i].end() for i in range(number) if i not in gone), default=0)
        last = number == len(words) - 1
        begin, end = (first if last else words[number].start()), (len(text) if last else words[number + 1].start())
        kept[begin:end] = [False] * (end - begin)
    pieces = [
        piece._replace(text="".join(compress(text[begin:end], kept[begin:end])))
        for piece, (begin, end) in zip(prompt.pieces, spans, strict=True)
    ]
    return ParsedPrompt(join_pieces(pieces), prompt.weight)


def _loose(words: Sequence[str], gone: set[int]) -> set[int]:
    """Words that joined the first of the phrases that are gone to the rest, where there still are such."""
    for last in sorted(gone):
        after, first = last + 1, last
        if after in gone or (after < len(words) and words[after] not in CLOSING):
            continue
        while first in gone:
            first -= 1
        before = words[first] if first >= 0 else ","
        if before in ARTICLES:
            return {first}
        if after < len(words) and words[after] in JOINTS and before in CLOSING:
            return {after}
        if first >= 0 and before in PREPOSITIONS | JOINTS:
            return {first}
    return set()


def text_states(tower: TextTower, prompts: list[ParsedPrompt], device: torch.device) -> Tensor:
    """States [R, L, D] of the prompts' texts, each token's times the weight of its piece.

    As the web interface that made the syntax known, all states of a prompt are then scaled by one factor, so that
    their mean over tokens and channels is what it was without weights.
    """
    states = tower.text_states(tower.tokenize([prompt.text for prompt in prompts]).to(device))  # [R, L, D]
    rows = []
    for state, prompt in zip(states, prompts, strict=True):
        if any(piece.weight != 1 for piece in prompt.pieces):
            weighted = state * token_weights(tower, prompt).to(state).unsqueeze(-1)
            state = weighted * (state.mean() / weighted.mean())
        rows.append(state)
    return torch.stack(rows)


def token_weights(tower: TextTower, prompt: ParsedPrompt) -> Tensor:
    """Weights [L] of the tokens: that of the piece that they come from, 1 for start, end and padding.

    A piece ends where its text, cut off there, is no longer tokenised as the whole. A token across that place belongs
    to the next piece.
    """
    texts = ["", *("".join(piece.text for piece in prompt.pieces[: i + 1]) for i in range(len(prompt.pieces)))]
    *begun, whole, longer = tower.tokenize([*texts, prompt.text + END])
    ends = [common(tokens, whole) for tokens in (*begun, longer)]
    weights = torch.ones(len(whole))
    for (start, end), piece in zip(pairwise(ends), prompt.pieces, strict=True):
        weights[start : min(end, len(whole) - 1)] = piece.weight  # the last one is an end token, also of a text cut off
    return weights
