"""The frozen networks as one encoder: images, captions and labels to moments, text states and conditions' arrays."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Precision
from data.images import in_range
from data.labels import Labels
from data.order import rng
from models.autoencoder import Autoencoder, finite_or_fp32, split_moments
from models.conditions import Conditions, Samples
from models.text import Cuts, TextTower, image_embeddings
from models.tiles import encode_in_tiles
from train.engine.precision import autocast


@dataclass(frozen=True, slots=True)
class Encoded:
    """Arrays that the networks made of B samples with V variants each."""

    moments: np.ndarray  # [B, V, 2·C, h, w] float32
    tokens: np.ndarray | None  # [B, L] int64
    text: np.ndarray | None  # [B, L, D] float32
    arrays: dict[str, np.ndarray]  # of conditions [B, V, ...]

    def sound(self, row: int) -> bool:
        """Whether all values of a sample are finite."""
        values = [self.moments, *([] if self.text is None else [self.text]), *self.arrays.values()]
        return all(bool(np.isfinite(array[row]).all()) for array in values)


@dataclass(slots=True)
class LatentEncoder:
    """Frozen autoencoder and, where a condition asks it, CLIP in one precision.

    Args:
        conditions: whose arrays are made.
        text_states: whether the states of captions are made, too, and not only their tokens.
        limit: most images or captions per forward pass; halved for good whenever they do not fit into memory.
        tile: side in pixels of the squares that larger images are encoded in; 0: whole.
    """

    autoencoder: Autoencoder
    clip: TextTower | None
    conditions: Conditions
    device: torch.device
    precision: Precision
    text_states: bool
    seed: int
    limit: int
    tile: int = 0
    known: dict[str, Tensor] = field(default_factory=dict)  # text states of the captions since `forget`
    cuts: Cuts = field(default=Cuts(0))  # captions since `forget` that are longer than the context

    def __call__(self, batch: dict[str, Any]) -> Encoded:
        """Encode items of `ImageDataset.variants`, or of those that a cache has; each caption is encoded once."""
        return self.with_texts(batch, *self.of_images(batch))

    def of_images(self, batch: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Moments and the arrays of other conditions than captions; several threads may ask at a time."""
        if "moments" in batch:
            names, rows = batch["arrays"][0], batch["arrays"]
            return batch["moments"].numpy(), {name: np.stack([row[name] for row in rows]) for name in names}
        pixels = batch["pixels"]  # [B, V, 3, H, W]
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        moments = self.moments(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        made = self.conditions.prepare(self._samples(batch), self)
        return moments.numpy(), {name: array.unflatten(0, pixels.shape[:2]).numpy() for name, array in made.items()}

    def with_texts(self, batch: dict[str, Any], moments: np.ndarray, arrays: dict[str, np.ndarray]) -> Encoded:
        """And with the captions; one batch at a time, in order, as what was encoded before is not encoded again."""
        if not self.conditions.takes_text:
            return Encoded(moments, None, None, arrays)
        captions = [caption for captions in batch["captions"] for caption in captions]
        tokens = self.text_tower.tokenize(captions)
        self.cuts += Cuts.of(self.text_tower, captions, tokens)
        text = self._texts(captions, tokens) if self.text_states else None
        if len(captions) > len(moments):  # several of each image: [B, K, L] and [B, K, L, D]
            tokens = tokens.unflatten(0, (len(moments), -1))
            text = None if text is None else text.unflatten(0, (len(moments), -1))
        return Encoded(moments, tokens.numpy(), None if text is None else text.numpy(), arrays)

    def _samples(self, batch: dict[str, Any]) -> Samples:
        """All variants of a batch as samples of their own."""
        pixels = batch["pixels"]
        variants = range(pixels.shape[1])
        unlabelled = [[Labels()] * len(variants)] * len(pixels)
        return Samples(
            images=in_range(pixels.flatten(0, 1)) if self.conditions.need_images else pixels.flatten(0, 1),
            labels=[labels for row in batch.get("labels", unlabelled) for labels in row],
            framings=torch.tensor(
                [
                    [size[1], size[0], cut.top, cut.left]
                    for size, cuts in zip(batch["size"], batch["cuts"], strict=True)
                    for cut in cuts
                ],
                dtype=torch.float32,
            ),
            generators=[
                rng(self.seed, index, f"conditions of variant {v}") for index in batch["index"] for v in variants
            ],
            keys=[key for key in batch["key"] for _ in variants],
        )

    @property
    def text_tower(self) -> TextTower:
        """CLIP, of conditions that need it."""
        assert self.clip is not None
        return self.clip

    def latents(self, images: Tensor) -> Tensor:
        """Means of the latents [N, C, h, w] of images [N, 3, H, W], on the CPU."""
        return split_moments(self.moments(images))[0]

    def image_embeddings(self, images: Tensor) -> Tensor:
        """CLIP's embeddings [N, E] of images [N, 3, H, W], on the CPU."""
        return self._in_parts(self._embeddings, images)

    def forget(self) -> None:
        """Begin anew, so that what a shard holds does not depend on which shards were encoded before it."""
        self.known.clear()
        self.cuts = Cuts(0)

    def moments(self, images: Tensor) -> Tensor:
        """Moments [N, 2·C, h, w] of images [N, 3, H, W], in [-1, 1] or as pixels, on the CPU."""
        return self._in_parts(self._moments, images)

    def states(self, tokens: Tensor) -> Tensor:
        """Text states [N, L, D] of tokens [N, L], on the CPU."""
        return self._in_parts(self._states, tokens)

    def _texts(self, captions: list[str], tokens: Tensor) -> Tensor:
        rows = {caption: row for row, caption in enumerate(captions) if caption not in self.known}
        if rows:
            self.known.update(zip(rows, self.states(tokens[list(rows.values())]), strict=True))
        return torch.stack([self.known[caption] for caption in captions])

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Tensor:
        network = self.autoencoder
        encode = partial(encode_in_tiles, network.encode, side=self.tile, downscale=network.cfg.downscale)
        with autocast(self.device, self.precision):
            images = images.to(self.device, non_blocking=True)
            return finite_or_fp32(encode, in_range(images) if images.dtype == torch.uint8 else images).cpu()

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.text_tower.text_states(tokens.to(self.device)).float().cpu()

    @torch.no_grad()
    def _embeddings(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return image_embeddings(self.clip, images.to(self.device)).cpu()

    def _in_parts(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([encode(part) for part in inputs.split(self.limit)])
            except torch.OutOfMemoryError:
                if self.limit == 1:
                    raise UserError(
                        "out of memory at one sample: take a larger GPU, lower images.resolution or set tile=512"
                    ) from None
            # Outside the handler, whose traceback keeps the tensors alive that did not fit.
            self.limit = max(1, min(self.limit, len(inputs)) // 2)
            torch.cuda.empty_cache()
