"""The autoencoder against diffusers' with the same weights, the posterior's mathematics, its folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig
from models.autoencoder import Autoencoder, kl, sample_moments

F4 = AutoencoderConfig(block_out_channels=[8, 16, 16], norm_num_groups=4)
CONFIGS = {
    "f4": F4,
    "f8 with one layer": replace(F4, block_out_channels=[8, 8, 16, 12], layers_per_block=1),
    "f2 without attention": replace(F4, block_out_channels=[8, 16], mid_block_add_attention=False),
    "f1": replace(F4, block_out_channels=[8]),
    "attention in two levels": replace(F4, attention_levels=[1, 2], latent_channels=16),
    "f32 attending as the paper's": replace(
        F4, block_out_channels=[8, 8, 8, 8, 16, 16], attention_levels=[4, 5], layers_per_block=1, latent_channels=64
    ),
    "other channels": replace(F4, in_channels=1, out_channels=2, latent_channels=8, layers_per_block=1),
}


def perturbed(cfg: AutoencoderConfig) -> Autoencoder:
    """An autoencoder with every weight moved: neither zeros nor ones can hide a wrong use of it."""
    network = Autoencoder(cfg)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_equal_diffusers(cfg: AutoencoderConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = perturbed(cfg)
    ours.save_pretrained(tmp_path)
    reference = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).train()
    assert set(ours.state_dict()) == set(reference.state_dict())
    height, width = (64, 96) if cfg.downscale == 32 else (40, 24)
    image = torch.randn(2, cfg.in_channels, height, width, requires_grad=True)
    noise = torch.randn(2, cfg.latent_channels, height // cfg.downscale, width // cfg.downscale)
    output, moments = ours(image, noise)
    posterior = reference.encode(image).latent_dist
    expected = reference.decode(posterior.mean + posterior.std * noise).sample
    for ours_part, peer_part in ((moments, posterior.parameters), (output, expected), (kl(moments), posterior.kl())):
        assert (ours_part - peer_part).abs().max() <= 1e-4 * peer_part.abs().max()
    weights = dict(ours.named_parameters())
    loss, peer_loss = output.square().mean() + kl(moments).mean(), expected.square().mean() + posterior.kl().mean()
    grads = torch.autograd.grad(loss, [image, *weights.values()])
    peers = torch.autograd.grad(peer_loss, [image, *(reference.get_parameter(name) for name in weights)])
    floor = 1e-3 * max(grad.abs().max() for grad in peers)  # below it a gradient is rounding around 0
    for name, grad, peer in zip(["image", *weights], grads, peers, strict=True):
        assert (grad - peer).abs().max() <= 1e-4 * peer.abs().max().clamp(min=floor), name


def test_parameter_count_of_stable_diffusion() -> None:
    with torch.device("meta"):
        network = Autoencoder(AutoencoderConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863


def test_kl_of_a_gaussian_equals_its_closed_form() -> None:
    mean, std = 1.5, 0.5
    moments = torch.tensor([mean, 2 * torch.tensor(std).log()]).reshape(1, 2, 1, 1).expand(3, 2, 2, 5)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0))
    torch.testing.assert_close(kl(moments), (10 * expected).expand(3))


def test_samples_follow_the_moments_and_stay_finite() -> None:
    noise = torch.tensor([[[[1.0]]]])
    assert sample_moments(torch.tensor([[[[3.0]], [[0.0]]]]), noise) == 4.0
    assert sample_moments(torch.tensor([[[[3.0]], [[1e6]]]]), noise).isfinite()
    torch.testing.assert_close(sample_moments(torch.tensor([[[[3.0]], [[-1e6]]]]), noise), torch.full_like(noise, 3.0))


def test_last_layer_is_the_last_to_touch_the_image() -> None:
    network = Autoencoder(F4)
    with torch.no_grad():
        network.last_layer.zero_()
        image = network.decode(torch.randn(1, 4, 2, 2))
    torch.testing.assert_close(image, network.decoder.conv_out.bias[:, None, None].expand_as(image))


def test_folder_round_trip_keeps_config_and_weights(tmp_path: Path) -> None:
    ours = perturbed(CONFIGS["f2 without attention"])
    ours.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.cfg == ours.cfg
    assert all(map(torch.equal, loaded.parameters(), ours.parameters()))


def test_checkpoint_with_the_attention_names_of_old_loads(tmp_path: Path) -> None:
    ours = perturbed(F4)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(path)
    for new_part, old_part in old.items():
        weights = {name.replace(new_part, old_part): value.clone() for name, value in weights.items()}
    save_file(weights, path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), ours.parameters()))


def test_config_of_stable_diffusion_loads_and_others_are_refused(tmp_path: Path) -> None:
    Autoencoder(F4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"scaling_factor": 0.18215, "sample_size": 512, "_diffusers_version": "0.6.0"}))
    assert Autoencoder.from_pretrained(tmp_path).cfg == F4
    for field, value in {"down_block_types": ["DownEncoderBlock"], "use_quant_conv": False, "odd": 1}.items():
        path.write_text(json.dumps(config | {field: value}))
        with pytest.raises(UserError, match=field):
            Autoencoder.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match="AutoencoderKL"):
        Autoencoder.from_pretrained(tmp_path)


def test_image_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"42 x 40 pixels.*multiples of 4"):
        Autoencoder(F4).encode(torch.zeros(1, 3, 42, 40))
