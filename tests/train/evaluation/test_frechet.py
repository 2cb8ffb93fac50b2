"""Fréchet distance: closed forms, torch-fidelity's own function, shards, and honest refusals."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from train.evaluation import frechet
from train.evaluation.frechet import (
    INCEPTION_FILE,
    Extractor,
    FeatureStatistics,
    collect,
    compare,
    efficientnet,
    frechet_distance,
    inception,
    merged,
    sample_size_floor,
)


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    """Statistics that are exactly those of a Gaussian."""
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.mean, statistics.scatter = 2, mean.double(), covariance.double()
    return statistics


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


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
    ours = frechet_distance(statistics_of(a), statistics_of(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_singular_covariances_stay_exact() -> None:
    """With fewer pictures than features a set still has distance 0 from itself, and a shift costs its square."""
    features = correlated(20, 60, 4, offset=100.0)
    itself = statistics_of(features)
    assert frechet_distance(itself, statistics_of(features.flip(0))) < 1e-7 * float(itself.covariance.trace())
    assert frechet_distance(itself, statistics_of(features + 2.0)) == pytest.approx(60 * 4.0, rel=1e-6)


def test_batches_and_merged_ranks_equal_the_whole() -> None:
    """Also far from zero, where sums of squares would lose all digits; an empty rank changes nothing."""
    features = correlated(101, 8, 5) + 1e6
    ranks = [FeatureStatistics(8) for _ in range(4)]
    for index, batch in enumerate(features[:90].split(7)):
        ranks[index % 3].update(batch)
    ranks[0].update(features[90:])
    ranks[0].update(features[:0])
    total = merged(ranks)
    assert total.count == 101
    torch.testing.assert_close(total.mean, features.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.covariance, features.T.cov(), rtol=1e-9, atol=1e-7)
    assert ranks[3].count == 0


def test_non_finite_features_and_single_pictures_are_refused() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.tensor([[1.0, float("nan"), 0.0]]))
    statistics.update(torch.ones(1, 3))
    with pytest.raises(UserError, match="at least 2 pictures"):
        frechet_distance(statistics, statistics)


def test_floor_is_the_distance_of_two_samples_of_one_distribution() -> None:
    reference = statistics_of(correlated(2000, 12, 6))
    observed = frechet_distance(statistics_of(correlated(50, 12, 7)), reference)
    floor = sample_size_floor(reference, 50)
    assert floor == pytest.approx(observed, rel=0.6)
    assert floor == sample_size_floor(reference, 50)
    assert sample_size_floor(reference, 2000) < floor / 10


def test_too_few_pictures_are_said_with_the_size_of_the_bias() -> None:
    extractor = Extractor(metric="fd_test", size=30, weights_sha256="", resize="", network=lambda x: x)
    reference = statistics_of(correlated(400, 30, 8))
    with pytest.warns(UserWarning, match=r"fd_test=.* rests on 20 pictures for 30 features: .* about \d+"):
        few = compare(extractor, statistics_of(correlated(20, 30, 9)), reference)
    enough = compare(extractor, statistics_of(correlated(400, 30, 10)), reference)
    assert set(few) == {"fd_test", "fd_test_floor"}
    assert enough["fd_test"] < few["fd_test"]


def test_fd_efficientnet_orders_damage() -> None:
    """More noise is further away; pictures count as they would be saved, in 8 bits."""
    extractor = efficientnet()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator) * 1.6 - 0.8
    images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    noise = torch.randn(images.shape, generator=generator)
    reference = collect(extractor, images.split(10))
    assert reference.count == 24
    saved = collect(extractor, [images + 1e-4])
    weak, strong = (collect(extractor, [images + amount * noise]) for amount in (0.05, 0.3))
    distances = [frechet_distance(reference, other) for other in (reference, saved, weak, strong)]
    assert distances[0] < 1e-3
    assert distances[1] < 0.1 * distances[2]
    assert distances[2] < distances[3]
    assert len(extractor.weights_sha256) == 64


def test_fid_without_its_weights_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, str(tmp_path / "nowhere.pth")):
        with pytest.raises(UserError, match=INCEPTION_FILE) as error:
            inception(given)
        assert "\n" not in str(error.value)
    (tmp_path / INCEPTION_FILE).write_bytes(b"another network")
    with pytest.raises(UserError, match="is not weights-inception"):
        inception(str(tmp_path / INCEPTION_FILE))
    digest = hashlib.sha256(b"another network").hexdigest()
    monkeypatch.setattr(frechet, "INCEPTION_FILE", f"weights-{digest[:8]}.pth")
    with pytest.raises(UserError, match="is damaged"):
        inception(str(tmp_path / INCEPTION_FILE))


def test_fid_uses_torch_fidelitys_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the place of Inception's, the features are those of torch-fidelity's extractor."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
    torch.manual_seed(0)
    reference = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(frechet, "INCEPTION_FILE", f"weights-{digest[:8]}.pth")
    extractor = inception(str(path))
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(extractor(pixels.float() / 127.5 - 1), reference(pixels)[0])
    assert (extractor.metric, extractor.size, extractor.weights_sha256) == ("fid", 2048, digest)
