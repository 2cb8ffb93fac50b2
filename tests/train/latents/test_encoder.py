"""The encoder: what is not finite is tried again, what does not fit is halved, what came before is not done twice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ConditionsConfig, Precision
from conf.schema.networks import AutoencoderConfig
from data.images import Cut
from models.autoencoder import Autoencoder
from models.conditions import Conditions
from train.latents.encoder import LatentEncoder

CPU = torch.device("cpu")


class Doubling:
    """Doubles images; remembers the sizes of its batches. Values above 100 overflow in low precision."""

    cfg = AutoencoderConfig(block_out_channels=[4, 4, 4], norm_num_groups=4)

    def __init__(self, most: int = 100) -> None:
        self.most, self.sizes = most, list[int]()

    def encode(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        moments = torch.cat([images, images], dim=1)
        return moments.masked_fill(moments > 100, torch.inf) if torch.is_autocast_enabled("cpu") else moments


class StubClip:
    """A state per token; counts the captions that it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text), 0, 1] for text in texts])

    def text_states(self, tokens: Tensor) -> Tensor:
        self.asked += len(tokens)
        return tokens[:, :, None].float()


def made(autoencoder: Any, precision: Precision, **options: Any) -> LatentEncoder:
    conditions = Conditions(ConditionsConfig())
    return LatentEncoder(autoencoder, StubClip(), conditions, CPU, precision, seed=0, **options)  # type: ignore[arg-type]


def encoder(precision: Precision = Precision.fp32, limit: int = 8, most: int = 100) -> Any:
    return made(Doubling(most), precision, text_states=True, limit=limit)


def batch(images: Tensor, captions: list[str] | None = None) -> dict[str, Any]:
    count = len(images)
    return {
        "pixels": images[:, None] if images.ndim == 4 else images,
        "captions": [[caption] for caption in captions or ["x"] * count],
        "size": [(4, 4)] * count,
        "cuts": [[Cut(0, 0, 4, 4)] * (images.shape[1] if images.ndim == 5 else 1)] * count,
        "index": list(range(count)),
        "key": [f"{number}" for number in range(count)],
    }


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_what_overflows_in_low_precision_is_encoded_again_in_fp32(precision: Precision) -> None:
    images = torch.zeros(5, 3, 4, 4)
    images[2], images[4] = 200, torch.nan
    encode = encoder(precision)
    encoded = encode(batch(images))
    assert encode.autoencoder.sizes == [5, 2]
    assert [encoded.sound(row) for row in range(5)] == [True, True, True, True, False]
    assert encoded.moments.shape == (5, 1, 6, 4, 4) and (encoded.moments[2] == 200).all()


def test_a_real_autoencoder_that_overflows_in_fp16_gives_the_moments_of_fp32() -> None:
    """As that of Stable Diffusion XL: too large within, sound at the end."""
    torch.manual_seed(0)
    cfg = AutoencoderConfig(block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4)
    network, images = Autoencoder(cfg).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        network.encoder.conv_in.weight.mul_(1e6)  # the norms after it divide by as much
        expected = network.encode(images)
        with torch.autocast("cpu", torch.float16):
            assert not network.encode(images).isfinite().all()
    encode = made(network, Precision.fp16, text_states=False, limit=8)
    torch.testing.assert_close(encode.moments(images), expected)


def test_larger_images_are_encoded_in_tiles() -> None:
    encode, images = encoder(), torch.rand(2, 3, 32, 16)
    encode.tile = 16
    encode.moments(images)
    assert encode.autoencoder.sizes == [1] * 6


def test_memory_that_does_not_suffice_halves_the_batch_for_good() -> None:
    images, encode = torch.arange(8.0).reshape(8, 1, 1, 1), encoder(limit=8, most=3)
    for _ in range(2):
        assert encode(batch(images)).moments[:, 0, 0, 0, 0].tolist() == list(range(8))
    assert encode.limit == 2 and encode.autoencoder.sizes == [8, 4, *[2] * 8]


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(UserError, match="out of memory at one sample"):
        encoder(most=0)(batch(torch.zeros(2, 1, 1, 1)))


def test_a_caption_is_encoded_once_until_it_is_forgotten() -> None:
    encode, images = encoder(), torch.zeros(4, 1, 1, 1)
    first = encode(batch(images, ["a", "bb", "a", "ccc"]))
    second = encode(batch(images, ["ccc", "a", "dddd", "bb"]))
    assert encode.clip.asked == 4
    assert first.text is not None and second.text is not None
    assert first.text[:, 0, 0].tolist() == [1, 2, 1, 3] and second.text[:, 0, 0].tolist() == [3, 1, 4, 2]
    encode.forget()
    encode(batch(images, ["a"] * 4))
    assert encode.clip.asked == 5


def test_variants_of_a_image_stay_together() -> None:
    images = torch.arange(6.0).reshape(2, 3, 1, 1, 1)  # [B, V, 3, H, W]
    encoded = encoder(limit=4)(batch(images, ["a", "b"]))
    assert encoded.moments[:, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
