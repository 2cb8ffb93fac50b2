"""The two frozen networks as one encoder: images and captions to moments, tokens and text states."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Precision
from models.autoencoder import AnyAutoencoder, finite
from models.text import TextTower
from models.tiles import encode_in_tiles
from train.engine.precision import autocast


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the networks made of B samples with V squares each."""

    moments: np.ndarray  # [B, V, 2·C, h, w] float32
    tokens: np.ndarray  # [B, L] int64
    text: np.ndarray | None  # [B, L, D] float32

    def sound(self, row: int) -> bool:
        """Whether all values of a sample are finite."""
        return bool(np.isfinite(self.moments[row]).all()) and (
            self.text is None or bool(np.isfinite(self.text[row]).all())
        )


@dataclass(slots=True)
class Encoder:
    """Frozen autoencoder and text tower in one precision.

    Args:
        limit: most images or captions per forward pass; halved for good whenever they do not fit into memory.
        tile: side in pixels of the squares that larger pictures are encoded in; 0: whole.
    """

    autoencoder: AnyAutoencoder
    clip: TextTower
    device: torch.device
    precision: Precision
    text_states: bool
    limit: int
    tile: int = 0
    known: dict[str, Tensor] = field(default_factory=dict)  # text states of the captions since `forget`

    def __call__(self, batch: dict[str, Any]) -> Encoded:
        """Encode "image" [B, V, 3, H, W] in [-1, 1] and "caption"; a caption that came before is not encoded again."""
        images = batch["image"]
        moments = self.moments(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        tokens = self.clip.tokenize(batch["caption"])
        text = self._texts(batch["caption"], tokens).numpy() if self.text_states else None
        return Encoded(moments.numpy(), tokens.numpy(), text)

    def forget(self) -> None:
        """Begin anew, so that what a shard holds does not depend on which shards were encoded before it."""
        self.known.clear()

    def moments(self, images: Tensor) -> Tensor:
        """Moments [N, 2·C, h, w] of images [N, 3, H, W], on the CPU."""
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
            return finite(encode, images.to(self.device)).cpu()

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.clip.text_states(tokens.to(self.device)).float().cpu()

    def _in_parts(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([encode(part) for part in inputs.split(self.limit)])
            except torch.OutOfMemoryError:
                if self.limit == 1:
                    raise UserError(
                        "out of memory at one sample: take a larger GPU, lower images.resolution or set tile=512"
                    ) from None
            self.limit = max(1, min(self.limit, len(inputs)) // 2)
            torch.cuda.empty_cache()
