"""PatchGAN: what a verdict sees, its losses, and the adaptive weight."""

import pytest
import torch
from torch import nn

from conf.errors import UserError
from conf.schema import Adversarial
from conf.schema.networks import DiscriminatorConfig
from models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_receptive_field_is_the_patch_of_the_paper(layers: int, pixels: int) -> None:
    """By the support of a verdict's gradient; the norms look at whole images and are taken out."""
    network = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=layers)).double()
    for index, layer in enumerate(network.layers):
        if isinstance(layer, nn.GroupNorm):
            network.layers[index] = nn.Identity()
    images = torch.randn(1, 3, 2 * pixels + 40, 2 * pixels + 40, dtype=torch.float64, requires_grad=True)
    verdicts = network(images)
    middle = verdicts.shape[-1] // 2
    (gradient,) = torch.autograd.grad(verdicts[0, 0, middle, middle], images)
    seen = gradient.abs().sum(dim=(0, 1)).nonzero()
    extent = seen.max(dim=0).values - seen.min(dim=0).values + 1
    assert extent.tolist() == [pixels, pixels]


def test_default_has_the_parameters_of_ldm() -> None:
    network = PatchDiscriminator(DiscriminatorConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_765_633
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_verdict_does_not_depend_on_the_batch() -> None:
    network = PatchDiscriminator(DiscriminatorConfig(channels=8)).train()
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_images_without_a_patch_are_refused_and_the_smallest_passes() -> None:
    network = PatchDiscriminator(DiscriminatorConfig(channels=4))
    assert network(torch.zeros(1, 3, network.smallest_image, network.smallest_image)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"discriminator\.layers=3 needs images\.resolution>=24"):
        network(torch.zeros(1, 3, 16, 16))


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake).item() == pytest.approx(1.5)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction = (weight * torch.tensor([30.0, 40.0])).sum()  # gradient of length 50
    adversarial = (weight * torch.tensor([0.6, 0.8])).sum()  # of length 1
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx(50 / (1 + 1e-4))
    assert not ratio.requires_grad
    (reconstruction + ratio * adversarial).backward()  # the graph is still there
    torch.testing.assert_close(weight.grad, torch.tensor([60.0, 80.0]), rtol=1e-3, atol=0)


def test_adaptive_weight_is_clamped_where_the_discriminator_is_silent() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    assert adaptive_weight(5 * weight.sum(), 0 * weight.sum(), weight).item() == 1e4


def test_non_saturating_losses_are_cross_entropies() -> None:
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    entropy = nn.functional.binary_cross_entropy_with_logits
    kind = Adversarial.non_saturating
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(discriminator_loss(real, fake, kind), expected)
    torch.testing.assert_close(generator_loss(fake, kind), entropy(fake, torch.ones_like(fake)))


def test_r1_is_half_the_squared_slope_of_real_verdicts() -> None:
    """On verdicts that are linear in the images, so that the slope is known; the images not judged do not count."""
    weight = torch.randn(3, 8, 8)
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    verdicts = (images * weight).sum(dim=(1, 2, 3)).view(4, 1, 1, 1)
    torch.testing.assert_close(r1_penalty(verdicts[:2], images), 0.5 * weight.square().sum())
    network = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=1))
    r1_penalty(network(images), images).backward()
    assert all(parameter.grad is not None for name, parameter in network.named_parameters() if name != "layers.5.bias")


def test_lecam_pulls_each_kind_towards_the_other_ones_mean() -> None:
    real, fake = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]])
    penalty = lecam_penalty(real, fake, real_mean=torch.tensor(1.5), fake_mean=torch.tensor(-0.5))
    assert penalty == (2.0 + 0.5) ** 2 + (-1.0 - 1.5) ** 2
