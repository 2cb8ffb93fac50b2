"""Metrics of features: torch-fidelity's values on the same features, closed forms, intervals that hold, refusals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from train.evaluation import metrics
from train.evaluation.frechet import FeatureStatistics, covariance_root, frechet_distance
from train.evaluation.metrics import (
    clip_score,
    frechet_interval,
    inception_score,
    kernel_distance,
    nearest_share,
    precision_recall,
)

SIZE = 24


def skewed(count: int, seed: int, scale: float = 1.0, size: int = SIZE) -> Tensor:
    """Features like a network's: correlated, none below 0, many of them 0; float32 [count, size]."""
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.3, -1, size)
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return (scale * drawn @ mixing / math.sqrt(size)).relu()


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


GENERATED, REFERENCE = skewed(1300, 2, 1.2), skewed(1150, 3)


def test_kernel_distance_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_subsets": 2, "kid_subset_size": 1000, "verbose": False}
    theirs = kid_features_to_metric(GENERATED.double(), REFERENCE.double(), **options)
    mean, std = kernel_distance(GENERATED, REFERENCE, subsets=2)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_kernel_distance_of_few_images_uses_all_of_them() -> None:
    """By the definition: means of k over pairs of different vectors of a set, less twice that over pairs across."""
    x, y = skewed(7, 4).double(), skewed(7, 5, 2.0).double()

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / SIZE + 1) ** 3

    within = [k(s[i], s[j]) for s in (x, y) for i in range(7) for j in range(7) if i != j]
    across = [k(a, b) for a in x for b in y]
    mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(sum(within) / 42 - 2 * sum(across) / 49, rel=1e-12)
    assert std < 1e-12
    assert kernel_distance(skewed(300, 6), skewed(200, 7), subsets=3)[0] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("splits", [10, 7])
def test_inception_score_equals_torch_fidelity(splits: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(203, 50, generator=torch.Generator().manual_seed(8))
    theirs = isc_features_to_metric(logits, splits=splits)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_of_sure_and_even_classes_is_their_number() -> None:
    """Also where a class has probability 0 in floating point."""
    logits = torch.eye(5).repeat(40, 1) * 1e4
    assert inception_score(logits, splits=1)[0] == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5))[0] == pytest.approx(1)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_equal_torch_fidelity(neighbours: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, reference = GENERATED[:700].double(), REFERENCE[:500].double()
    options = {"prc_neighborhood": neighbours, "prc_batch_size": 300, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(generated, reference, **options)
    precision, recall = precision_recall(generated, reference, neighbours)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0.1 < precision < 0.9 and 0.1 < recall < 0.98


def test_blocks_change_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = precision_recall(GENERATED[:90], REFERENCE[:70])
    for block in (2, 33):
        monkeypatch.setattr(metrics, "BLOCK", block)
        assert precision_recall(GENERATED[:90], REFERENCE[:70]) == whole


def test_equal_distances_lie_within_the_ball() -> None:
    """A copy is on the manifold of its original even where four copies leave the ball no room, far from zero too."""
    generated = (GENERATED[:20] + 100.0).repeat_interleave(4, dim=0)
    assert precision_recall(generated, generated.flip(0)) == (1.0, 1.0)
    corners = torch.tensor([[0.1, 0.1], [0.1, 0.4], [0.4, 0.1], [0.4, 0.4]])  # the second neighbour is 0.3 away
    outside = torch.tensor([[-0.2, 0.1], [0.1, -0.2], [5.0, 5.0]])  # 0.3 away from the first corner, and far away
    assert precision_recall(outside, corners, 2)[0] == pytest.approx(2 / 3)


def test_share_of_the_nearest_counts_each_image_by_the_set_that_its_nearest_one_is_of() -> None:
    reference, others = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    generated = torch.tensor([[1.0, 1.0], [3.0, 0.0], [8.0, 3.0], [2.0, 0.0]])  # the last is as near to both
    assert nearest_share(generated, reference, others) == 0.5
    assert nearest_share(others, reference, others) == 0 and nearest_share(reference, reference, others) == 1
    assert nearest_share(REFERENCE[:1100], REFERENCE, GENERATED) == 1


def test_clip_score_is_the_mean_cosine_without_negative_ones() -> None:
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-4.0, 0.0]])
    texts = torch.tensor([[7.0, 0.0], [5.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx((1 + 0 + math.sqrt(0.5) + 0) / 4)


def test_frechet_distance_equals_torch_fidelity_on_skewed_features() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sides = [fid_features_to_statistics(features.double()) for features in (GENERATED, REFERENCE)]
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(statistics_of(GENERATED), statistics_of(REFERENCE)) == pytest.approx(theirs, rel=1e-9)


def test_samples_of_two_gaussians_come_to_the_closed_form() -> None:
    """N(0, s1^2) against N(m, s2^2), each dimension alone: |m|^2 + sum (s1 - s2)^2; the error falls as 1/sqrt(N)."""
    m, s1, s2 = torch.tensor([1.0, 0, -2]), torch.tensor([1.0, 2, 0.5]), torch.tensor([2.0, 2, 0.1])
    exact = float(m.square().sum() + (s1 - s2).square().sum())
    generator = torch.Generator().manual_seed(0)
    for count in (1_000, 100_000):
        x, y = (torch.randn(count, 3, generator=generator) for _ in range(2))
        distance = frechet_distance(statistics_of(x * s1), statistics_of(y * s2 + m))
        assert distance == pytest.approx(exact, abs=15 / math.sqrt(count))


def distances_and_intervals(count: int, size: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Fréchet distances [runs] of fresh samples to one reference, and their intervals [runs, 2]."""
    reference = statistics_of(skewed(2000, 0, size=size))
    root = covariance_root(reference.covariance)
    samples = [skewed(count, 100 + run, 1.2, size) for run in range(runs)]
    distances = [frechet_distance(statistics_of(features), reference) for features in samples]
    return np.array(distances), np.array([frechet_interval(x, reference.mean, root) for x in samples])


@pytest.mark.parametrize(("count", "size"), [(200, 12), (40, 120)], ids=["more vectors than features", "fewer"])
def test_interval_covers_what_other_seeds_give(count: int, size: int) -> None:
    """95 % of the intervals should hold the mean over seeds, and be about as wide as 3.9 deviations over seeds."""
    distances, intervals = distances_and_intervals(count, size, runs=40)
    covered = (intervals[:, 0] <= distances.mean()) & (distances.mean() <= intervals[:, 1])
    assert covered.mean() >= 0.85
    width = (intervals[:, 1] - intervals[:, 0]).mean()
    assert 0.75 < width / (3.92 * distances.std()) < 1.4


def test_interval_shrinks_with_the_root_of_the_images() -> None:
    widths = [np.diff(distances_and_intervals(count, 12, runs=8)[1]).mean() for count in (200, 3200)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


def test_interval_is_the_same_for_a_seed_a_type_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = statistics_of(REFERENCE)
    against: tuple[Any, ...] = (reference.mean, covariance_root(reference.covariance))
    whole = frechet_interval(GENERATED[:101], *against)
    few = frechet_interval(GENERATED[:30], *against)
    assert frechet_interval(GENERATED[:101], *against, seed=1) != whole
    assert whole[0] < frechet_distance(statistics_of(GENERATED[:101]), reference) < whole[1]
    monkeypatch.setattr(metrics, "BLOCK", 16)
    assert frechet_interval(GENERATED[:101].double(), *against) == pytest.approx(whole, rel=1e-9)
    assert frechet_interval(GENERATED[:30], *against) == pytest.approx(few, rel=1e-6)  # singular: roots of 1e-16


def test_root_of_a_singular_covariance_has_its_rank() -> None:
    covariance = statistics_of(skewed(5, 0)).covariance
    root = covariance_root(covariance)
    assert root.shape == (SIZE, 4)
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-9, atol=1e-12)


METRICS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "a kernel distance": (lambda x: kernel_distance(x, x, 2), 2),
    "an Inception Score of 10 splits": (inception_score, 10),
    "precision and recall with 3 neighbours": (lambda x: precision_recall(x, x), 4),
    "a CLIP score": (lambda x: clip_score(x, x), 1),
    "the interval of a Fréchet distance": (lambda x: frechet_interval(x, torch.zeros(SIZE), torch.eye(SIZE), 3), 4),
}


@pytest.mark.parametrize("name", METRICS)
def test_too_few_or_broken_features_are_one_line(name: str) -> None:
    metric, fewest = METRICS[name]
    features = skewed(fewest, 9)
    metric(features)
    for wrong, message in (
        (features[1:], f"^{name} needs at least {fewest} images.*, not {fewest - 1}: raise samples$"),
        (features.index_fill(1, torch.tensor([5]), math.nan), "^features of an image are not finite: .* NaN"),
        (features.index_fill(1, torch.tensor([5]), math.inf), "^features of an image are not finite: .* NaN"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            metric(wrong)
        assert "\n" not in str(refused.value)
