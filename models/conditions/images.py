"""Conditions that are made of an image itself: small, with a hole, or as CLIP sees it.

Each kind is a pair: the arrays first, then what embeds them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema.choices import Degradation, MaskStyle
from models.conditions.base import Condition, FrozenNetworks, Inputs, Samples, Wanted
from models.conditions.embedder import (
    WAVES,
    ConditionContext,
    Conditioning,
    ConditionRng,
    Embedder,
    tokens_width,
    waves,
)
from models.degradation import BSR, BSR_LIGHT, bicubic, degrade, shrink_tensor
from models.masks import MEDIUM, THICK, THIN, mean_colour, nearest_patch, paste_back, random_mask
from models.unet import VectorEmbedding

LEVELS = 1000  # of noise on a low-resolution image
GREY = torch.tensor(128, dtype=torch.uint8)
STRENGTHS = {Degradation.bsr_light: BSR_LIGHT, Degradation.bsr: BSR}
STYLES = {MaskStyle.thin: THIN, MaskStyle.medium: MEDIUM, MaskStyle.thick: THICK}


# -------------------- as CLIP sees it ---------------------------------------------------------------------------------


class ImageEmbedding(Condition):
    """CLIP's embedding of an image, in place of a text: image variation."""

    needs_image, baseline_names = True, ("another",)

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        found, width = frozen.image_embeddings(samples.images), self.cfg.width
        if found.shape[1] != width:
            raise UserError(f"conditions.image_embedding.width={width}: that CLIP's has {found.shape[1]}")
        return {"image_embedding": F.normalize(found, dim=1) * width**0.5}  # entries of variance 1

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        return {"another": originals.roll(1, 0)}  # another one of its batch, not what is asked for

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return originals


class ImageToken(Embedder):
    """An image's embedding as one token."""

    tokens = 1

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.to_token = nn.Linear(cfg.width, tokens_width("image_embedding", context))

    def null(self, inputs: Inputs) -> Inputs:
        return {"image_embedding": torch.zeros_like(inputs["image_embedding"])}

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=self.to_token(inputs["image_embedding"])[:, None])


# -------------------- small -------------------------------------------------------------------------------------------


class LowResolution(Condition):
    """The image made small, or a small one that is to be enlarged."""

    needs_image, baseline_names = True, ("bicubic",)

    def facts(self) -> dict[str, Any]:
        return {"factor": self.cfg.factor, "degradation": self.cfg.degradation.value}

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        images, cfg = samples.images, self.cfg
        if samples.already_small:
            low = images
        elif cfg.degradation is Degradation.bicubic:
            low = shrink_tensor(images, cfg.factor)
        else:
            low = degrade(images, cfg.factor, STRENGTHS[cfg.degradation], samples.generators)
        # bytes, as a user's own file has them: else the network would learn from finer shades than it will ever see
        return {"low": ((low.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)}

    def wanted(self, inputs: Inputs) -> Wanted:
        return {"low_level": None, "low_noise": tuple(inputs["low"].shape[1:])} if self.cfg.noise_levels else {}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        if not self.cfg.back_projection:
            return images
        missing = _pixels(inputs["low"]).to(images) - shrink_tensor(images, self.cfg.factor)
        return (images + bicubic(missing, self.cfg.factor)).clamp(-1, 1)

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        return {"bicubic": bicubic(_pixels(inputs["low"]), self.cfg.factor)}

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return _pixels(inputs["low"])


class LowResolutionChannels(Embedder):
    """A small image, enlarged to the latent's size where it has another; with noise on it (Ho et al. 2022, 4.2)."""

    channels = 3

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.scale = cfg.factor / context.downscale
        self.level = VectorEmbedding(WAVES, context.embedding) if cfg.noise_levels else None

    def null(self, inputs: Inputs) -> Inputs:
        low = inputs["low"]  # bytes, or floats once noise is on them
        return {"low": torch.full_like(low, float(_pixels(GREY)) if low.is_floating_point() else int(GREY))}

    def vary(self, inputs: Inputs, draws: ConditionRng) -> Inputs:
        if self.level is None:
            return {}
        levels = (draws.uniform("low_level") * self.cfg.noise_levels).floor()  # [B]
        low = _pixels(inputs["low"])
        angle = (levels * (math.pi / 2 / LEVELS)).view(-1, 1, 1, 1)
        return {"low": angle.cos() * low + angle.sin() * draws.normal("low_noise", low.shape[1:]), "level": levels}

    def forward(self, inputs: Inputs) -> Conditioning:
        low = _pixels(inputs["low"])
        if self.scale != 1:
            low = F.interpolate(low, scale_factor=self.scale, mode="bilinear", antialias=self.scale < 1)
        if self.level is None:
            return Conditioning(channels=low)
        levels = inputs.get("level", torch.full((len(low),), float(self.cfg.sampling_level), device=low.device))
        return Conditioning(channels=low, vector=self.level(waves(levels)))


# -------------------- with a hole -------------------------------------------------------------------------------------


class Masked(Condition):
    """A mask, and the latent of the image with a grey hole."""

    needs_image, needs_mask, baseline_names = True, True, ("mean_colour", "nearest_patch")

    def facts(self) -> dict[str, Any]:
        return {"style": self.cfg.style.value}

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        masks, (height, width) = samples.masks, samples.images.shape[2:]
        if masks is None:
            style = STYLES[self.cfg.style]
            masks = torch.stack([random_mask(height, width, random, style) for random in samples.generators])
        return {"mask": masks, "masked": frozen.latents(samples.images * ~masks[:, None]).half()}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        return paste_back(images, originals.to(images), inputs["mask"].to(images.device))

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        masks = inputs["mask"].to(originals.device)
        return {"mean_colour": mean_colour(originals, masks), "nearest_patch": nearest_patch(originals, masks)}

    def region(self, inputs: Inputs) -> Tensor:
        return inputs["mask"]

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return originals * ~inputs["mask"].to(originals.device)[:, None]


class MaskedChannels(Embedder):
    """Mask and masked latent, in the order of Stable Diffusion's inpainting network."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.channels = 1 + len(context.latent_mean)
        self.register_buffer("mean", context.latent_mean.view(1, -1, 1, 1).clone(), persistent=False)
        self.register_buffer("std", context.latent_std.view(1, -1, 1, 1).clone(), persistent=False)

    def null(self, inputs: Inputs) -> Inputs:
        masked = self.mean.to(inputs["masked"]).expand_as(inputs["masked"])  # zero once it is normalised
        return {"mask": torch.ones_like(inputs["mask"]), "masked": masked}

    def forward(self, inputs: Inputs) -> Conditioning:
        masked = (inputs["masked"].float() - self.mean) / self.std
        mask = F.interpolate(inputs["mask"][:, None].float(), masked.shape[2:])  # the nearest pixel of each
        return Conditioning(channels=torch.cat([mask, masked], dim=1))


def _pixels(low: Tensor) -> Tensor:
    """Bytes as float in [-1, 1]; floats stay: training has put noise on them."""
    return low if low.is_floating_point() else low.float() / 127.5 - 1


KINDS: Mapping[str, tuple[type[Condition], type[Embedder]]] = {
    "image_embedding": (ImageEmbedding, ImageToken),
    "low_resolution": (LowResolution, LowResolutionChannels),
    "masked": (Masked, MaskedChannels),
}
