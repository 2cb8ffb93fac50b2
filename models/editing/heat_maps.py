"""What each word looks at: attention maps of words, per layer and step, and their sum over the image.

Tang et al. 2023, "What the DAAM": the maps of all layers, made as large as the image, and of all steps, added up.
Shapes: R images, W words of the one that has most, L tokens of the text, N = h·w tokens of the image in a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError

TELLING = "up_blocks"  # layers whose maps say where things are; those of the way down hardly do (docs/editing.md)


class WordMaps:
    """Collects the attention that words get, averaged over heads, for R images.

    Args:
        words: of each image, with the tokens of each word.
        length: L.
        detailed: keep the map of every layer and step, not their sum alone.
    """

    def __init__(
        self, words: Sequence[dict[str, list[int]]], length: int, device: torch.device, detailed: bool
    ) -> None:
        self.words, self.detailed = words, detailed
        tokens = torch.zeros(len(words), length, max(map(len, words)))
        for row, own in enumerate(words):
            for column, places in enumerate(own.values()):
                tokens[row, places, column] = 1.0
        self.tokens = tokens.to(device)  # [R, L, W], which tokens each word has
        self.maps: dict[tuple[int, str], list[Tensor]] = {}  # [R, W, h, w] by step and layer, one of each call
        self.total: Tensor | None = None  # [R, W, h, w], of telling layers, as large as the latent

    def wants(self, layer: str) -> bool:
        """Whether the map of a layer is to be added."""
        return self.detailed or layer.startswith(TELLING)

    def add(self, step: int, layer: str, probabilities: Tensor, size: tuple[int, int]) -> None:
        """Take the attention [R, heads, N, W] of a layer, of a latent of this size."""
        scale = (size[0] * size[1] / probabilities.shape[2]) ** 0.5
        maps = probabilities.float().mean(1).transpose(1, 2).unflatten(2, (round(size[0] / scale), -1))  # [R, W, h, w]
        if self.detailed:
            self.maps.setdefault((step, layer), []).append(maps)
        if layer.startswith(TELLING):
            # summed at once: a map of each call would hold steps x layers latents for the length of the sampling
            large = F.interpolate(maps, size, mode="bilinear")
            self.total = large if self.total is None else self.total + large

    def of(self, row: int, word: str, size: Sequence[int], layers: str = TELLING, steps: Sequence[int] = ()) -> Tensor:
        """The map of a word [*size], mean over calls: of layers whose names begin so, and of all steps or some."""
        column = list(self.words[row]).index(word)
        chosen: dict[torch.Size, list[Tensor]] = {}  # by their size, so that those of one are made larger in one go
        for (step, layer), calls in self.maps.items():
            if layer.startswith(layers) and (not steps or step in steps):
                for maps in calls:
                    chosen.setdefault(maps.shape[2:], []).append(maps[row, column])
        large = [F.interpolate(torch.stack(maps)[:, None], tuple(size), mode="bicubic") for maps in chosen.values()]
        return torch.cat(large)[:, 0].clamp(min=0).mean(0)

    def region(self, row: int, words: Sequence[str], threshold: float) -> Tensor:
        """Region of words, bool [h, w] of the latent: beyond this share of the way from least to most attention."""
        if self.total is None:
            raise UserError(f"blend={','.join(words)}: this network has no attention to words in its {TELLING}")
        columns = [list(self.words[row]).index(word) for word in words]
        found = self.total[row, columns].sum(0)
        found = found - found.min()
        return found > threshold * found.max()
