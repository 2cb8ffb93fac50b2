"""Conditions that are made of an image itself: small, with a hole, or as CLIP sees it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema.choices import Degradation, MaskStyle
from models.conditions.base import (
    WAVES,
    Condition,
    ConditionContext,
    Conditioning,
    ConditionRng,
    Frozen,
    Inputs,
    Samples,
    tokens_width,
    waves,
)
from models.degradation import BSR, BSR_LIGHT, bicubic, degrade, shrink_tensor
from models.masks import MEDIUM, THICK, THIN, mean_colour, nearest_patch, paste_back, random_mask
from models.unet import VectorEmbedding

LEVELS = 1000  # of noise on a low-resolution image
STRENGTHS = {Degradation.bsr_light: BSR_LIGHT, Degradation.bsr: BSR}
STYLES = {MaskStyle.thin: THIN, MaskStyle.medium: MEDIUM, MaskStyle.thick: THICK}


class ImageEmbedding(Condition):
    """What CLIP sees in an image, in place of a text: image variation."""

    needs_image, tokens, rivals = True, 1, ("another",)

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.width = cfg.width
        self.to_token = nn.Linear(cfg.width, tokens_width("image_embedding", around))

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        found = frozen.image_embeddings(samples.images)
        if found.shape[1] != self.width:
            raise UserError(f"conditions.image_embedding.width={self.width}: that CLIP's has {found.shape[1]}")
        return {"image_embedding": F.normalize(found, dim=1) * self.width**0.5}

    def null(self, inputs: Inputs) -> Inputs:
        return {"image_embedding": torch.zeros_like(inputs["image_embedding"])}

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        return {"another": originals.roll(1, 0)}  # another one of its batch, not what is asked for

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return originals

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=self.to_token(inputs["image_embedding"])[:, None])


class LowResolution(Condition):
    """A small image, enlarged to the latent's size where it has another; with noise on it (Ho et al. 2022, 4.2)."""

    needs_image, channels, rivals = True, 3, ("bicubic",)

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.cfg, self.scale = cfg, cfg.factor / around.downscale
        self.level = VectorEmbedding(WAVES, around.embedding) if cfg.noise_levels else None

    def facts(self) -> dict[str, Any]:
        return {"factor": self.cfg.factor, "degradation": self.cfg.degradation.value}

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        images, cfg = samples.images, self.cfg
        if samples.as_given:
            low = images
        elif cfg.degradation is Degradation.bicubic:
            low = shrink_tensor(images, cfg.factor)
        else:
            low = degrade(images, cfg.factor, STRENGTHS[cfg.degradation], samples.generators)
        return {"low": ((low.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)}

    def null(self, inputs: Inputs) -> Inputs:
        return {"low": torch.full_like(inputs["low"], 128)}

    def vary(self, inputs: Inputs, draws: ConditionRng) -> Inputs:
        if self.level is None:
            return {}
        levels = (draws.uniform("low_level") * self.cfg.noise_levels).floor()  # [B]
        low = _pixels(inputs["low"])
        angle = (levels * (math.pi / 2 / LEVELS)).view(-1, 1, 1, 1)
        return {"low": angle.cos() * low + angle.sin() * draws.normal("low_noise", low.shape[1:]), "level": levels}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        if not self.cfg.back_projection:
            return images
        missing = _pixels(inputs["low"]).to(images) - shrink_tensor(images, self.cfg.factor)
        return (images + bicubic(missing, self.cfg.factor)).clamp(-1, 1)

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        return {"bicubic": bicubic(_pixels(inputs["low"]), self.cfg.factor)}

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return _pixels(inputs["low"])

    def forward(self, inputs: Inputs) -> Conditioning:
        low = _pixels(inputs["low"])
        if self.scale != 1:
            low = F.interpolate(low, scale_factor=self.scale, mode="bilinear", antialias=self.scale < 1)
        if self.level is None:
            return Conditioning(channels=low)
        told = inputs.get("level", torch.full((len(low),), float(self.cfg.sampling_level), device=low.device))
        return Conditioning(channels=low, vector=self.level(waves(told)))


class Masked(Condition):
    """A mask and the latent of the image with a grey hole, in the order of Stable Diffusion's inpainting network."""

    needs_image, needs_mask, rivals = True, True, ("mean_colour", "nearest_patch")
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.style, self.channels = cfg.style, 1 + len(around.latent_mean)
        self.register_buffer("mean", around.latent_mean.view(1, -1, 1, 1).clone(), persistent=False)
        self.register_buffer("std", around.latent_std.view(1, -1, 1, 1).clone(), persistent=False)

    def facts(self) -> dict[str, Any]:
        return {"style": self.style.value}

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        masks, (height, width) = samples.masks, samples.images.shape[2:]
        if masks is None:
            style = STYLES[self.style]
            masks = torch.stack([random_mask(height, width, random, style) for random in samples.generators])
        return {"mask": masks, "masked": frozen.latents(samples.images * ~masks[:, None]).half()}

    def null(self, inputs: Inputs) -> Inputs:
        masked = self.mean.to(inputs["masked"]).expand_as(inputs["masked"])
        return {"mask": torch.ones_like(inputs["mask"]), "masked": masked}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        return paste_back(images, originals.to(images), inputs["mask"].to(images.device))

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        masks = inputs["mask"].to(originals.device)
        return {"mean_colour": mean_colour(originals, masks), "nearest_patch": nearest_patch(originals, masks)}

    def region(self, inputs: Inputs) -> Tensor:
        return inputs["mask"]

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        return originals * ~inputs["mask"].to(originals.device)[:, None]

    def forward(self, inputs: Inputs) -> Conditioning:
        masked = (inputs["masked"].float() - self.mean) / self.std
        mask = F.interpolate(inputs["mask"][:, None].float(), masked.shape[2:])  # the nearest pixel of each
        return Conditioning(channels=torch.cat([mask, masked], dim=1))


def _pixels(low: Tensor) -> Tensor:
    """uint8 as float in [-1, 1]; what is float already stays."""
    return low if low.is_floating_point() else low.float() / 127.5 - 1


KINDS: Mapping[str, Callable[[Any, ConditionContext], Condition]] = {
    "image_embedding": ImageEmbedding,
    "low_resolution": LowResolution,
    "masked": Masked,
}
