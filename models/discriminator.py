"""PatchGAN discriminator with its losses, and the weight that balances it against the reconstruction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import Adversarial
from conf.schema.networks import DiscriminatorConfig
from models.layers import laid_out


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image (Isola et al. 2017, arXiv:1611.07004; LDM paper, appendix G).

    Parameters have the shapes and order of the N-layer discriminator that LDM uses (2,765,633 by default), but group
    normalisation takes the place of batch normalisation: a verdict depends on neither batch nor number of processes.
    """

    verdict_means: Tensor  # [2], running means of the verdicts on real images and on reconstructions

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("verdict_means", torch.zeros(2))
        self.config = config
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.apply(_initialise)

    @property
    def smallest_image(self) -> int:
        """Pixels along a side below which no patch is left to judge."""
        return 3 * 2**self.config.layers

    def forward(self, images: Tensor) -> Tensor:
        """Verdicts [B, 1, h, w] (positive: real) for images [B, 3, H, W] in [-1, 1].

        Raises:
            UserError: the images are smaller than `smallest_image`.
        """
        if min(images.shape[-2:]) < self.smallest_image:
            raise UserError(
                f"discriminator.layers={self.config.layers} needs images.resolution>={self.smallest_image}: "
                "choose fewer layers or larger images"
            )
        return self.layers(laid_out(images))


def _initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 (Isola et al. 2017, section 6.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_loss(real: Tensor, fake: Tensor, kind: Adversarial = Adversarial.hinge) -> Tensor:
    """Loss of the discriminator from verdicts on both kinds of images, each counting half; a scalar.

    hinge: Lim & Ye 2017, arXiv:1705.02894. non_saturating: the logistic loss of Goodfellow et al. 2014.
    """
    if kind is Adversarial.hinge:
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: Adversarial = Adversarial.hinge) -> Tensor:
    """Adversarial loss of the autoencoder from the verdicts on its images; a scalar."""
    return -fake.mean() if kind is Adversarial.hinge else F.softplus(-fake).mean()


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Half the squared gradient of the verdicts by their images, mean per image (Mescheder et al. 2018, eq. 9).

    Args:
        real: verdicts [B, 1, h, w] of the images.
        images: with gradient, the B images that were judged and any that were not.
    """
    (slope,) = torch.autograd.grad(real.flatten(1).mean(dim=1).sum(), images, create_graph=True)
    return 0.5 * slope.square().sum() / len(real)


def lecam_penalty(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Keeps each kind's verdicts near the running mean of the other's (Tseng et al. 2021, eq. 3); a scalar."""
    return (real - fake_mean).square().mean() + (fake - real_mean).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight of the adversarial loss that makes its gradient as long as the reconstruction's (LDM paper, eq. 25).

    Args:
        reconstruction: scalar loss (pixels and perceptual).
        adversarial: scalar `generator_loss`.
        last_layer: weight of the decoder's last convolution, where both gradients are taken.

    Returns:
        |grad reconstruction| / (|grad adversarial| + 1e-4), clamped to [0, 1e4], without gradient.
    """
    (towards_target,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (towards_real,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = towards_target.norm() / (towards_real.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()
