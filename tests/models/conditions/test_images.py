"""Small images and holes: what the network sees of them, noise on them, and what is done to a drawn image."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from conf.schema import ConditionsConfig, Degradation
from conf.schema.conditions import LowResolutionConfig, MaskedConfig
from data.labels import Labels
from models.conditions import ConditionContext, Conditions, Embedders, Samples
from models.degradation import bicubic, shrink_tensor

SIDE, DOWNSCALE = 32, 4
MEAN, STD = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([2.0, 0.5, 1.0])


class MeanAutoencoder:
    """An autoencoder whose latents are the means of squares."""

    def latents(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, DOWNSCALE)

    def image_embeddings(self, images: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class SameRng:
    """The same number for all samples, and known noise."""

    number: float

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((3,), self.number)

    def normal(self, purpose: str, shape: Any) -> Tensor:
        return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))


def images(side: int = SIDE) -> Tensor:
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def samples(images: Tensor, masks: Tensor | None = None, already_small: bool = False) -> Samples:
    generators = [np.random.default_rng(row) for row in range(len(images))]
    return Samples(images, [Labels()] * len(images), torch.zeros(len(images), 4), generators, masks, already_small)


def conditions(**sections: Any) -> Embedders:
    torch.manual_seed(0)
    context = ConditionContext(None, 8, DOWNSCALE, MEAN, STD)
    return Embedders(Conditions(ConditionsConfig(caption=None, **sections)), context)


def low_resolution(**options: Any) -> Embedders:
    return conditions(low_resolution=LowResolutionConfig(**options))


def test_small_image_stands_beside_the_latent() -> None:
    told = low_resolution()
    inputs = told.source.prepare(samples(images()), MeanAutoencoder())
    channels = told(inputs).channels
    assert told.channels == 3 and channels is not None and channels.shape == (3, 3, SIDE // 4, SIDE // 4)
    torch.testing.assert_close(channels, shrink_tensor(images(), 4), atol=1 / 255, rtol=0)
    assert torch.equal(told.source.baselines(images(), inputs)["bicubic"], bicubic(channels, 4))
    nothing = low_resolution(drop=0.5)
    assert nothing(nothing.null(inputs)).channels.abs().max() < 0.01  # grey
    other = low_resolution(factor=8)(low_resolution(factor=8).source.prepare(samples(images()), MeanAutoencoder()))
    assert other.channels.shape == channels.shape  # enlarged to the latent's size


def test_given_image_is_the_small_one() -> None:
    told = low_resolution(degradation=Degradation.bsr)
    given = images(8)
    torch.testing.assert_close(
        told(told.source.prepare(samples(given, already_small=True), MeanAutoencoder())).channels,
        given,
        atol=1 / 255,
        rtol=0,
    )


def test_noise_on_the_small_image_keeps_its_variance_and_its_level_is_told() -> None:
    """Ho et al. 2022, section 4.2: the signal's and the noise's squared weights add up to one."""
    told = low_resolution(noise_levels=400, sampling_level=120)
    inputs = told.source.prepare(samples(images()), MeanAutoencoder())
    varied = told.vary(inputs, SameRng(0.5))
    low, noise = inputs["low"].float() / 127.5 - 1, SameRng(0.5).normal("", (3, 8, 8))
    angle = torch.tensor(0.5 * 400 / 1000 * torch.pi / 2)
    torch.testing.assert_close(varied["low"], angle.cos() * low + angle.sin() * noise)
    assert varied["level"].tolist() == [200.0] * 3
    same = told.vary(inputs, SameRng(120.5 / 400))  # in sampling, level 120 is told and nothing added
    assert torch.equal(told(inputs).vector, told({**inputs, "level": same["level"]}).vector)
    assert not torch.allclose(told(inputs).vector, told(varied).vector)
    assert low_resolution()(inputs).vector is None


def test_dropped_small_image_is_grey_with_noise_levels_too() -> None:
    told = low_resolution(noise_levels=400, drop=0.5)
    inputs = told.source.prepare(samples(images()), MeanAutoencoder())
    dropped = told(told.vary(inputs, SameRng(0.1))).channels
    assert torch.equal(dropped, told(told.null(inputs)).channels)  # as guidance will show it


def test_back_projected_image_becomes_the_given_one_when_made_small() -> None:
    told = low_resolution(back_projection=True)
    inputs, drawn = told.source.prepare(samples(images()), MeanAutoencoder()), (images() + 0.1).clamp(-1, 1)
    low = inputs["low"].float() / 127.5 - 1
    finished = told.source.finish(drawn, images(), inputs)
    before, after = ((shrink_tensor(made, 4) - low).abs().mean() for made in (drawn, finished))
    assert after < 0.1 * before
    assert (finished - images()).abs().mean() < 0.1 * (drawn - images()).abs().mean()
    assert torch.equal(low_resolution().source.finish(drawn, images(), inputs), drawn)
    with pytest.raises(
        UserError, match=r"^conditions\.low_resolution\.back_projection: .* set degradation=bicubic or "
    ):
        LowResolutionConfig(back_projection=True, degradation=Degradation.bsr)


def test_hole_is_told_as_diffusers_tells_it() -> None:
    """`StableDiffusionInpaintPipeline`: the nearest pixel of the mask, then the normalised latent of a grey hole."""
    from diffusers import StableDiffusionInpaintPipeline

    told = conditions(masked=MaskedConfig())
    inputs = told.source.prepare(samples(images()), MeanAutoencoder())
    mask = inputs["mask"][:, None].float()
    theirs = SimpleNamespace(
        vae_scale_factor=DOWNSCALE,
        _encode_vae_image=lambda image, generator: (
            (F.avg_pool2d(image, DOWNSCALE) - MEAN.view(1, -1, 1, 1)) / STD.view(1, -1, 1, 1)
        ),
    )
    small, masked = StableDiffusionInpaintPipeline.prepare_mask_latents(
        theirs, mask, images() * (mask < 0.5), 3, SIDE, SIDE, torch.float32, torch.device("cpu"), None, False
    )
    channels = told(inputs).channels
    assert told.channels == 4 and channels is not None
    torch.testing.assert_close(channels, torch.cat([small, masked], dim=1), atol=2e-3, rtol=0)  # kept in fp16


def test_masks_belong_to_samples_or_are_given() -> None:
    told = conditions(masked=MaskedConfig())
    first, again = (told.source.prepare(samples(images()), MeanAutoencoder())["mask"] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])
    given = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    given[:, 4:12, 8:20] = True
    assert torch.equal(told.source.prepare(samples(images(), given), MeanAutoencoder())["mask"], given)


def test_null_of_a_masked_image_is_a_hole_everywhere() -> None:
    told = conditions(masked=MaskedConfig(drop=0.5))
    nothing = told(told.null(told.source.prepare(samples(images()), MeanAutoencoder()))).channels
    assert nothing is not None and (nothing[:, 0] == 1).all() and nothing[:, 1:].abs().max() < 1e-3


def test_known_pixels_stay_and_the_hole_is_painted() -> None:
    told = conditions(masked=MaskedConfig())
    inputs = told.source.prepare(samples(images()), MeanAutoencoder())
    hole = inputs["mask"][:, None].expand(-1, 3, -1, -1)
    finished = told.source.finish(torch.full_like(images(), 0.9), images(), inputs)
    assert torch.equal(finished[~hole], images()[~hole]) and (finished[hole] == 0.9).all()
    assert told.source.region(inputs) is inputs["mask"]
    (shown,) = told.source.show(images(), inputs)
    assert (shown[hole] == 0).all()


@pytest.mark.parametrize("sections", [{"masked": MaskedConfig()}, {"low_resolution": LowResolutionConfig()}])
def test_baselines_are_named_before_they_are_made(sections: Any) -> None:
    told = conditions(**sections)
    made = told.source.baselines(images(), told.source.prepare(samples(images()), MeanAutoencoder()))
    assert tuple(made) == told.source.baseline_names
    assert all(one.shape == images().shape for one in made.values())
