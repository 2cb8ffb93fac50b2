"""Perceptual distances, PSNR and SSIM against lpips and scikit-image."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from conf.schema import Perceptual
from models.losses import (
    VGG_FILE,
    EfficientNetDistance,
    LpipsDistance,
    distance_inside,
    perceptual_distance,
    psnr,
    psnr_inside,
    ssim,
)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Smooth images and a disturbed copy."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    references = F.interpolate(coarse, (48, 64), mode="bicubic").clamp(-1, 1)
    noise = 0.1 * torch.randn(references.shape, generator=generator)
    return (references + noise).clamp(-1, 1), references


def test_psnr_equals_scikit_image_per_image(pair: tuple[Tensor, Tensor]) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    expected = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=2) for a, b in zip(*pair, strict=True)]
    torch.testing.assert_close(psnr(*pair).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)


def test_psnr_ignores_what_a_saved_image_cannot_hold() -> None:
    white = torch.ones(1, 3, 4, 4)
    assert torch.isfinite(psnr(white, white)).all()
    assert torch.equal(psnr(1.5 * white, white), psnr(white, white))


def test_ssim_equals_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    from skimage.metrics import structural_similarity

    for value, a, b in zip(ssim(*pair), *pair, strict=True):
        expected = structural_similarity(
            a.numpy().astype("float64"),
            b.numpy().astype("float64"),
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(UserError, match="11 pixels"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_lpips_equals_the_package_with_the_same_backbone(
    pair: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with arguments of an older release
        reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = {f"features.{name.split('.', 1)[1]}": value for name, value in reference.net.state_dict().items()}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "hub" / "checkpoints" / VGG_FILE)
    distance = LpipsDistance().train()
    assert not any(module.training for module in distance.modules())
    with torch.no_grad():
        expected = reference(*pair).flatten()
        torch.testing.assert_close(distance(*pair), expected, rtol=1e-5, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_missing_or_damaged_vgg_is_one_line_with_file_place_and_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as missing:
        perceptual_distance(Perceptual.lpips)
    for part in (VGG_FILE, str(tmp_path / "hub" / "checkpoints"), "loss.perceptual=efficientnet"):
        assert part in str(missing.value)
    assert "\n" not in str(missing.value)
    for content in (b"", b"not a state dict", b"PK\x03\x04 cut off"):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.pth"):
            perceptual_distance(Perceptual.lpips, str(tmp_path / "broken.pth"))


def test_efficientnet_distance_orders_what_people_see() -> None:
    """Of disturbances with the same mean squared error, blur and noise count far more than a shift of brightness."""
    generator = torch.Generator().manual_seed(0)
    coarse = (torch.rand(8, 3, 16, 16, generator=generator) * 1.6 - 0.8).round(decimals=0)
    references = F.interpolate(coarse, 64, mode="nearest")
    blurred = F.avg_pool2d(F.pad(references, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    size = (blurred - references).square().mean().sqrt()
    noisy = references + size * torch.randn(references.shape, generator=generator)
    distance = EfficientNetDistance()
    with torch.no_grad():
        blur, noise, brightness = (distance(x, references).mean() for x in (blurred, noisy, references + size))
        assert distance(references, references).abs().max() < 1e-6
    assert blur > 3 * brightness
    assert noise > 3 * brightness


def test_efficientnet_distance_leads_back_to_the_reference(pair: tuple[Tensor, Tensor]) -> None:
    distance = EfficientNetDistance()
    images, references = pair[0].clone().requires_grad_(), pair[1]
    value = distance(images, references)
    assert value.shape == (3,)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    with torch.no_grad():
        after = distance(images - 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1), references)
    assert (after < value).all()
    assert perceptual_distance(Perceptual.none) is None


@pytest.fixture(scope="module")
def holes() -> Tensor:
    """A box in each image of `pair`."""
    masks = torch.zeros(3, 48, 64, dtype=torch.bool)
    masks[0, 8:24, 8:24] = masks[1, 16:48, 0:48] = masks[2, 0:8, 40:64] = True
    return masks


def test_psnr_inside_is_that_of_the_box_cut_out(pair: tuple[Tensor, Tensor], holes: Tensor) -> None:
    images, references = pair
    boxes = [(slice(8, 24), slice(8, 24)), (slice(16, 48), slice(0, 48)), (slice(0, 8), slice(40, 64))]
    expected = [psnr(images[i : i + 1, :, *box], references[i : i + 1, :, *box]) for i, box in enumerate(boxes)]
    torch.testing.assert_close(psnr_inside(images, references, holes), torch.cat(expected))


def test_distance_inside_sees_the_hole_alone(pair: tuple[Tensor, Tensor], holes: Tensor) -> None:
    images, references = pair
    distance = EfficientNetDistance()
    outside_alone = torch.where(holes[:, None], references, images)
    assert distance_inside(distance, outside_alone, references, holes).abs().max() < 1e-6
    inside_alone = torch.where(holes[:, None], images, references)
    both = distance_inside(distance, images, references, holes)
    torch.testing.assert_close(distance_inside(distance, inside_alone, references, holes), both)
    everywhere = torch.ones_like(holes)
    torch.testing.assert_close(distance_inside(distance, *pair, everywhere), distance(*pair))


def test_distance_inside_hardly_depends_on_the_size_of_the_hole() -> None:
    generator = torch.Generator().manual_seed(0)
    references = 0.3 * torch.randn(1, 3, 128, 128, generator=generator).expand(2, -1, -1, -1)
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 40:72, 40:72] = masks[1, 8:120, 8:120] = True  # 12 times the area
    noisy = references + 0.3 * torch.randn(references.shape, generator=generator)
    small, large = distance_inside(EfficientNetDistance(), noisy, references, masks)
    assert 0.67 < small / large < 1.5
