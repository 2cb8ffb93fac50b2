"""Large images in tiles: exact where a network sees no further than the overlap, and without seams elsewhere."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema.networks import AutoencoderConfig
from models.autoencoder import Autoencoder
from models.tiles import decode_in_tiles, encode_in_tiles

CONFIG = AutoencoderConfig(block_out_channels=[16, 16, 32], layers_per_block=1, norm_num_groups=4)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 104), (120, 88), (40, 200)])
def test_what_each_pixel_makes_alone_is_put_together_exactly(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    encoded = encode_in_tiles(lambda x: F.avg_pool2d(x, 8), images, side=32, downscale=8)
    torch.testing.assert_close(encoded, F.avg_pool2d(images, 8))
    decoded = decode_in_tiles(lambda z: F.interpolate(z, scale_factor=8.0), encoded, side=32, downscale=8)
    torch.testing.assert_close(decoded, F.interpolate(encoded, scale_factor=8.0))


def test_no_tile_is_larger_than_asked_for_and_images_come_alone() -> None:
    seen = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return F.interpolate(x, scale_factor=8.0)

    decode_in_tiles(network, torch.zeros(3, 4, 20, 9), side=64, downscale=8)
    assert set(seen) == {(1, 4, 8, 8)}
    assert len(seen) == 3 * 3 * 2


def test_small_images_pass_whole() -> None:
    network = Autoencoder(CONFIG).eval()
    z = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(decode_in_tiles(network.decode, z, 32, 4), network.decode(z), rtol=0, atol=1e-5)


def test_a_drift_between_tiles_fades_over_their_overlap() -> None:
    """A network that looks at all that it is given, as a group norm does: whole squares differ, no step is a seam."""

    def network(z: Tensor) -> Tensor:
        return F.interpolate(z - z.mean(), scale_factor=8.0)

    z = torch.linspace(0, 1, 48).expand(1, 1, 16, 48)
    tiled = decode_in_tiles(network, z, side=128, downscale=8)
    cut = torch.cat([network(part) for part in z.split(16, dim=3)], dim=3)
    drift = 16 / 48  # between the means of plain squares
    assert cut.diff(dim=3).abs().max() > 0.9 * drift
    assert tiled.diff(dim=3).abs().max() < 1.1 / 48 + drift / (8 * 16 // 4)  # a step of z, and of a fade over 32 pixels


def test_tiles_of_an_autoencoder_come_nearer_to_the_whole_than_plain_cuts() -> None:
    torch.manual_seed(0)
    network, z = Autoencoder(CONFIG).eval(), torch.randn(1, 4, 32, 48)
    with torch.no_grad():
        whole = network.decode(z)
        tiled = decode_in_tiles(network.decode, z, side=64, downscale=4)
        cut = torch.cat([network.decode(part) for part in z.split(16, dim=3)], dim=3)
    assert (tiled - whole).abs().mean() < 0.8 * (cut - whole).abs().mean()
