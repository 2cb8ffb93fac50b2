"""Images against the originals that conditions were made of: how close the drawn ones come, and trivial ones."""

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
from train.sampling.run import Drawing

Measure = Callable[[Tensor, Tensor], Tensor]  # images and originals [B, 3, H, W] to numbers [B]


class PairedMetrics:
    """PSNR, SSIM and a perceptual distance; inside the hole alone, without SSIM, where a condition leaves one.

    There is something to compare only where a condition has rivals: trivial images that a network must beat.

    Args:
        conditions: of the network that draws.
        perceptual: which distance.
        device: where it is computed.
    """

    def __init__(self, conditions: Conditions, perceptual: Perceptual, device: torch.device) -> None:
        self.conditions, self.rivals = conditions, conditions.baseline_names
        self.kind, self.distance = perceptual, None
        if self.rivals and (distance := perceptual_distance(perceptual)) is not None:
            self.distance = distance.to(device)

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on, in plain values."""
        return {"rivals": list(self.rivals), "perceptual": self.kind.value} if self.rivals else {}

    @torch.no_grad()
    def columns(self, drawing: Drawing, extractors: Sequence[Extractor]) -> dict[str, Tensor]:
        """Of B drawn images and of those of all rivals, [B]; of the latter features, too."""
        if not self.rivals:
            return {}
        originals = drawing.originals.to(drawing.images)
        columns: dict[str, Tensor] = {}
        measures = self._measures(drawing, originals)
        for rival, images in self._images(drawing):
            columns |= {f"{rival}compared/{n}": measure(images, originals).cpu() for n, measure in measures.items()}
            if rival:
                features = (extractor(images) for extractor in extractors)
                columns |= {f"{rival}{name}": column for found in features for name, column in found.items()}
        return columns

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        """Means over the images: `eval/psnr` … and `eval/RIVAL/psnr` …; `…/hole/psnr` … inside the hole."""
        found = {}
        for name in measured.names("compared/"):
            rival, measure = name.split("compared/")
            found[f"eval/{rival}{measure}"] = measured.whole(name).mean().item()
        return found

    def _images(self, drawing: Drawing) -> Iterator[tuple[str, Tensor]]:
        yield "", drawing.images
        for rival, images in self.conditions.baselines(drawing.originals, drawing.inputs).items():
            yield f"{rival}/", images.to(drawing.images)

    def _measures(self, drawing: Drawing, originals: Tensor) -> dict[str, Measure]:
        hole = self.conditions.region(drawing.inputs)
        if hole is None:
            found: dict[str, Measure] = {"psnr": psnr, "ssim": ssim}
            return found if self.distance is None else {**found, self.kind.value: self.distance}
        masks = hole.to(originals.device)
        found = {"hole/psnr": partial(psnr_inside, masks=masks)}
        if self.distance is not None:
            found[f"hole/{self.kind.value}"] = partial(distance_inside, self.distance, masks=masks)
        return found


def rival_distances(
    rivals: Sequence[str], extractor: Extractor, measured: FeatureCache, reference: Reference
) -> dict[str, float]:
    """The Fréchet distance of each rival's images, for comparison with that of the drawn ones."""
    found = {}
    for rival in rivals:
        batches = (features for (features,) in measured.columns(f"{rival}/{extractor.name}"))
        statistics = statistics_of(batches, extractor.size)
        found[f"eval/{rival}/{extractor.metric}"] = frechet_distance(statistics, reference)
    return found
