"""Masks: shapes against closed forms, coverage; fills against references and with a hole that nobody may look into."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.masks import (
    COVERAGE,
    MEDIUM,
    THICK,
    THIN,
    Strokes,
    _add_segment,
    mean_colour,
    nearest_patch,
    nearest_pixel,
    paste_back,
    random_mask,
)

FILLS = [mean_colour, nearest_pixel, nearest_patch]


def masks(count: int, height: int, width: int, bounds: Strokes) -> Tensor:
    return torch.stack([random_mask(height, width, np.random.default_rng(index), bounds) for index in range(count)])


def random_images(count: int, height: int = 48, width: int = 64) -> Tensor:
    coarse = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def test_a_segment_is_a_rectangle_with_two_half_discs() -> None:
    mask = np.zeros((300, 300), dtype=bool)
    _add_segment(mask, np.array([60.0, 80.0]), np.array([180.0, 240.0]), radius=30.0)  # 200 px long
    assert mask.sum() == pytest.approx(200 * 60 + np.pi * 30**2, rel=0.005)
    assert mask[120, 160]
    assert not mask[60 - 31, 80]
    corner = np.zeros((300, 300), dtype=bool)
    _add_segment(corner, np.array([0.0, 0.0]), np.array([0.0, 0.0]), radius=30.0)
    assert corner.sum() == pytest.approx(np.pi * 30**2 / 4, rel=0.02)


@pytest.mark.parametrize("bounds", [THIN, MEDIUM, THICK])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (96, 160), (512, 512)])
def test_coverage_is_bounded_at_every_size(bounds: Strokes, height: int, width: int) -> None:
    drawn = masks(10, height, width, bounds)
    assert drawn.shape == (10, height, width)
    assert drawn.dtype == torch.bool
    coverage = drawn.float().mean(dim=(1, 2))
    assert coverage.min() >= COVERAGE[0]
    assert coverage.max() <= COVERAGE[1]
    assert coverage.std() > 0.05


@pytest.mark.parametrize("bounds", [THIN, MEDIUM, THICK])
def test_one_generator_gives_one_mask_and_the_same_shapes_at_twice_the_size(bounds: Strokes) -> None:
    small, large = masks(12, 64, 64, bounds), masks(12, 128, 128, bounds)
    assert torch.equal(small, masks(12, 64, 64, bounds))
    assert len({tuple(mask.flatten().tolist()) for mask in small}) == 12
    shrunk = F.avg_pool2d(large.float(), 2) > 0.5
    agree = (small & shrunk).sum(dim=(1, 2)) / (small | shrunk).sum(dim=(1, 2))
    assert agree.median() > 0.9


def test_thick_strokes_are_thicker() -> None:
    def eroded(bounds: Strokes) -> float:
        """Share of the holes that lies more than 4 pixels inside."""
        drawn = masks(20, 128, 128, bounds).float()[:, None]
        return float((-F.max_pool2d(-drawn, 9, stride=1)).sum() / drawn.sum())

    assert eroded(THIN) < 0.1
    assert 0.2 < eroded(MEDIUM) < eroded(THICK) - 0.1


def test_some_thick_masks_are_boxes() -> None:
    boxes = [mask for mask in masks(40, 64, 64, THICK) if mask[mask.any(dim=1)][:, mask.any(dim=0)].all()]
    assert 1 <= len(boxes) <= 10  # those of a single box; a stroke has round ends


def test_paste_back_keeps_the_very_pixels_outside() -> None:
    originals, painted, hole = random_images(4), torch.randn(4, 3, 48, 64), masks(4, 48, 64, THICK)
    pasted = paste_back(painted, originals, hole)
    outside = ~hole[:, None].expand_as(pasted)
    assert torch.equal(pasted[outside], originals[outside])
    assert torch.equal(pasted[~outside], painted[~outside])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("bounds", [THIN, THICK])
def test_a_fill_keeps_what_is_known_and_never_looks_into_the_hole(
    fill: Callable[[Tensor, Tensor], Tensor], bounds: Strokes
) -> None:
    images, hole = random_images(4), masks(4, 48, 64, bounds)
    filled = fill(images.masked_fill(hole[:, None], float("nan")), hole)
    assert torch.isfinite(filled).all()
    assert torch.equal(paste_back(filled, images, hole), filled)
    assert filled.abs().max() <= 1
    alone = torch.cat([fill(*pair) for pair in zip(images.split(1), hole.split(1), strict=True)])
    torch.testing.assert_close(alone, filled, rtol=0, atol=1e-6)


def test_mean_colour_is_the_mean_of_each_images_known_pixels() -> None:
    images, hole = random_images(3), masks(3, 48, 64, MEDIUM)
    for filled, image, mask in zip(mean_colour(images, hole), images, hole, strict=True):
        expected = image[:, ~mask].mean(dim=1, keepdim=True)
        torch.testing.assert_close(filled[:, mask], expected.expand(-1, int(mask.sum())))


def test_nearest_pixel_is_as_near_as_scipy_says() -> None:
    from scipy.ndimage import distance_transform_edt

    hole = masks(4, 48, 64, THICK)
    hole[0, :, :40] = True  # whole columns without a known pixel
    places = torch.stack(torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij"))  # row, column
    sources = nearest_pixel(places.expand(4, 2, 48, 64), hole)
    distances = (sources - places).square().sum(dim=1).sqrt()
    expected = np.stack([distance_transform_edt(mask) for mask in hole.numpy()])
    np.testing.assert_allclose(distances.numpy(), expected, atol=1e-5)


def test_nearest_patch_continues_a_pattern() -> None:
    stripes = ((torch.arange(48)[:, None] + torch.arange(64)) % 6 < 3).float().mul(1.6).sub(0.8).expand(1, 3, 48, 64)
    hole = torch.zeros(1, 48, 64, dtype=torch.bool)
    hole[:, 12:34, 16:40] = True
    torch.testing.assert_close(nearest_patch(stripes, hole, patch=7), stripes)
    assert not torch.equal(nearest_pixel(stripes, hole), stripes)


def test_nearest_patch_shrinks_its_patches_where_none_is_known() -> None:
    images, hole = random_images(1), torch.ones(1, 48, 64, dtype=torch.bool)
    hole[:, ::6], hole[:, :, ::6] = False, False  # squares of 5 pixels in a grid of known lines
    filled = nearest_patch(images, hole, patch=7)
    assert torch.equal(paste_back(filled, images, hole), filled)
    assert (filled - images).abs().mean() < 0.1


def test_nearest_patch_reaches_the_end_of_a_long_hole() -> None:
    """Confidence falls with every patch; where it reached zero, nothing would ever count as filled."""
    grey, hole = torch.zeros(1, 3, 9, 600), torch.zeros(1, 9, 600, dtype=torch.bool)
    hole[:, :, 9:] = True
    assert torch.equal(nearest_patch(grey, hole, patch=3), grey)
