"""Extractors: their features are those of the published networks, and a wrong file is refused."""

import hashlib
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from train.evaluation import extractors
from train.evaluation.extractors import INCEPTION_FILE, efficientnet, inception
from train.evaluation.frechet import FeatureStatistics, frechet_distance, statistics_of


def test_fd_efficientnet_orders_damage() -> None:
    """More noise is further away; images count as they would be saved, in 8 bits."""
    extractor = efficientnet()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator) * 1.6 - 0.8
    images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    noise = torch.randn(images.shape, generator=generator)

    def statistics(images: torch.Tensor) -> FeatureStatistics:
        return statistics_of([extractor(images)["efficientnet"]], extractor.size)

    reference = statistics(images)
    saved = statistics(images + 1e-4)
    weak, strong = (statistics(images + amount * noise) for amount in (0.05, 0.3))
    distances = [frechet_distance(reference, other) for other in (reference, saved, weak, strong)]
    assert distances[0] < 1e-3
    assert distances[1] < 0.1 * distances[2]
    assert distances[2] < distances[3]
    assert len(extractor.weights_sha256) == 64


def test_fid_without_its_weights_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"^inception=.*nowhere.pth: no such file; put {INCEPTION_FILE} .* there"):
        inception(str(tmp_path / "nowhere.pth"))
    (tmp_path / INCEPTION_FILE).write_bytes(b"another network")
    with pytest.raises(UserError, match="is not weights-inception"):
        inception(str(tmp_path / INCEPTION_FILE))
    digest = hashlib.sha256(b"another network").hexdigest()
    monkeypatch.setattr(extractors, "INCEPTION_FILE", f"weights-{digest[:8]}.pth")
    with pytest.raises(UserError, match="is damaged"):
        inception(str(tmp_path / INCEPTION_FILE))


def test_fid_uses_torch_fidelitys_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the place of Inception's, the features are those of torch-fidelity's extractor."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
    torch.manual_seed(0)
    reference = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "INCEPTION_FILE", f"weights-{digest[:8]}.pth")
    extractor = inception(str(path))
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    columns = extractor(pixels.float() / 127.5 - 1)
    features, logits = reference(pixels)
    assert torch.equal(columns["inception"], features)
    assert torch.equal(columns["inception_logits"], logits)
    assert (extractor.metric, extractor.size, extractor.weights_sha256) == ("fid", 2048, digest)
