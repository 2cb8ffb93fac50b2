"""Images against the originals that conditions were made of: how close the generated ones come, and trivial ones."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conf.schema import Perceptual
from models.conditions import Conditions
from models.losses import distance_inside, perceptual_distance, psnr, psnr_inside, ssim
from train.evaluation.extractors import Extractor
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.frechet import frechet_distance, statistics_of
from train.evaluation.reference import Reference
from train.sampling.run import GeneratedBatch

Measure = Callable[[Tensor, Tensor], Tensor]  # images and originals [B, 3, H, W] to numbers [B]


class PairedMetrics:
    """PSNR, SSIM and a perceptual distance; inside the hole alone, without SSIM, where a condition leaves one.

    There is something to compare only where a condition has baselines: trivial images that a network must beat.

    Args:
        conditions: of the network that draws.
        perceptual: which distance.
        device: where it is computed.
    """

    def __init__(self, conditions: Conditions, perceptual: Perceptual, device: torch.device) -> None:
        self.conditions, self.baselines = conditions, conditions.baseline_names
        self.kind, self.distance = perceptual, None
        if self.baselines and (distance := perceptual_distance(perceptual)) is not None:
            self.distance = distance.to(device)

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on, in plain values."""
        return {"rivals": list(self.baselines), "perceptual": self.kind.value} if self.baselines else {}

    @torch.no_grad()
    def columns(self, generated: GeneratedBatch, extractors: Sequence[Extractor]) -> dict[str, Tensor]:
        """Columns [B] of B generated images and of those of all baselines; of the latter features, too."""
        if not self.baselines:
            return {}
        originals = generated.originals.to(generated.images)
        columns: dict[str, Tensor] = {}
        measures = self._measures(generated, originals)
        for baseline, images in self._images(generated):
            columns |= {f"{baseline}compared/{n}": measure(images, originals).cpu() for n, measure in measures.items()}
            if baseline:
                features = (extractor(images) for extractor in extractors)
                columns |= {f"{baseline}{name}": column for found in features for name, column in found.items()}
        return columns

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        """Means over the images: `eval/psnr` … and `eval/RIVAL/psnr` …; `…/hole/psnr` … inside the hole."""
        found = {}
        for name in measured.names("compared/"):
            baseline, measure = name.split("compared/")
            found[f"eval/{baseline}{measure}"] = measured.whole(name).mean().item()
        return found

    def _images(self, generated: GeneratedBatch) -> Iterator[tuple[str, Tensor]]:
        yield "", generated.images
        for baseline, images in self.conditions.baselines(generated.originals, generated.inputs).items():
            yield f"{baseline}/", images.to(generated.images)

    def _measures(self, generated: GeneratedBatch, originals: Tensor) -> dict[str, Measure]:
        hole = self.conditions.region(generated.inputs)
        if hole is None:
            found: dict[str, Measure] = {"psnr": psnr, "ssim": ssim}
            return found if self.distance is None else {**found, self.kind.value: self.distance}
        masks = hole.to(originals.device)
        found = {"hole/psnr": partial(psnr_inside, masks=masks)}
        if self.distance is not None:
            found[f"hole/{self.kind.value}"] = partial(distance_inside, self.distance, masks=masks)
        return found


def baseline_distances(
    baselines: Sequence[str], extractor: Extractor, measured: FeatureCache, reference: Reference
) -> dict[str, float]:
    """The Fréchet distance of each baseline's images, for comparison with that of the generated ones."""
    found = {}
    for baseline in baselines:
        batches = (features for (features,) in measured.columns(f"{baseline}/{extractor.name}"))
        statistics = statistics_of(batches, extractor.size)
        found[f"eval/{baseline}/{extractor.metric}"] = frechet_distance(statistics, reference)
    return found
