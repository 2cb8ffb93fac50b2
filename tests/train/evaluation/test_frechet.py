"""Fréchet distance: closed forms, torch-fidelity's own function, batches, and honest refusals."""

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from train.evaluation import frechet
from train.evaluation.frechet import FeatureStatistics, frechet_distance, sample_size_floor, statistics_of


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    """Statistics that are exactly those of a Gaussian."""
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.mean, statistics.scatter = 2, mean.double(), covariance.double()
    return statistics


def whole(features: Tensor) -> FeatureStatistics:
    return statistics_of([features], features.shape[1])


def correlated(count: int, size: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + offset


def test_equals_closed_form_of_commuting_gaussians() -> None:
    """Diagonal covariances in a common rotated basis: |dm|^2 + sum (s1 - s2)^2 of the deviations."""
    rotation = torch.linalg.qr(correlated(6, 6, 0)).Q
    s1, s2 = torch.tensor([1.0, 2, 3, 0, 5, 0.1]).double(), torch.tensor([2.0, 2, 1, 4, 0, 1e-6]).double()
    m1, m2 = torch.zeros(6).double(), torch.arange(6).double()
    first = gaussian(m1, rotation @ torch.diag(s1**2) @ rotation.T)
    second = gaussian(m2, rotation @ torch.diag(s2**2) @ rotation.T)
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)


def test_equals_torch_fidelity_on_the_same_features() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(300, 40, 2), 1.3 * correlated(200, 40, 3, offset=0.5)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    ours = frechet_distance(whole(a), whole(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_singular_covariances_stay_exact() -> None:
    """With fewer images than features a set still has distance 0 from itself, and a shift costs its square."""
    features = correlated(20, 60, 4, offset=100.0)
    itself = whole(features)
    assert frechet_distance(itself, whole(features.flip(0))) < 1e-7 * float(itself.covariance.trace())
    assert frechet_distance(itself, whole(features + 2.0)) == pytest.approx(60 * 4.0, rel=1e-6)


def test_batches_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also far from zero, where sums of squares would lose all digits; an empty batch changes nothing."""
    features = correlated(101, 8, 5) + 1e6
    monkeypatch.setattr(frechet, "ROWS", 20)
    total = statistics_of([features[:0], *features.split(7)], 8)
    assert total.count == 101
    torch.testing.assert_close(total.mean, features.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.covariance, features.T.cov(), rtol=1e-9, atol=1e-7)


def test_non_finite_features_and_single_images_are_refused() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(UserError, match="not finite"):
        statistics.update(torch.tensor([[1.0, float("nan"), 0.0]]))
    statistics.update(torch.ones(1, 3))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(statistics, statistics)


def test_floor_is_the_distance_of_two_samples_of_one_distribution() -> None:
    reference = whole(correlated(2000, 12, 6))
    observed = frechet_distance(whole(correlated(50, 12, 7)), reference)
    floor = sample_size_floor(reference, 2000, 50)
    assert floor == pytest.approx(observed, rel=0.6)
    assert floor == sample_size_floor(reference, 2000, 50)
    assert sample_size_floor(reference, 2000, 2000) < floor / 10
