"""Edits of pictures by their prompts: sources and their edits are drawn together, under attention control.

(made,) = edit_pictures(model, [Edit(prompt="a red monster", edit="a blue monster")], seeds=[0], watch=True)
made.source.image, made.result.image, made.result.maps["monster"]
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import Edit, EditMode, SamplingConfig
from models.alignment import Words, refinement, replacement, words_of
from models.attention_control import ControlledAttention, TokenControl
from models.conditions import Inputs
from models.heat_maps import WordMaps
from models.pipeline import DiffusionPipeline
from models.process import Denoise
from models.prompts import parse, plain
from models.solvers.common import Callback


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn picture and what its words look at."""

    image: Tensor  # [3, H, W] in [-1, 1]
    maps: dict[str, Tensor]  # [H, W] by word, the mean attention that it gets; {} unless they were asked for


@dataclass(frozen=True, slots=True)
class Edited:
    """A picture before and after an edit."""

    source: Picture
    result: Picture
    region: Tensor | None  # bool [H, W], where it may have changed; None: everywhere


class Editor:
    """A control of `DiffusionPipeline` for rows of which some are edits of others."""

    def __init__(self, rows: "Rows", watch: bool, device: torch.device) -> None:
        self.rows, self.blended = rows, rows.blended()
        self.attending = ControlledAttention(rows.controls(), device)
        words = rows.looked_at(watch)
        self.maps = WordMaps(words, device) if any(words) else None
        self.step, self.progress, self.size = 0, 0.0, (0, 0)
        self.regions: dict[int, Tensor] = {}  # bool [h, w] by row

    def attention(self, q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        """Of one layer (`models.attention`)."""
        if not is_cross:
            return self.attending.to_picture(q, k, v)
        if self.maps is not None and q.shape[2] <= self.maps.largest:
            tokens = self.maps.columns(k.shape[2])
            self.maps.add(self.step, name, self.attending.maps(q, k, tokens), self.size)
        return self.attending.to_text(q, k, v)

    def around(self, denoise: Denoise, sigmas: Tensor) -> Denoise:
        """Knows from the noise level where sampling is, and blends the guesses x0."""

        def controlled(x: Tensor, sigma: float) -> Tensor:
            self.step = max(0, int((sigmas[:-1] >= sigma).sum()) - 1)  # also between two levels, and twice at one
            self.progress, self.size = self.step / (len(sigmas) - 1), (x.shape[2], x.shape[3])
            self.attending.move_to(self.progress)
            return self._blend(denoise(x, sigma))

        return controlled

    def _blend(self, x0: Tensor) -> Tensor:
        """Guesses [R, C, h, w] that are those of their sources where the blend words are not."""
        guesses = list(x0)
        for row, (source, edit) in self.blended.items():
            if self.progress >= edit.blend_from and self.maps is not None:
                places = (self.maps.region(place, edit.blend, edit.blend_threshold) for place in (source, row))
                self.regions[row] = torch.stack(list(places)).any(0)
                guesses[row] = torch.where(self.regions[row], x0[row], x0[source])
        return torch.stack(guesses)

    def picture(self, row: int, image: Tensor, watch: bool) -> Picture:
        """A drawn image [3, H, W] with the heat maps of its words."""
        if self.maps is None or not watch:
            return Picture(image, {})
        return Picture(
            image, {word: self.maps.of(row, word, image.shape[1:]) for word in labelled(self.rows.words[row])}
        )

    def region(self, row: int, size: Sequence[int]) -> Tensor | None:
        """Where a picture of this size may have changed."""
        if row not in self.regions:
            return None
        return F.interpolate(self.regions[row][None, None].float(), tuple(size))[0, 0] > 0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch: sources, one for edits of the same picture, and then the edits."""

    edits: list[Edit]
    bringers: list[int]  # the edit that each source row is taken from
    sources: list[int]  # row of each edit's source
    words: list[Words]  # of each row

    @classmethod
    def of(cls, edits: Sequence[Edit], keys: Sequence[tuple[str, int, int]], read: Callable[[str], Words]) -> Self:
        """Of edits and what names their sources: prompt, seed and number."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        bringers = sorted(first.values())
        texts = [edits[number].prompt for number in bringers] + [edit.edited for edit in edits]
        known = {text: read(text) for text in dict.fromkeys(texts)}
        sources = [bringers.index(first[key]) for key in keys]
        return cls(list(edits), bringers, sources, [known[text] for text in texts])

    @property
    def owners(self) -> list[int]:
        """The edit that each row belongs to."""
        return [*self.bringers, *range(len(self.edits))]

    @property
    def prompts(self) -> list[str]:
        """Of each row."""
        return [self.edits[n].prompt for n in self.bringers] + [edit.edited for edit in self.edits]

    def row(self, number: int) -> int:
        """Of an edit."""
        return len(self.bringers) + number

    def controls(self) -> list[TokenControl]:
        """Of each row."""
        alone = [TokenControl.none(row, len(self.words[row].tokens)) for row in range(len(self.bringers))]
        return alone + [
            token_control(edit, source, self.words[source], self.words[self.row(number)])
            for number, (edit, source) in enumerate(zip(self.edits, self.sources, strict=True))
        ]

    def blended(self) -> dict[int, tuple[int, Edit]]:
        """Source row and edit of the rows whose change is kept to a region."""
        pairs = enumerate(zip(self.sources, self.edits, strict=True))
        return {self.row(number): (source, edit) for number, (source, edit) in pairs if edit.blend}

    def looked_at(self, watch: bool) -> list[dict[str, list[int]]]:
        """Tokens of the words whose maps are needed, of each row."""
        chosen = [labelled(words) if watch else {} for words in self.words]
        for row, (source, edit) in self.blended().items():
            for phrase in edit.blend:
                found = {place: self.words[place].places(phrase) for place in (source, row)}
                if not any(found.values()):
                    self.words[row].find(phrase)  # says what there is
                for place, tokens in found.items():
                    chosen[place][phrase] = tokens
        return chosen


def token_control(edit: Edit, source: int, before: Words, after: Words) -> TokenControl:
    """What an edit means for the tokens of its prompts."""
    replace = edit.mode is EditMode.replace or (edit.mode is EditMode.auto and len(before.words) == len(after.words))
    alignment = (replacement if replace else refinement)(before, after)  # [L, L]
    known = torch.ones(len(alignment)) if replace else (alignment.sum(0) > 0).float()  # [L]
    until, weights = edit.replace_until * known, torch.ones(len(alignment))
    for word, share in edit.until.items():
        tokens = after.find(word)
        until[tokens] = share * known[tokens]
    for word, weight in edit.weights.items():
        weights[after.find(word)] *= weight
    return TokenControl(source, alignment, until, weights, edit.self_until)


def labelled(words: Words) -> dict[str, list[int]]:
    """Tokens of all words; one that comes again is "word#2"."""
    seen: Counter[str] = Counter()
    found = {}
    for word, span in zip(words.words, words.spans, strict=True):
        seen[word] += 1
        found[word if seen[word] == 1 else f"{word}#{seen[word]}"] = list(span)
    return found


def edit_pictures(
    model: DiffusionPipeline,
    edits: Sequence[Edit],
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    indices: Sequence[int] | None = None,
    watch: bool = False,
    callback: Callback | None = None,
    inputs: Inputs | None = None,
) -> list[Edited]:
    """Sources and their edits, all in one batch; they share the noise, which belongs to the prompt of the source.

    Args:
        model: told a caption.
        edits: E of them.
        seeds: one per edit.
        sampling: as for the pipeline.
        indices: number of the source among those of one prompt and seed; None: all 0.
        watch: make the heat maps of all words.
        callback: as for the pipeline; sees the rows of this batch.
        inputs: arrays of the other conditions, E each.

    Raises:
        UserError: a network without text, words that are not in their prompt, prompts that are too long, prompts whose
            words do not correspond in mode=replace, and what the pipeline refuses.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    numbers = [0] * len(edits) if indices is None else indices
    keys = [(edit.prompt, seed, number) for edit, seed, number in zip(edits, seeds, numbers, strict=True)]
    rows = Rows.of(edits, keys, reader(model, sampling))
    editor = Editor(rows, watch, model.device)
    images = model(
        rows.prompts,
        [seeds[owner] for owner in rows.owners],
        sampling,
        indices=[numbers[owner] for owner in rows.owners],
        callback=callback,
        inputs={name: array[rows.owners] for name, array in (inputs or {}).items()},
        noise_of=[edits[owner].prompt for owner in rows.owners],
        control=editor,
    )
    pictures = [editor.picture(row, image, watch) for row, image in enumerate(images)]
    return [
        Edited(pictures[source], pictures[rows.row(number)], editor.region(rows.row(number), images.shape[2:]))
        for number, source in enumerate(rows.sources)
    ]


def reader(model: DiffusionPipeline, sampling: SamplingConfig) -> Callable[[str], Words]:
    """Finds the words of a prompt as this network and this syntax see them."""
    tower = model.text_tower
    if tower is None or not model.denoiser.conditions.takes_text:
        raise UserError("this network was trained without conditions.caption: it has no words to edit a picture by")

    def read(text: str) -> Words:
        joined = (parse if sampling.prompt_syntax else plain)(text)
        if len(joined) > 1:
            raise UserError(f"prompt '{text}': an edit takes no AND; write one prompt")
        return words_of(tower, joined[0].text)

    return read
