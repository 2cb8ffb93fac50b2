"""An adversary for students: is a guess of theirs, seen through the frozen teacher, like data?

Sauer et al. 2024, "Fast high-resolution image synthesis with latent adversarial diffusion distillation" (LADD): what
the student means and what the data hold are both noised to a level that the teacher was trained at; small heads judge
the teacher's feature maps of them. Consistency alone settles on means, which are blurred; verdicts know no mean. Added
to a consistency loss as by Chen et al. 2025, "SANA-Sprint".

A guess and the image that it was made from are judged in pairs, with one noise at one level, place by place, and the
loss knows only by how much the one looks more like data than the other (Jolicoeur-Martineau 2019, "The relativistic
discriminator"): what differs from image to image, far more than a guess does from its image, drops out.

The two losses meet at the student's prediction. Each sample's pull by the verdicts is made so and so many times as long
as that by its consistency, so that neither drowns in the other, whatever the heads have learnt by then and whatever
else is in the batch; and what the teacher keeps for its backward pass is gone before the student's begins.

Of the two adversarial ways this one holds no further network: the distribution matching of Yin et al. 2024 ("DMD2")
trains a copy of the teacher on the student's images, with an optimiser and several steps for each of the student's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.schema.networks import UNetConfig
from models.conditions import Inputs
from models.denoiser import Denoiser
from models.layers import SiluConv2d
from train.training.distillation.consistency import Lesson

WIDTH = 64  # of a head
TINY = 1e-12


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
        nn.SiLU(),
        nn.Conv2d(WIDTH, 1, 3, padding=1, bias=False),  # which both of a pair would have
    )


def judges_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the heads by their verdicts [B, N] on pairs, []."""
    return F.softplus(fake - real).mean()


def judged_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the student by the same, [B]."""
    return F.softplus(real - fake).mean(dim=1)


class Apart:
    """A network in training whose last answer is cut off from it, to be differentiated by what it says alone.

    Backends count the backward passes that reach a network, and ZeRO refuses one that it was not told of.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, *inputs: Any) -> Tensor:
        """What it answers, as a leaf."""
        self.output: Tensor = self.network(*inputs)
        return self.output.detach().requires_grad_()


def both_pulls(lesson: Lesson, judged: Tensor, weight: float) -> Tensor:
    """Gradient [B, ...] by the prediction, a leaf, of the mean consistency and, `weight` times as long, of verdicts.

    Args:
        judged: losses [B] of the student by the verdicts on its guess.
    """
    (ours,) = torch.autograd.grad(lesson.losses.sum(), lesson.prediction, retain_graph=True)
    (push,) = torch.autograd.grad(judged.sum(), lesson.guess)  # what the teacher kept goes here
    (theirs,) = torch.autograd.grad(lesson.guess, lesson.prediction, push, retain_graph=True)
    length = ours.flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1).clamp(min=TINY)
    return (ours + weight * length.view((-1,) + (1,) * (theirs.ndim - 1)) * theirs) / len(ours)


class TeacherMaps:
    """Feature maps of a frozen U-Net: of its middle, and of its levels on the way up."""

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher
        self.found: list[Tensor] | None = None  # nobody keeps those of the teacher's other calls
        # Of these levels nobody writes into what they gave, as is done on the way down where gradients are not needed.
        for level in (teacher.unet.mid_block, *teacher.unet.up_blocks):
            level.register_forward_hook(self._keep)

    def _keep(self, level: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.found is not None:
            self.found.append(output)

    def __call__(self, x_t: Tensor, timesteps: Tensor, inputs: Inputs) -> list[Tensor]:
        """Maps [B, C, h, w] of noised latents; gradients go through them to x_t."""
        self.found = []
        self.teacher(x_t, timesteps, inputs)
        found, self.found = self.found, None
        return [one.float() for one in found]
