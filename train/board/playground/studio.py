"""What the page asks for and gets: images before and after an edit, with the maps of their words and their films."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import PlaygroundRun, Precision, SamplingConfig
from data.images import in_range, to_tensor
from data.shards.manifest import MANIFEST
from models.diffusion.samplers import Callback
from models.editing.editing import DrawnImage, edit_images, read_prompt, read_words, watch_images
from models.film import Film
from models.losses import psnr
from models.pipeline import DiffusionPipeline
from train.board.playground.request import Request
from train.board.playground.upload import pixels_of
from train.engine.image_grid import to_uint8
from train.engine.precision import autocast
from train.sampling.requests import captions_of_shards, require_prompts_alone, samples_of

LARGEST_MAP = 128  # pixels of its sides: maps are smooth
EXAMPLES = 4  # prompts that the page offers
TELL_S = 0.5  # seconds from one word on the steps done to the next: telling and showing it takes from the drawing
OnStep = Callable[[int, int], object]  # (steps done, all steps)
Made = tuple[str, DrawnImage, Tensor | None]  # prompt, image, and where it may differ from the one before


@dataclass(frozen=True, slots=True)
class Shown:
    """One image with all that is known of it."""

    prompt: str
    image: np.ndarray  # uint8 [H, W, 3]
    film: np.ndarray  # uint8 [F, H, W, 3], guesses of the image while it was drawn
    words: list[tuple[str, np.ndarray]]  # with the attention that each gets, [h, w] in [0, 1]
    region: np.ndarray | None = None  # bool [H, W], where an edit may have changed it; None: everywhere


@dataclass(frozen=True, slots=True)
class Drawing:
    """The answer to one request."""

    request: Request
    before: Shown
    after: Shown | None  # None: no edit was asked for
    film_labels: list[str]
    seconds: float
    psnr: float | None = None  # dB, of a given image as it is drawn again


class Studio:
    """A model that draws for everybody; it keeps nothing of one visitor that another could see.

    One thread loads it and draws, whoever asks. Each thread that computes gets OpenMP threads of its own, and as soon
    as there are more of them than cores, all go to sleep after each operation: an image took twice as long.

    Raises:
        UserError: a network that must be told something else than a prompt.
    """

    def __init__(self, load: Callable[[], DiffusionPipeline], precision: Precision, film_frames: int) -> None:
        self.thread = ThreadPoolExecutor(1, "studio")
        self.model = model = self.thread.submit(load).result()
        self.precision, self.film_frames = precision, film_frames
        self.side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale  # pixels
        require_prompts_alone(model.conditions, "the playground")
        if not model.conditions.takes_text:
            raise UserError("this network was trained without conditions.caption: it takes no prompt to play with")

    def words(self, prompt: str, sampling: SamplingConfig) -> list[str]:
        """What weights can be given to: each word, by the name that it has in `models.editing.alignment`.

        Raises:
            UserError: a prompt that is too long or has broken syntax.
        """
        (words,) = read_words(self.model, [read_prompt(self.model, prompt, sampling)])
        return [word for word in words.named() if is_word(word)]

    def draw(self, request: Request, on_step: OnStep | None = None) -> Drawing:
        """Draw an image and, if there is anything to be changed, the edited one beside it.

        Args:
            request: prompt, edit, seed and options.
            on_step: hears how far it is, every now and then.

        Raises:
            UserError: see `models.editing.editing.edit_images`; images that are not finite.
        """
        return self.thread.submit(copy_context().run, self._draw, request, on_step).result()

    def _draw(self, request: Request, on_step: OnStep | None) -> Drawing:
        began = told = time.monotonic()
        steps = request.sampling.steps
        film = Film(self.film_frames, steps, [0, 1] if request.changes else [0])

        def watched(step: int, x: Tensor, x0: Tensor) -> None:
            nonlocal told
            film(step, x, x0)
            if on_step is not None and time.monotonic() - told > TELL_S:
                told = time.monotonic()
                on_step(step + 1, steps)

        with autocast(self.model.device, self.precision):
            made, found = self._made(request, watched)
            images = torch.stack([image.image for _, image, _ in made])
            if not images.isfinite().all():
                raise UserError("the image is NaN or infinite: set a lower guidance, or runtime.precision=fp32")
            last = images if found is None else torch.stack([found, images[1]])
            strips = film.frames(self.model, last)  # [1 or 2, F, 3, H, W]
        before, *after = [as_bytes(*each, to_uint8(strip)) for each, strip in zip(made, strips, strict=True)]
        again = None if found is None else psnr(found[None], images[:1]).item()
        return Drawing(request, before, after[0] if after else None, film.labels, time.monotonic() - began, again)

    def _made(self, request: Request, watched: Callback) -> tuple[list[Made], Tensor | None]:
        """The images, and a given one as it is drawn again."""
        edit, seeds, sampling, given = request.edit, [request.seed], request.sampling, None
        inputs = self.model.prepare(samples_of([{"caption": edit.prompt}], [0], request.seed, self.side))
        if not request.changes:
            (image,) = watch_images(self.model, [edit.prompt], seeds, sampling, callback=watched, inputs=inputs)
            return [(edit.prompt, image, None)], None
        if request.image:
            given = in_range(to_tensor(pixels_of(request.image, *self.size(sampling))))[None]
        (made,) = edit_images(
            self.model,
            [edit],
            seeds,
            sampling,
            watch=True,
            callback=watched,
            inputs=inputs,
            source_images=given,
            inversion=request.inversion,
        )
        return [(edit.prompt, made.source, None), (edit.edited, made.result, made.region)], made.reconstruction

    def size(self, sampling: SamplingConfig) -> tuple[int, int]:
        """Height and width of the images that are drawn, in pixels."""
        height, width = sampling.size or (self.side, self.side)
        return height, width


def as_bytes(prompt: str, image: DrawnImage, region: Tensor | None, film: np.ndarray) -> Shown:
    """An image with its words and its film, as bytes."""
    words = [(word.partition("#")[0], stretched(heat)) for word, heat in image.maps.items() if is_word(word)]
    where = None if region is None else region.cpu().numpy()
    return Shown(prompt, to_uint8(image.image[None])[0], film, words, where)


def is_word(text: str) -> bool:
    """Whether it is not punctuation alone."""
    return any(map(str.isalnum, text))


def stretched(values: Tensor) -> np.ndarray:
    """A map [H, W] from its least value, which becomes 0, to its largest, 1; of a large image a smaller map."""
    step = -(-max(values.shape) // LARGEST_MAP)
    values = values[::step, ::step]
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp(min=1e-12)).float().cpu().numpy()


def examples_of(cfg: PlaygroundRun) -> list[str]:
    """Captions of the data set that the run was tested on, if it is there."""
    if not (Path(cfg.examples) / MANIFEST).is_file():
        return []
    return [caption for caption in captions_of_shards(cfg.examples, EXAMPLES) if caption]
