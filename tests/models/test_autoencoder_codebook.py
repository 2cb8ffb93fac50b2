"""The autoencoder with a codebook against diffusers' with the same weights, its codebook, its folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig
from models.autoencoder import Autoencoder, VectorQuantizer, codebook_use, split_moments

F4 = AutoencoderConfig(block_out_channels=[8, 16, 16], norm_num_groups=4, latent_channels=3, num_vq_embeddings=32)
CONFIGS = {
    "f4": F4,
    "f8 attending": replace(
        F4, block_out_channels=[8, 8, 16, 16], attention_levels=[3], layers_per_block=1, latent_channels=4
    ),
    "without attention": replace(F4, mid_block_add_attention=False, layers_per_block=1),
    "vectors of another width": replace(F4, vq_embed_dim=5),
}


def perturbed(cfg: AutoencoderConfig) -> Autoencoder:
    """Every weight moved, and a codebook as wide as the latents, so that several vectors are used."""
    network = Autoencoder(cfg)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        network.quantize.embedding.weight.normal_()
    return network


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_equal_diffusers(cfg: AutoencoderConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = perturbed(cfg)
    ours.save_pretrained(tmp_path)
    reference = VQModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).train()
    assert set(ours.state_dict()) == set(reference.state_dict())
    image = torch.randn(2, 3, 40, 24, requires_grad=True)
    output, quantised = ours(image, torch.zeros(0))
    expected = reference(image)
    torch.testing.assert_close(
        ours.encode(image).chunk(2, dim=1)[0], reference.encode(image).latents, rtol=1e-4, atol=1e-5
    )
    assert len(quantised.indices.unique()) > 4
    assert (output - expected.sample).abs().max() <= 1e-4 * expected.sample.abs().max()
    torch.testing.assert_close(quantised.loss, expected.commit_loss)
    weights = dict(ours.named_parameters())
    grads = torch.autograd.grad(output.square().mean() + quantised.loss, [image, *weights.values()])
    loss = expected.sample.square().mean() + expected.commit_loss
    peers = torch.autograd.grad(loss, [image, *(reference.get_parameter(name) for name in weights)])
    floor = 1e-3 * max(grad.abs().max() for grad in peers)  # below it a gradient is rounding around 0
    for name, grad, peer in zip(["image", *weights], grads, peers, strict=True):
        assert (grad - peer).abs().max() <= 1e-4 * peer.abs().max().clamp(min=floor), name


def test_moments_are_the_latents_without_a_variance() -> None:
    network, image = perturbed(F4), torch.randn(2, 3, 16, 16)
    mean, logvar = split_moments(network.encode(image))
    assert (0.5 * logvar).exp().max() < 1e-6
    torch.testing.assert_close(network.decode(mean), network(image, torch.zeros(0))[0])


def test_gradient_passes_straight_through_the_codebook() -> None:
    quantizer = VectorQuantizer(4, 2)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    slope = torch.randn(1, 2, 3, 3)
    (gradient,) = torch.autograd.grad((quantizer(z).z * slope).sum(), z)
    torch.testing.assert_close(gradient, slope)


def test_vectors_learn_only_from_the_codebook_term() -> None:
    quantizer = VectorQuantizer(2, 1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    z = torch.tensor([[[[0.6, 0.8]]]], requires_grad=True)
    quantised = quantizer(z)
    assert quantised.indices.tolist() == [[[1, 1]]]
    torch.testing.assert_close(quantised.loss, torch.tensor((0.16 + 0.04) / 2 * 1.25))
    quantised.loss.backward()
    torch.testing.assert_close(quantizer.embedding.weight.grad, torch.tensor([[0.0], [0.25 * (0.4 + 0.2)]]))
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[[[-0.4, -0.2]]]]))


def test_use_of_the_codebook_counts_vectors() -> None:
    assert codebook_use(torch.tensor([[[0, 3], [3, 3]]]), 8) == 2 / 8


def test_folder_says_which_kind_it_holds(tmp_path: Path) -> None:
    perturbed(F4).save_pretrained(tmp_path / "vq")
    assert Autoencoder.from_pretrained(tmp_path / "vq").cfg == F4
    kl = Autoencoder(replace(F4, num_vq_embeddings=None))
    kl.save_pretrained(tmp_path / "kl")
    assert Autoencoder.from_pretrained(tmp_path / "kl").quantize is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vq_embed_dim needs model\.num_vq_embeddings"):
        replace(F4, num_vq_embeddings=None, vq_embed_dim=3)
    with pytest.raises(UserError, match=r"model\.attention_levels: there is no level 3 in 3"):
        replace(F4, attention_levels=[3])
    with pytest.raises(UserError, match=r"model\.num_vq_embeddings=0: must be at least 1"):
        replace(F4, num_vq_embeddings=0)
    with pytest.raises(UserError, match="18 x 16 pixels"):
        Autoencoder(F4).encode(torch.zeros(1, 3, 18, 16))
