"""Low-resolution images: bicubic against Pillow, the chain of damages against closed forms, and what it promises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.degradation import BSR, BSR_LIGHT, Strength, _filtered, bicubic, degrade, shrink_tensor
from models.losses import psnr

CLEAN = Strength(blurs=1, blur=0.25, noise=(0, 0), quality=(95, 95))


def random_images(count: int, height: int = 64, width: int = 64) -> Tensor:
    """Flat shapes with hard edges."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").mul(3).round().div(3).clamp(-0.9, 0.9)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, index)) for index in range(count)]


def resized_by_pillow(images: Tensor, width: int, height: int) -> Tensor:
    channels = [Image.fromarray(channel.numpy()) for channel in images.flatten(0, 1)]
    resized = [np.array(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).view(*images.shape[:2], height, width).clamp(-1, 1)


def test_bicubic_equals_pillow_in_both_directions() -> None:
    images = random_images(2, 64, 96)
    low = shrink_tensor(images, 4)
    torch.testing.assert_close(low, resized_by_pillow(images, 24, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(bicubic(low, 4), resized_by_pillow(low, 96, 64), rtol=0, atol=1e-5)


def test_bicubic_stays_within_what_a_image_holds() -> None:
    checkered = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).mul(2.0).sub(1).expand(1, 3, 16, 16)
    assert bicubic(checkered, 4).abs().max() == 1
    assert shrink_tensor(bicubic(checkered, 4), 4).abs().max() <= 1


@pytest.mark.parametrize("strength", [BSR, BSR_LIGHT])
@pytest.mark.parametrize(
    ("factor", "height", "width"), [(4, 64, 96), (4, 20, 12), (2, 64, 64), (3, 48, 60), (8, 64, 64)]
)
def test_every_order_ends_at_the_exact_size_within_the_range(
    strength: Strength, factor: int, height: int, width: int
) -> None:
    low = degrade(random_images(16, height, width), factor, strength, generators(16))
    assert low.shape == (16, 3, height // factor, width // factor)
    assert low.abs().max() <= 1


def test_chance_is_the_generators_alone_and_each_image_has_its_own() -> None:
    images = random_images(3)
    together = degrade(images, 4, BSR, generators(3))
    alone = [
        degrade(image, 4, BSR, [generator]) for image, generator in zip(images.split(1), generators(3), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    same = images[:1].expand(8, -1, -1, -1)
    assert len({tuple(low.flatten().tolist()) for low in degrade(same, 4, BSR, generators(8))}) == 8
    assert not torch.equal(together, degrade(images, 4, BSR, generators(3, seed=1)))


def test_one_generator_short_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        degrade(random_images(2), 4, BSR, generators(1))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_no_order_moves_the_image(factor: int) -> None:
    """The middle of a disc stays where it is; decimation without a shifted kernel would move it by (f-1)/2."""
    side = 24 * factor
    line = torch.arange(side) + 0.5 - side / 2
    disc = (line[:, None] ** 2 + line**2 < (side / 4) ** 2).float() * 1.8 - 0.9
    low = degrade(disc.expand(40, 3, side, side), factor, CLEAN, generators(40))
    weight = low.mean(dim=1) + 0.9  # [B, h, w]
    axis = (torch.arange(24) + 0.5 - 12).view(1, -1, 1)
    for offsets in (axis, axis.transpose(1, 2)):
        middle = (weight * offsets).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))
        assert middle.abs().max() < 0.25  # of a low pixel
        assert middle.mean().abs() < 0.02


def test_a_blur_has_the_covariance_and_the_middle_asked_for() -> None:
    covariance = np.array([[3.0, 1.2], [1.2, 2.0]])
    impulse = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    impulse[..., 20, 20] = 1
    blurred = _filtered(impulse, covariance, shift=1.5)[0, 0].numpy()
    assert blurred.sum() == pytest.approx(1)
    offsets = np.stack(np.meshgrid(*[np.arange(41) - 20] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    middle = blurred.reshape(-1) @ offsets
    np.testing.assert_allclose(middle, [-1.5, -1.5], atol=0.01)  # a pixel now shows what lay right and below of it
    spread = (offsets - middle).T @ ((offsets - middle) * blurred.reshape(-1, 1))
    np.testing.assert_allclose(spread, covariance, rtol=0.05)


def test_noise_is_as_strong_as_asked_for_and_grey_or_coloured() -> None:
    grey = torch.zeros(40, 3, 64, 64)
    low = degrade(grey, 4, Strength(blurs=0, blur=0.0, noise=(20, 20), quality=(100, 100)), generators(40))
    deviations = low.flatten(1).std(dim=1) * 127.5
    assert deviations.max() < 25
    assert deviations.max() > 15
    colour = (low - low.mean(dim=1, keepdim=True)).flatten(1).std(dim=1) * 127.5
    assert 8 < (colour < 1.5).sum() < 32


def test_the_chains_lose_what_their_strength_says() -> None:
    images = random_images(32)
    ways = (
        shrink_tensor(images, 4),
        degrade(images, 4, BSR_LIGHT, generators(32)),
        degrade(images, 4, BSR, generators(32)),
    )
    clean, light, full = (psnr(bicubic(low, 4), images).mean() for low in ways)
    assert clean > light + 1
    assert light > full + 1
    assert full > 10  # dB: still the same image
