"""Edits of images by their prompts: sources and their edits are drawn together, under attention control.

(made,) = edit_images(model, [Edit(prompt="a red monster", edit="a blue monster")], seeds=[0], watch=True)
made.source.image, made.result.image, made.result.maps["monster"]
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import Edit, EditMode, InversionMethod, SamplingConfig, Weighting
from models.conditions import Inputs
from models.diffusion.process import Denoise
from models.diffusion.samplers import Callback
from models.editing.alignment import Words, refinement, replacement, words_of
from models.editing.attention_control import ControlledAttention, TokenControl
from models.editing.heat_maps import WordMaps
from models.editing.inversion import invert
from models.pipeline import DiffusionPipeline, SamplingStart
from models.prompts import ParsedPrompt, reweighted, without_masked

NEW = 2**63  # the draw of an image's noise that no step comes to


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """A drawn image and what its words look at."""

    image: Tensor  # [3, H, W] in [-1, 1]
    maps: dict[str, Tensor]  # [H, W] by word, the mean attention that it gets; {} unless they were asked for


@dataclass(frozen=True, slots=True)
class Edited:
    """An image before and after an edit."""

    source: DrawnImage
    result: DrawnImage
    region: Tensor | None  # bool [H, W], where it may have changed; None: everywhere
    reconstruction: Tensor | None = None  # [3, H, W], a given source as the network draws it again


class Editor:
    """A control of `DiffusionPipeline` for rows of which some are edits of others."""

    def __init__(self, rows: "Rows", watch: bool, device: torch.device) -> None:
        self.rows, self.watch = rows, watch
        self.attending = ControlledAttention(rows.controls(), device)
        words, length = rows.looked_at(watch), len(rows.words[0].tokens)
        self.maps = WordMaps(words, length, device, detailed=watch) if any(words) else None
        self.change: dict[int, Tensor] = {}  # [h, w] by row, how far guesses were from those of the source so far
        self.step, self.progress, self.size = 0, 0.0, (0, 0)
        self.regions: dict[int, Tensor] = {}  # bool [h, w] by row

    def attention(self, q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        """Attention of one layer (`models.attention`), under the control of the edits; adds up the heat maps."""
        if not is_cross:
            return self.attending.to_image(q, k, v)
        if self.maps is not None and self.maps.wants(name):
            self.maps.add(self.step, name, self.attending.maps(q, k, self.maps.tokens), self.size)
        return self.attending.to_text(q, k, v)

    def around(self, denoise: Denoise, sigmas: Tensor) -> Denoise:
        """A denoiser that follows from the noise level where sampling is, and blends the guesses x0."""

        def controlled(x: Tensor, sigma: float) -> Tensor:
            self.step = max(0, int((sigmas[:-1] >= sigma).sum()) - 1)  # also between two levels, and twice at one
            self.progress, self.size = self.step / (len(sigmas) - 1), (x.shape[2], x.shape[3])
            self.attending.move_to(self.progress)
            return self._blend(denoise(x, sigma))

        return controlled

    def _blend(self, x0: Tensor) -> Tensor:
        """Guesses [R, C, h, w] that are those of their sources outside the region of their edit."""
        # The guesses and not the noisy latents: a sampler that extrapolates from earlier guesses then has blended ones.
        guesses = list(x0)
        for row, (source, edit) in self.rows.edits.items():
            if edit.blend_change:
                self.change[row] = self.change.get(row, 0) + (x0[row] - x0[source]).abs().mean(0)
            if (edit.blend or edit.blend_change) and self.progress >= edit.blend_from:
                self.regions[row] = self._region(row, source, edit)
                guesses[row] = torch.where(self.regions[row], x0[row], x0[source])
        return torch.stack(guesses)

    def _region(self, row: int, source: int, edit: Edit) -> Tensor:
        """The region in which an edit may change the image, bool [h, w]."""
        regions = []
        if edit.blend and self.maps is not None:
            places = [self.maps.region(place, edit.blend, edit.blend_threshold) for place in (source, row)]
            regions.append(places[0] | places[1])
        if edit.blend_change:
            regions.append(self.change[row] > edit.blend_threshold * self.change[row].max())
        return torch.stack(regions).all(0)

    def image(self, row: int, image: Tensor) -> DrawnImage:
        """A drawn image [3, H, W] with the heat maps of its words, if they are asked for."""
        words = self.rows.words[row].named() if self.watch and self.maps is not None else {}
        return DrawnImage(image, {word: self.maps.of(row, word, image.shape[1:]) for word in words if self.maps})

    def confined(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Images [R, 3, H, W] that outside a region are their sources' to the last bit; regions, bool [H, W] by row.

        The guesses are so already, but a decoder mixes what is near, and its norms everything.
        """
        images, regions = images.clone(), {}
        for row, region in self.regions.items():
            share = F.interpolate(region[None, None].float(), images.shape[2:], mode="bilinear")[0, 0]
            source = images[self.rows.edits[row][0]]
            images[row] = source + share * (images[row] - source)
            regions[row] = share > 0
        return images, regions


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch."""

    words: list[Words]
    edits: dict[int, tuple[int, Edit]]  # row of the source and edit, of those rows that are one
    weighting: Weighting

    def controls(self) -> list[TokenControl]:
        """The control of each row's attention."""
        controls = [TokenControl.none(row, len(words.tokens)) for row, words in enumerate(self.words)]
        for row, (source, edit) in self.edits.items():
            controls[row] = token_control(edit, source, self.words[source], self.words[row], self.weighting)
        return controls

    def looked_at(self, watch: bool) -> list[dict[str, list[int]]]:
        """Tokens of the words whose maps are needed, of each row."""
        chosen = [words.named() if watch else {} for words in self.words]
        for row, (source, edit) in self.edits.items():
            for phrase in edit.blend:
                found = {place: self.words[place].find_any(phrase) for place in (source, row)}
                if not any(found.values()):
                    self.words[row].find(phrase)  # says what there is
                for place, tokens in found.items():
                    chosen[place][phrase] = tokens
        return chosen


def token_control(edit: Edit, source: int, before: Words, after: Words, weighting: Weighting) -> TokenControl:
    """The control of an edit over the tokens of its prompts.

    One that changes weights alone takes no attention from its source, with `weighting=difference`: from the same noise
    the rest stays as it is, and what the source attends to would hold back what the weight leads away from.
    """
    if weighting is Weighting.difference and edit.weights and edit.edited == edit.prompt:
        edit = replace(edit, replace_until=0.0, self_until=0.0)
    swapped = edit.mode is EditMode.replace or (edit.mode is EditMode.auto and len(before.words) == len(after.words))
    alignment = (replacement if swapped else refinement)(before, after)  # [L, L]
    known = torch.ones(len(alignment)) if swapped else (alignment.sum(0) > 0).float()  # [L]
    until = edit.replace_until * known
    for word, share in edit.until.items():
        tokens = after.find(word)
        until[tokens] = share * known[tokens]
    weighted = edit.weights if weighting is Weighting.tokens else {}
    weights = {token: weight for word, weight in weighted.items() for token in after.find(word)}
    return TokenControl(source, alignment, until, factors(after, weights), edit.self_until)


def factors(words: Words, weights: Mapping[int, float]) -> Tensor:
    """Factors [L] of tokens: 1 where none is named, and of start, end and padding, which belong to no word."""
    made = torch.ones(len(words.tokens))
    for token in (token for span in words.spans for token in span):
        made[token] = weights.get(token, 1.0)
    return made


def edit_images(
    model: DiffusionPipeline,
    edits: Sequence[Edit],
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    indices: Sequence[int] | None = None,
    watch: bool = False,
    callback: Callback | None = None,
    inputs: Inputs | None = None,
    source_images: Tensor | None = None,
    inversion: InversionMethod = InversionMethod.negative_prompt,
) -> list[Edited]:
    """Draw sources and their edits, all in one batch; they share the noise, which belongs to the prompt of the source.

    Args:
        model: one that takes captions.
        edits: E of them; those of one source share its row.
        seeds: one per edit.
        sampling: as for the pipeline.
        indices: number of the source among those of one prompt and seed; None: all 0.
        watch: make the heat maps of all words.
        callback: as for the pipeline; sees the rows of this batch.
        inputs: arrays of the other conditions, E each.
        source_images: [E, 3, H, W], of which the prompts say what they show; None: they are drawn.
        inversion: how their noise is found (`models.editing.inversion`).

    Raises:
        UserError: a network without text, words that are not in their prompt, prompts that are too long, prompts whose
            words do not correspond in mode=replace, and what the pipeline and `invert` refuse.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    numbers = [0] * len(edits) if indices is None else indices
    # Rows of the batch: each source once, however many edits it has, then the edits. Attention control reads the
    # source's queries and keys as the network computes them, so both must be in the same forward pass.
    contents = (
        [None] * len(edits) if source_images is None else [image.cpu().numpy().tobytes() for image in source_images]
    )
    firsts, sources = distinct(list(zip([edit.prompt for edit in edits], seeds, numbers, contents, strict=True)))
    owners = [*firsts, *range(len(edits))]  # edit that each row belongs to
    prompts = [read_prompt(model, edits[number].prompt, sampling) for number in firsts]
    prompts += [read_edited(model, edit, sampling) for edit in edits]
    count = len(firsts)
    changed = {count + number: pair for number, pair in enumerate(zip(sources, edits, strict=True))}
    editor = Editor(Rows(read_words(model, prompts), changed, sampling.weighting), watch, model.device)
    own = {name: array[owners] for name, array in (inputs or {}).items()}
    start = None
    if source_images is not None:
        weighted = any(piece.weight != 1 for prompt in prompts[:count] for piece in prompt.pieces)
        if weighted and sampling.weighting is Weighting.difference:
            raise UserError("the prompt of a given image says what it shows: write weights of words in weights=")
        of_sources = {name: array[:count] for name, array in own.items()}
        inverted = invert(model, source_images[firsts], prompts[:count], sampling, inversion, of_sources)
        start = inverted.select([*range(count), *sources])  # an edit begins where its source does
    names = [edits[owner].prompt for owner in owners]
    seeds, numbers = [seeds[owner] for owner in owners], [numbers[owner] for owner in owners]
    shares = [0.0] * count + [edit.new_noise for edit in edits]
    if any(shares):
        noise = partial(model.noise, names, seeds, numbers, model.latent_shape(sampling))
        start = renewed(
            start or SamplingStart(model.initial(noise(0), sampling)), model.initial(noise(NEW), sampling), shares
        )
    drawn = model(
        prompts,
        seeds,
        sampling,
        indices=numbers,
        callback=callback,
        inputs=own,
        noise_of=names,
        start=start,
        control=editor,
    )
    # Outside its region an edit shows the user's own pixels, not what inversion and the decoder make of them.
    before = drawn[:count] if source_images is None else source_images[firsts].to(drawn)
    images, regions = editor.confined(torch.cat([before, drawn[count:]]))
    made = [editor.image(row, image) for row, image in enumerate(images)]
    again = dict(enumerate(drawn[:count])) if source_images is not None else {}
    return [
        Edited(made[source], made[row], regions.get(row), again.get(source)) for row, (source, _) in changed.items()
    ]


def renewed(start: SamplingStart, new: Tensor, shares: Sequence[float]) -> SamplingStart:
    """The beginning of rows of which some have, by these shares of their variance, other noise [R, C, h, w]."""
    share = torch.tensor(shares, device=new.device).view(-1, 1, 1, 1)
    return replace(start, x=(1 - share).sqrt() * start.x + share.sqrt() * new)


def distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Numbers of the first of all equal keys, in order, and for each key where in that list its equal is."""
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    firsts = sorted(first.values())
    return firsts, [firsts.index(first[key]) for key in keys]


def watch_images(
    model: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    indices: Sequence[int] | None = None,
    callback: Callback | None = None,
    inputs: Inputs | None = None,
) -> list[DrawnImage]:
    """The images that the pipeline draws of the same arguments, with the heat maps of all words."""
    sampling = SamplingConfig() if sampling is None else sampling
    read = [read_prompt(model, prompt, sampling) for prompt in prompts]
    editor = Editor(Rows(read_words(model, read), {}, sampling.weighting), True, model.device)
    images = model(
        read, seeds, sampling, indices=indices, callback=callback, inputs=inputs, noise_of=prompts, control=editor
    )
    return [editor.image(row, image) for row, image in enumerate(images)]


def check_edit(model: DiffusionPipeline, edit: Edit, sampling: SamplingConfig) -> None:
    """Refuse, before anything is drawn, what `edit_images` would refuse of the words of an edit."""
    prompts = [read_prompt(model, edit.prompt, sampling), read_edited(model, edit, sampling)]
    rows = Rows(read_words(model, prompts), {1: (0, edit)}, sampling.weighting)
    rows.controls()
    rows.looked_at(watch=False)


def read_prompt(model: DiffusionPipeline, text: str, sampling: SamplingConfig) -> ParsedPrompt:
    """The prompt of an image to be edited or watched, without the words that are masked."""
    if model.text_tower is None or not model.conditions.takes_text:
        raise UserError("this network was trained without conditions.caption: it has no words to edit an image by")
    joined = model.read(text, sampling)
    if len(joined) > 1:
        raise UserError(f"prompt '{text}': an edit takes no AND; write one prompt")
    return joined[0] if sampling.weighting is Weighting.tokens else without_masked(joined[0])


def read_edited(model: DiffusionPipeline, edit: Edit, sampling: SamplingConfig) -> ParsedPrompt:
    """The prompt of an edited image with the weights of its words; attention gets them with `weighting=tokens`."""
    prompt = read_prompt(model, edit.edited, sampling)
    if sampling.weighting is Weighting.tokens:
        if edit.during:
            raise UserError(f"during={next(iter(edit.during))}: weights of some steps need weighting=difference")
        return prompt
    (words,) = read_words(model, [prompt])
    for phrase, weight in edit.weights.items():
        for number in words.require(phrase):
            prompt = reweighted(prompt, words.places[number], weight, edit.during.get(phrase))
    return without_masked(prompt)


def read_words(model: DiffusionPipeline, prompts: Sequence[ParsedPrompt]) -> list[Words]:
    """The words of each prompt as this network sees them."""
    assert model.text_tower is not None
    found = {text: words_of(model.text_tower, text) for text in dict.fromkeys(prompt.text for prompt in prompts)}
    return [found[prompt.text] for prompt in prompts]
