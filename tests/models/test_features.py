"""EfficientNet-Lite0 features against the package's own network."""

import builtins

import pytest
import torch

from conf.errors import UserError
from models.features import BLOCK_CHANNELS, DESCRIPTOR_SIZE, EfficientNetFeatures, weights_file, weights_sha256


@pytest.fixture(scope="module")
def features() -> EfficientNetFeatures:
    return EfficientNetFeatures()


def test_folded_network_equals_the_original(features: EfficientNetFeatures) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(weights_file(), weights_only=True))
    original.eval()
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = original._swish(original._bn0(original._conv_stem((images * 127.5 + 127.5 - 127) / 128)))
    expected = []
    with torch.no_grad():
        for block in original._blocks:
            x = block(x)
            expected.append(x)
        outputs = features(images, range(16))
    for output, reference, channels in zip(outputs, expected, BLOCK_CHANNELS, strict=True):
        assert output.shape[1] == channels
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)


def test_weights_know_imagenet() -> None:
    """A wrong preprocessing or damaged file would not pass: the published file, by its name's digest."""
    assert weights_sha256().startswith(weights_file().stem.rsplit("-", 1)[1])


def test_descriptor_is_976_numbers_at_every_size_and_sees_colour(features: EfficientNetFeatures) -> None:
    images = torch.zeros(2, 3, 64, 64)
    images[1, 0] = 0.5
    small = features.descriptor(images)
    assert small.shape == (2, DESCRIPTOR_SIZE) == (2, 976)
    assert features.descriptor(images.repeat(1, 1, 3, 3)).shape == (2, 976)
    assert (small[0, :16] - small[1, :16]).abs().max() > 0.1


def test_training_mode_changes_nothing(features: EfficientNetFeatures) -> None:
    images = torch.rand(1, 3, 64, 64)
    before = features(images, (4,))[0]
    assert torch.equal(before, features.train()(images, (4,))[0])
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_it(name: str, *args: object) -> object:
        if name == "efficientnet_lite_pytorch":
            raise ImportError(name)
        return real_import(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_it)
    with pytest.raises(UserError, match=r"pip install 'latentline\[demo\]'"):
        EfficientNetFeatures()
