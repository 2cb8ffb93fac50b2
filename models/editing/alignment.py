"""Words of prompts, their tokens, and which tokens of two prompts mean the same (Hertz et al. 2022, section 3.2).

Shapes: L tokens of a text. Only the tokenizer decides which tokens a word has: a word may have several, and may come
again; start, end and padding belong to no word.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from conf.errors import UserError, did_you_mean
from models.text import END, WORD, TextTower, common, cut_off

QUOTED = 50  # characters of a text in an error


@dataclass(frozen=True, slots=True)
class Words:
    """A prompt's words and where their tokens are."""

    text: str
    words: tuple[str, ...]
    places: tuple[tuple[int, int], ...]  # where each word begins and ends in the text
    spans: tuple[range, ...]  # tokens of each word
    tokens: tuple[int, ...]  # [L], of the whole prompt
    start: int  # where the tokens of the words begin
    end: int  # and end: the place of the end token

    def named(self) -> dict[str, list[int]]:
        """Tokens of each word; one that stands there several times is "word#1", "word#2" …, as `find` takes them."""
        often, seen, found = Counter(map(str.casefold, self.words)), Counter[str](), {}
        for word, span in zip(self.words, self.spans, strict=True):
            seen[word.casefold()] += 1
            found[word if often[word.casefold()] == 1 else f"{word}#{seen[word.casefold()]}"] = list(span)
        return found

    def find(self, phrase: str) -> list[int]:
        """Tokens of a word or of words in a row, wherever they stand; of `phrase#2` the second time that they do.

        Raises:
            UserError: they are not in the prompt.
        """
        return self._tokens(self.require(phrase))

    def find_any(self, phrase: str) -> list[int]:
        """Tokens as `find` has them; none where the words are not in the prompt."""
        return self._tokens(self.numbers(phrase))

    def require(self, phrase: str) -> list[int]:
        """Numbers of the words of a phrase, as `numbers` has them.

        Raises:
            UserError: they are not in the prompt.
        """
        found = self.numbers(phrase)
        if not found:
            near = did_you_mean(phrase, self.words)
            raise UserError(
                f"'{phrase}' is not in the prompt '{self.text}': choose among {', '.join(self.words)}{near}"
            )
        return found

    def numbers(self, phrase: str) -> list[int]:
        """Numbers of the words of a phrase, wherever it stands; of `phrase#2` the second time that it does."""
        wanted, _, number = phrase.partition("#")
        parts = [word.casefold() for word in WORD.findall(wanted)]
        own = [word.casefold() for word in self.words]
        starts = [i for i in range(len(own)) if parts and own[i : i + len(parts)] == parts]
        if number:
            starts = starts[int(number) - 1 :][:1] if number.isdecimal() and int(number) else []
        return sorted({i for start in starts for i in range(start, start + len(parts))})

    def _tokens(self, numbers: Sequence[int]) -> list[int]:
        return sorted({token for number in numbers for token in self.spans[number]})


def words_of(tower: TextTower, text: str) -> Words:
    """The words of a prompt.

    Raises:
        UserError: words that do not fit into the context.
    """
    lost = cut_off(tower, text)
    if lost:
        raise UserError(
            f"prompt '{brief(text)}': longer than the {tower.context_length} tokens of the text encoder, which do not "
            f"hold '{brief(lost)}'; shorten it"
        )
    found = list(WORD.finditer(text))
    # A word's tokens are those by which the text up to its end is longer than the text up to the last one: this holds
    # for every tokenizer, where offsets are known to few and joining separately tokenized words gives other tokens.
    pieces = ["", *(text[: match.end()] for match in found), text + END]
    *begun, longer = tower.tokenize(pieces)  # [., L]
    whole, length = begun[-1], len(longer)
    ends = [min(common(piece, whole), length - 1) for piece in (*begun[:-1], longer)]
    start = common(begun[0], longer)  # tokens before those of the words
    spans = tuple(range(start, max(start, end)) for start, end in pairwise(ends))
    words, places = tuple(match[0] for match in found), tuple(match.span() for match in found)
    return Words(text, words, places, spans, tuple(whole.tolist()), start, ends[-1])


def brief(text: str) -> str:
    """The beginning of a text, for one line."""
    return text if len(text) <= QUOTED else f"{text[:QUOTED].rstrip()}…"


def replacement(source: Words, edited: Words) -> Tensor:
    """Alignment [L of the source, L] of swapped words: whose attention each token of the edited prompt takes.

    The words correspond one to one. A word whose number of tokens changes shares its attention evenly among the new
    ones, so that every row sums to 1.

    Raises:
        UserError: prompts of different numbers of words.
    """
    if len(source.words) != len(edited.words):
        raise UserError(
            f"mode=replace: '{source.text}' has {len(source.words)} words and '{edited.text}' {len(edited.words)}; "
            "write as many, or set mode=refine"
        )
    matrix = aligned(source, edited, [(i, i) for i in range(len(source.words))])
    left = matrix.sum(1) == 0  # padding of the source where the edited prompt, which is longer, still has words
    matrix[left, min(edited.end + 1, len(matrix) - 1)] = 1.0
    return matrix


def refinement(source: Words, edited: Words) -> Tensor:
    """Alignment [L of the source, L] when words are added or left out: a column of zeros where a token is new."""
    return aligned(source, edited, common_words(source, edited))


def aligned(source: Words, edited: Words, pairs: list[tuple[int, int]]) -> Tensor:
    """Alignment [L of the source, L] of pairs of words, of what stands before all words, the end, and padding."""
    length = len(source.tokens)
    matrix = torch.zeros(length, length)
    for old, new in ((source.spans[i], edited.spans[j]) for i, j in pairs):
        if len(old) == len(new):
            matrix[list(old), list(new)] = 1.0
        elif new:
            matrix[old.start : old.stop, new.start : new.stop] = 1.0 / len(new)
    same = [*range(min(source.start, edited.start)), *range(max(source.end, edited.end) + 1, length)]
    matrix[same, same] = 1.0
    matrix[source.end, edited.end] = 1.0
    return matrix


def common_words(source: Words, edited: Words) -> list[tuple[int, int]]:
    """The longest common subsequence of the words of two prompts, as pairs of their numbers."""
    old, new = ([word.casefold() for word in words.words] for words in (source, edited))
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]  # of what follows i and j
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            best[i][j] = best[i + 1][j + 1] + 1 if old[i] == new[j] else max(best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        if old[i] == new[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
