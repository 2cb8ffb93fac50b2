"""What each word looks at: attention maps of words, per layer and step, and their sum over the picture.

Tang et al. 2023, "What the DAAM": the maps of all layers, made as large as the picture, and of all steps, added up.
Shapes: R pictures, W words of the one that has most, M tokens attended to, N = h·w tokens of the picture in a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 32 * 32  # N above which a layer is left out


class WordMaps:
    """Collects the attention that words get, averaged over heads, for R pictures.

    Args:
        words: of each picture, with the tokens of each word.
    """

    def __init__(self, words: Sequence[dict[str, list[int]]], device: torch.device, largest: int = LARGEST) -> None:
        self.words, self.largest, self.device = words, largest, device
        self.maps: dict[tuple[int, str], list[Tensor]] = {}  # [R, W, h, w] by step and layer, one of each call
        self.total: Tensor | None = None  # [R, W, h, w], of all of them as large as the latent

    def columns(self, length: int) -> Tensor:
        """Which of M tokens each word has, [R, M, W]."""
        tokens = torch.zeros(len(self.words), length, max(map(len, self.words)))
        for row, own in enumerate(self.words):
            for column, places in enumerate(own.values()):
                tokens[row, places, column] = 1.0
        return tokens.to(self.device)

    def add(self, step: int, layer: str, probabilities: Tensor, size: tuple[int, int]) -> None:
        """Take the attention [R, heads, N, W] of a layer, of a latent of this size."""
        scale = (size[0] * size[1] / probabilities.shape[2]) ** 0.5
        maps = probabilities.float().mean(1).transpose(1, 2).unflatten(2, (round(size[0] / scale), -1))  # [R, W, h, w]
        self.maps.setdefault((step, layer), []).append(maps)
        large = F.interpolate(maps, size, mode="bilinear")
        self.total = large if self.total is None else self.total + large

    def of(
        self, row: int, word: str, size: Sequence[int], layers: Sequence[str] = (), steps: Sequence[int] = ()
    ) -> Tensor:
        """The map of a word [*size]: mean over calls; only of some layers and steps, if they are given."""
        column = list(self.words[row]).index(word)
        chosen = [
            F.interpolate(maps[row, column][None, None], tuple(size), mode="bicubic")[0, 0].clamp(min=0)
            for (step, layer), calls in self.maps.items()
            for maps in calls
            if (not layers or layer in layers) and (not steps or step in steps)
        ]
        return torch.stack(chosen).mean(0)

    def region(self, row: int, words: Sequence[str], threshold: float) -> Tensor:
        """Where words are, bool [h, w] of the latent: what they got so far is this share of the largest, or nearly.

        As in the paper's code, a pixel counts as soon as one beside it does.
        """
        assert self.total is not None
        columns = [list(self.words[row]).index(word) for word in words]
        found = F.max_pool2d(self.total[row, columns].sum(0)[None], 3, stride=1, padding=1)[0]
        return found >= threshold * found.max() if found.max() > 0 else torch.zeros_like(found, dtype=torch.bool)
