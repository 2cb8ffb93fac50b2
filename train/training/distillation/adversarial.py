"""An adversary for students: is a guess of theirs, seen through the frozen teacher, like data?

Sauer et al. 2024, "Fast high-resolution image synthesis with latent adversarial diffusion distillation" (LADD): what
the student means and what the data hold are both noised to a level that the teacher was trained at; small heads judge
the teacher's feature maps of them. Consistency alone settles on means, which are blurred; verdicts know no mean. Added
to a consistency loss as by Chen et al. 2025, "SANA-Sprint".

Of the two adversarial ways this one holds no further network: the distribution matching of Yin et al. 2024 ("DMD2")
trains a copy of the teacher on the student's images, with an optimiser and several steps for each of the student's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema.networks import UNetConfig
from models.conditions import Inputs
from models.denoiser import Denoiser
from models.layers import SiluConv2d

WIDTH = 64  # of a head


class Heads(nn.Module):
    """Judges of the feature maps in the middle of a U-Net and of each level on its way up."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        channels = [cfg.block_out_channels[-1], *reversed(cfg.block_out_channels)]
        self.heads = nn.ModuleList(_head(width, cfg.norm_num_groups) for width in channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Verdicts [B, N] (positive: data), one for each place of each feature map [B, C, h, w]."""
        return torch.cat([head(one).flatten(1) for head, one in zip(self.heads, maps, strict=True)], dim=1)


def _head(channels: int, groups: int) -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(groups, channels),
        nn.Conv2d(channels, WIDTH, 1),
        nn.GroupNorm(8, WIDTH),
        SiluConv2d(WIDTH, WIDTH),
        nn.GroupNorm(8, WIDTH),
        SiluConv2d(WIDTH, 1),
    )


class TeacherMaps:
    """Feature maps of a frozen U-Net: of its middle, and of its levels on the way up."""

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher
        self.found: list[Tensor] = []
        # Of these levels nobody writes into what they gave, as is done on the way down where gradients are not needed.
        for level in (teacher.unet.mid_block, *teacher.unet.up_blocks):
            level.register_forward_hook(self._keep)

    def _keep(self, level: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found.append(output)

    def __call__(self, x_t: Tensor, timesteps: Tensor, inputs: Inputs) -> list[Tensor]:
        """Maps [B, C, h, w] of noised latents; gradients go through them to x_t."""
        self.found.clear()
        self.teacher(x_t, timesteps, inputs)
        found, self.found = self.found, []
        return [one.float() for one in found]
