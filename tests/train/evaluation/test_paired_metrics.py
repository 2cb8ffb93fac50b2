"""Drawn images against originals: the numbers of `models.losses`, beside those of trivial images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import ConditionsConfig, Perceptual
from conf.schema.conditions import LowResolutionConfig, MaskedConfig
from data.labels import Labels
from models.conditions import Conditions, Samples
from models.losses import distance_inside, perceptual_distance, psnr, psnr_inside, ssim
from train.evaluation.extractors import Extractor
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.frechet import FeatureStatistics, frechet_distance
from train.evaluation.paired_metrics import PairedMetrics, baseline_distances
from train.sampling.run import GeneratedBatch

CPU = torch.device("cpu")
COLOURS = Extractor(
    name="colours",
    size=3,
    weights_sha256="toy",
    resize="none",
    network=lambda pixels: {"colours": pixels.float().mean(dim=(2, 3))},
)


class NoNetworks:
    def latents(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4)

    def image_embeddings(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def drawing(conditions: Conditions, first: int) -> GeneratedBatch:
    """Three images, drawn with a little noise."""
    random = torch.Generator().manual_seed(first)
    originals = F.interpolate(torch.rand(3, 3, 8, 8, generator=random) * 2 - 1, (32, 32), mode="bicubic").clamp(-1, 1)
    generators = [np.random.default_rng(first + row) for row in range(3)]
    inputs = conditions.prepare(Samples(originals, [Labels()] * 3, torch.zeros(3, 4), generators), NoNetworks())
    drawn = originals + 0.1 * torch.randn(originals.shape, generator=random)
    return GeneratedBatch(conditions.finish(drawn, originals, inputs), originals, inputs, [""] * 3)


def compared(
    folder: Path, **sections: Any
) -> tuple[dict[str, float], dict[str, float], list[GeneratedBatch], Conditions]:
    """Metrics and distances of rivals over two chunks."""
    conditions = Conditions(ConditionsConfig(caption=None, **sections))
    comparison = PairedMetrics(conditions, Perceptual.efficientnet, CPU)
    drawings, chunks = [drawing(conditions, first) for first in (0, 3)], FeatureCache(folder, {}, 6, 3)
    for numbers, one in zip(chunks.ranges, drawings, strict=True):
        chunks.write(numbers, comparison.columns(one, [COLOURS]))
    real = FeatureStatistics(3)
    real.update(torch.cat([COLOURS(one.originals)["colours"] for one in drawings]))
    distances = baseline_distances(conditions.baseline_names, COLOURS, chunks, real)  # type: ignore[arg-type]
    return comparison.metrics(chunks), distances, drawings, conditions


def mean(values: list[Tensor]) -> Any:
    return pytest.approx(torch.cat(values).mean().item(), rel=1e-4)


def test_small_images_are_compared_whole(tmp_path: Path) -> None:
    metrics, distances, drawings, conditions = compared(tmp_path, low_resolution=LowResolutionConfig())
    distance = perceptual_distance(Perceptual.efficientnet)
    assert distance is not None
    enlarged = [conditions.baselines(one.originals, one.inputs)["bicubic"] for one in drawings]
    expected = {}
    for name, measure in {"psnr": psnr, "ssim": ssim, "efficientnet": distance}.items():
        expected[f"eval/{name}"] = mean([measure(one.images, one.originals) for one in drawings])
        pairs = zip(enlarged, drawings, strict=True)
        expected[f"eval/bicubic/{name}"] = mean([measure(images, one.originals) for images, one in pairs])
    assert metrics == expected
    theirs, real = FeatureStatistics(3), FeatureStatistics(3)
    theirs.update(torch.cat([COLOURS(images)["colours"] for images in enlarged]))
    real.update(torch.cat([COLOURS(one.originals)["colours"] for one in drawings]))
    assert distances == {"eval/bicubic/fd_colours": pytest.approx(frechet_distance(theirs, real))}


def test_holes_are_compared_inside(tmp_path: Path) -> None:
    metrics, distances, drawings, _ = compared(tmp_path, masked=MaskedConfig())
    measures = {f"{rival}hole/{name}" for rival in ("", "mean_colour/", "nearest_patch/") for name in MEASURES}
    assert metrics.keys() == {f"eval/{name}" for name in measures}
    distance = perceptual_distance(Perceptual.efficientnet)
    assert distance is not None
    inside = [(one.images, one.originals, one.inputs["mask"]) for one in drawings]
    assert metrics["eval/hole/psnr"] == mean([psnr_inside(*one) for one in inside])
    assert metrics["eval/hole/efficientnet"] == mean([distance_inside(distance, *one) for one in inside])
    assert metrics["eval/mean_colour/hole/psnr"] < metrics["eval/hole/psnr"]
    assert distances.keys() == {"eval/mean_colour/fd_colours", "eval/nearest_patch/fd_colours"}


MEASURES = ("psnr", "efficientnet")


def test_nothing_is_compared_without_rivals() -> None:
    from conf.schema.conditions import ClassConfig

    conditions = Conditions(ConditionsConfig(caption=None, class_vector=ClassConfig(classes=2)))
    comparison = PairedMetrics(conditions, Perceptual.lpips, CPU)  # whose weights nobody asks for
    blank = torch.zeros(1, 3, 32, 32)
    assert comparison.facts() == {} == comparison.columns(GeneratedBatch(blank, blank, {}, [""]), [COLOURS])
