"""The U-Net against diffusers' with the same weights, its size, its folder and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from conf.errors import UserError
from conf.networks import UNetConfig
from models.unet import UNet

ATTEND, PLAIN, UP_ATTEND, UP_PLAIN = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
SD1_LIKE = UNetConfig(
    block_out_channels=[16, 32, 32, 32], attention_head_dim=[4], cross_attention_dim=12, norm_num_groups=8
)
TWO_LEVELS = UNetConfig(
    block_out_channels=[12, 24],
    layers_per_block=1,
    down_block_types=[ATTEND, PLAIN],
    up_block_types=[UP_PLAIN, UP_ATTEND],
    cross_attention_dim=8,
    attention_head_dim=[3],
    norm_num_groups=4,
)
CONFIGS = {
    "sd1": SD1_LIKE,
    "sd2": replace(SD1_LIKE, attention_head_dim=[1, 2, 4, 8], use_linear_projection=True),
    "sd1 with one layer": replace(SD1_LIKE, layers_per_block=1),
    "two levels": TWO_LEVELS,
    "plain blocks": replace(TWO_LEVELS, down_block_types=[PLAIN, PLAIN], up_block_types=[UP_PLAIN, UP_PLAIN]),
    "not a mirror image": replace(TWO_LEVELS, down_block_types=[PLAIN, ATTEND], attention_head_dim=[2, 4]),
    "deep transformers": replace(TWO_LEVELS, transformer_layers_per_block=2, up_block_types=[UP_ATTEND, UP_ATTEND]),
    "other channels": replace(TWO_LEVELS, in_channels=9, out_channels=3, layers_per_block=3),
    "other time embedding": replace(TWO_LEVELS, flip_sin_to_cos=False, freq_shift=1),
    "one level": replace(
        TWO_LEVELS,
        block_out_channels=[16],
        attention_head_dim=[2],
        down_block_types=[ATTEND],
        up_block_types=[UP_ATTEND],
    ),
}


def perturbed(network: nn.Module) -> nn.Module:
    """The network with every weight moved: neither zeros nor ones can hide a wrong use of it."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(cfg: UNetConfig, height: int = 40, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    sample = torch.randn(2, cfg.in_channels, height, width, requires_grad=True)
    context = torch.randn(2, 7, cfg.cross_attention_dim, requires_grad=True)
    return sample, torch.tensor([0.5, 998.0]), context


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_output_and_gradients_equal_diffusers(cfg: UNetConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = perturbed(UNet(cfg))
    ours.save_pretrained(tmp_path)
    reference = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).train()
    assert set(ours.state_dict()) == set(reference.state_dict())
    sample, timesteps, context = inputs(cfg)
    output, expected = ours(sample, timesteps, context), reference(sample, timesteps, context).sample
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
    weights = dict(ours.named_parameters())
    grads = torch.autograd.grad(output.square().mean(), [sample, context, *weights.values()])
    peers = [reference.get_parameter(name) for name in weights]
    expected_grads = torch.autograd.grad(expected.square().mean(), [sample, context, *peers])
    floor = 1e-3 * max(grad.abs().max() for grad in expected_grads)  # below it a gradient is rounding around 0
    for name, grad, peer in zip(["sample", "context", *weights], grads, expected_grads, strict=True):
        assert (grad - peer).abs().max() <= 1e-4 * peer.abs().max().clamp(min=floor), name


def test_parameter_counts_of_stable_diffusion() -> None:
    sd2 = UNetConfig(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
    for cfg, count in ((UNetConfig(), 859_520_964), (sd2, 865_910_724)):
        with torch.device("meta"):
            network = UNet(cfg)
        assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_folder_round_trip_keeps_config_and_weights(tmp_path: Path) -> None:
    cfg = CONFIGS["sd2"]
    ours = perturbed(UNet(cfg))
    ours.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.cfg == cfg
    assert all(map(torch.equal, loaded.parameters(), ours.parameters()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_folder_of_diffusers_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=(ATTEND, PLAIN),
        up_block_types=(UP_PLAIN, UP_ATTEND),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        upcast_attention=True,
    )
    reference.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    sample, timesteps, context = inputs(ours.cfg)
    expected = reference(sample, timesteps, context).sample
    assert (ours(sample, timesteps, context) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_saved_weights_can_come_from_elsewhere(tmp_path: Path) -> None:
    ours = UNet(TWO_LEVELS)
    ours.save_pretrained(tmp_path, {name: torch.ones_like(value) for name, value in ours.state_dict().items()})
    assert all(torch.equal(value, torch.ones_like(value)) for value in UNet.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("only_cross_attention", [True, False]),
        ("cross_attention_dim", [8, 8]),
        ("layers_per_block", [1, 2]),
        ("addition_embed_type", "text_time"),
        ("down_block_types", [ATTEND, "AttnDownBlock2D"]),
    ],
)
def test_config_that_the_network_cannot_follow_is_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    UNet(TWO_LEVELS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=field) as error:
        UNet.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_wrong_weights_are_refused_by_name(tmp_path: Path) -> None:
    ours = UNet(TWO_LEVELS)
    weights = {**ours.state_dict(), "extra.weight": torch.zeros(1), "conv_in.weight": torch.zeros(2, 2)}
    del weights["conv_out.bias"]
    ours.save_pretrained(tmp_path, weights)
    shapes = r"conv_in.weight \[2, 2\] instead of \[12, 4, 3, 3\]"
    with pytest.raises(UserError, match=f"missing: conv_out.bias; surplus: extra.weight; misshapen: {shapes}"):
        UNet.from_pretrained(tmp_path)


def test_missing_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        UNet.from_pretrained(tmp_path)
    UNet(TWO_LEVELS).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        UNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"safetensors is missing"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        UNet.from_pretrained(tmp_path)


def test_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = perturbed(UNet(TWO_LEVELS))
    ours.save_pretrained(tmp_path)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        UNet(TWO_LEVELS).save_pretrained(tmp_path)
    assert torch.equal(UNet.from_pretrained(tmp_path).conv_in.weight, ours.conv_in.weight)
    assert len(list(tmp_path.iterdir())) == 2


def test_latent_that_does_not_divide_is_refused() -> None:
    sample, timesteps, context = inputs(SD1_LIKE, height=20)
    with pytest.raises(UserError, match=r"20 x 24.*multiples of 8"):
        UNet(SD1_LIKE)(sample, timesteps, context)


def test_untrained_network_predicts_zero() -> None:
    assert UNet(TWO_LEVELS)(*inputs(TWO_LEVELS)).abs().max() == 0
