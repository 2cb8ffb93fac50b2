"""The U-Net against diffusers' with the same weights, its size, its folder and what it refuses."""

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import UserError
from conf.schema.networks import UNetConfig
from models.flops import unet_flops
from models.formats.unet import architecture
from models.unet import UNet

ATTEND, PLAIN, UP_ATTEND, UP_PLAIN = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
OWN, UP_OWN = "AttnDownBlock2D", "AttnUpBlock2D"
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
UNCONDITIONAL = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=[8, 16, 24],
    down_block_types=[PLAIN, OWN, OWN],
    up_block_types=[UP_OWN, UP_OWN, UP_PLAIN],
    cross_attention_dim=None,
    head_channels=8,
    norm_num_groups=4,
)
CONFIGS = {
    "sd1": SD1_LIKE,
    "sd2": replace(SD1_LIKE, attention_head_dim=[1, 2, 4, 8], use_linear_projection=True),
    "sd1 with one layer": replace(SD1_LIKE, layers_per_block=1),
    "two levels": TWO_LEVELS,
    "plain blocks": replace(TWO_LEVELS, down_block_types=[PLAIN, PLAIN], up_block_types=[UP_PLAIN, UP_PLAIN]),
    "not a mirror image": replace(TWO_LEVELS, down_block_types=[PLAIN, ATTEND], attention_head_dim=[2, 4]),
    "deep transformers": replace(TWO_LEVELS, transformer_layers_per_block=[2], up_block_types=[UP_ATTEND, UP_ATTEND]),
    "other channels": replace(TWO_LEVELS, in_channels=9, out_channels=3, layers_per_block=3),
    "other time embedding": replace(TWO_LEVELS, flip_sin_to_cos=False, freq_shift=1),
    "sdxl": replace(
        TWO_LEVELS,
        transformer_layers_per_block=[1, 3],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=46,
    ),
    "16 groups as in MLPerf": replace(SD1_LIKE, block_out_channels=[16, 32, 48, 48], norm_num_groups=16),
    "classes": replace(TWO_LEVELS, num_class_embeds=5),
    "a number as class": replace(TWO_LEVELS, class_embed_type="timestep"),
    "a vector as class": replace(
        TWO_LEVELS, class_embed_type="projection", projection_class_embeddings_input_dim=9, norm_eps=1e-6
    ),
    "scale and shift": replace(TWO_LEVELS, resnet_time_scale_shift="scale_shift"),
    "resizes with text": replace(
        TWO_LEVELS,
        block_out_channels=[12, 24, 24],
        down_block_types=["ResnetDownsampleBlock2D", ATTEND, "ResnetDownsampleBlock2D"],
        up_block_types=["ResnetUpsampleBlock2D", UP_ATTEND, "ResnetUpsampleBlock2D"],
    ),
    "unconditional": UNCONDITIONAL,
    "unconditional with classes": replace(UNCONDITIONAL, num_class_embeds=3, resnet_time_scale_shift="scale_shift"),
    "resizes in residual blocks": replace(
        UNCONDITIONAL,
        down_block_types=["ResnetDownsampleBlock2D", OWN, OWN],
        up_block_types=[UP_OWN, UP_OWN, "ResnetUpsampleBlock2D"],
        downsample_type="resnet",
        upsample_type="resnet",
        head_channels=4,
    ),
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


def inputs(cfg: UNetConfig, height: int = 40, width: int = 24) -> dict[str, Tensor]:
    """Arguments of the network, on an image that is no square."""
    made = {"sample": torch.randn(2, cfg.in_channels, height, width, requires_grad=True)}
    made["timesteps"] = torch.tensor([0.5, 998.0])
    if cfg.cross_attention_dim is not None:
        made["context"] = torch.randn(2, 7, cfg.cross_attention_dim, requires_grad=True)
    if cfg.num_class_embeds is not None:
        made["class_labels"] = torch.tensor([1, 2])
    elif cfg.class_embed_type == "timestep":
        made["class_labels"] = torch.tensor([20.0, 350.0])
    elif cfg.class_embed_type == "projection":
        made["class_labels"] = torch.randn(2, cfg.projection_class_embeddings_input_dim, requires_grad=True)
    if cfg.addition_embed_type == "text_time":
        pooled = cfg.projected_width - 6 * (cfg.addition_time_embed_dim or 0)
        made["pooled"] = torch.randn(2, pooled, requires_grad=True)
        made["sizes"] = torch.tensor([[512.0, 384, 0, 64, 512, 512], [1024, 1024, 32, 0, 1024, 768]])
    return made


def peer_output(reference: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """The same arguments by diffusers' names."""
    names = {
        "sample": "sample",
        "timesteps": "timestep",
        "context": "encoder_hidden_states",
        "class_labels": "class_labels",
    }
    named = {names[name]: value for name, value in arguments.items() if name in names}
    if "pooled" in arguments:
        named["added_cond_kwargs"] = {"text_embeds": arguments["pooled"], "time_ids": arguments["sizes"]}
    return reference(**named).sample


def reference_of(folder: Path, cfg: UNetConfig) -> nn.Module:
    kind = UNet2DModel if cfg.cross_attention_dim is None else UNet2DConditionModel
    return kind.from_pretrained(folder, low_cpu_mem_usage=False).train()


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_output_and_gradients_equal_diffusers(cfg: UNetConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = perturbed(UNet(cfg))
    ours.save_pretrained(tmp_path)
    reference = reference_of(tmp_path, cfg)
    assert set(ours.state_dict()) == set(reference.state_dict())
    arguments = inputs(cfg)
    output, expected = ours(**arguments), peer_output(reference, arguments)
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
    with torch.no_grad():  # where memory is used again
        assert (ours(**arguments) - expected).abs().max() <= 1e-4 * expected.abs().max()
    weights = dict(ours.named_parameters())
    learned = {name: value for name, value in arguments.items() if value.requires_grad}
    grads = torch.autograd.grad(output.square().mean(), [*learned.values(), *weights.values()])
    peers = [reference.get_parameter(name) for name in weights]
    expected_grads = torch.autograd.grad(expected.square().mean(), [*learned.values(), *peers])
    floor = 1e-3 * max(grad.abs().max() for grad in expected_grads)  # below it a gradient is rounding around 0
    for name, grad, peer in zip([*learned, *weights], grads, expected_grads, strict=True):
        assert (grad - peer).abs().max() <= 1e-4 * peer.abs().max().clamp(min=floor), name
    assert architecture(UNet.from_pretrained(tmp_path).cfg) == architecture(cfg)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "unconditional", "resizes in residual blocks"])
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    network, arguments = perturbed(UNet(CONFIGS[name])), inputs(CONFIGS[name])
    found = []
    for enabled in (False, True):
        network.checkpoint_gradients(enabled)
        network.zero_grad()
        network(**arguments).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", ["sd1", "unconditional"])
def test_compiler_takes_the_whole_network_as_one_graph(name: str) -> None:
    """Forward and backward traced without a break; what the backend makes of the graph is not ours."""
    torch.manual_seed(0)
    network, arguments = perturbed(UNet(CONFIGS[name])), inputs(CONFIGS[name])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    output, expected = compiled(**arguments), network(**arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    weights = list(network.parameters())
    grads = [torch.autograd.grad(result.square().mean(), weights) for result in (output, expected)]
    largest = max(float(grad.abs().max()) for grad in grads[1])
    assert all((a - b).abs().max() <= 1e-4 * largest for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
def test_half_precision_stays_near_fp32(dtype: torch.dtype, bound: float) -> None:
    """Output and gradients under autocast; about ten roundings of 2^-8 or 2^-11."""
    torch.manual_seed(0)
    network, arguments = UNet(CONFIGS["sd1"]), inputs(CONFIGS["sd1"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = network(**arguments)
        loss = 1024 * output.float().square().mean()  # scaled, as fp16 needs it
        found.append([output, *torch.autograd.grad(loss, list(network.parameters()))])
    exact, half = found
    assert half[0].dtype is dtype and {tensor.dtype for tensor in half[1:]} == {torch.float32}
    assert (half[0] - exact[0]).norm() <= bound * exact[0].norm()
    whole, rounded = (torch.cat([tensor.flatten() for tensor in tensors[1:]]) for tensors in found)
    assert (rounded - whole).norm() <= bound * whole.norm()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_keys_and_values_of_a_text_serve_in_its_place(name: str) -> None:
    torch.manual_seed(0)
    network, arguments = perturbed(UNet(CONFIGS[name])), inputs(CONFIGS[name])
    expected = network(**arguments)
    prepared = network.keys_values(arguments["context"])
    torch.testing.assert_close(network(**arguments | {"context": prepared}), expected)


SD2 = UNetConfig(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=[320, 640, 1280],
    down_block_types=[PLAIN, ATTEND, ATTEND],
    up_block_types=[UP_ATTEND, UP_ATTEND, UP_PLAIN],
    attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
CELEBA = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=[224, 448, 672, 896],
    down_block_types=[PLAIN, OWN, OWN, OWN],
    up_block_types=[UP_OWN, UP_OWN, UP_OWN, UP_PLAIN],
    cross_attention_dim=None,
    head_channels=32,
)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (UNetConfig(), 859_520_964),
        (SD2, 865_910_724),
        (SDXL, 2_567_463_684),
        (UNetConfig(cross_attention_dim=1280), 872_300_484),
        (CELEBA, 274_056_163),
    ],
    ids=["sd1", "sd2", "sdxl", "laion", "celeba"],
)
def test_parameter_counts_of_published_networks(cfg: UNetConfig, count: int) -> None:
    with torch.device("meta"):
        network = UNet(cfg)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


PUBLISHED = {"Stable Diffusion 1": UNetConfig(), "Stable Diffusion 2": SD2, "SDXL": SDXL, "CelebA-HQ": CELEBA}


@pytest.mark.parametrize("cfg", (CONFIGS | PUBLISHED).values(), ids=CONFIGS | PUBLISHED)
def test_counted_flops_are_those_that_torch_counts(cfg: UNetConfig) -> None:
    """On the meta device; so large a batch that upsampling takes its shorter way."""
    batch = 1024
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network, arguments = UNet(cfg), inputs(cfg, 64, 32)
        network(**{name: value[:1].repeat_interleave(batch, dim=0) for name, value in arguments.items()})
    tokens = 0 if cfg.cross_attention_dim is None else 7
    assert unet_flops(cfg, 64, 32, tokens) == pytest.approx(counter.get_total_flops() / batch, rel=1e-6)


def test_folder_round_trip_keeps_config_and_weights(tmp_path: Path) -> None:
    cfg = CONFIGS["sd2"]
    ours = perturbed(UNet(cfg))
    ours.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert architecture(loaded.cfg) == architecture(cfg)
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
    arguments = inputs(ours.cfg)
    expected = peer_output(reference, arguments)
    assert (ours(**arguments) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_saved_weights_can_come_from_elsewhere(tmp_path: Path) -> None:
    ours = UNet(TWO_LEVELS)
    ours.save_pretrained(tmp_path, {name: torch.ones_like(value) for name, value in ours.state_dict().items()})
    assert all(torch.equal(value, torch.ones_like(value)) for value in UNet.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "identity"),
        ("only_cross_attention", [True, False]),
        ("cross_attention_dim", [8, 8]),
        ("layers_per_block", [1, 2]),
        ("addition_embed_type", "text_time"),
        ("addition_embed_type", "image"),
        ("mid_block_type", "UNetMidBlock2D"),
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

    def full(path: Path, stream: object, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.formats.weights.write_stream", full)
    with pytest.raises(OSError, match="No space left"):
        UNet(TWO_LEVELS).save_pretrained(tmp_path)
    assert torch.equal(UNet.from_pretrained(tmp_path).conv_in.weight, ours.conv_in.weight)
    assert len(list(tmp_path.iterdir())) == 2


def test_latent_that_does_not_divide_is_refused() -> None:
    arguments = inputs(SD1_LIKE, height=20)
    with pytest.raises(UserError, match=r"20 x 24.*multiples of 8"):
        UNet(SD1_LIKE)(**arguments)


def test_initial_parameter_is_made_without_a_look_at_any_weight() -> None:
    """Where processes cut the network, its weights are cut or gone by then, and to index one may be an exchange."""
    network = UNet(SD1_LIKE)
    expected = {name: network.initial(name, 0) for name, _ in network.named_parameters()}
    bound = (SD1_LIKE.block_out_channels[0] * 9) ** -0.5
    assert bound * 0.9 < expected["down_blocks.0.resnets.0.conv1.weight"].abs().max() <= bound

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    weight_class = type("Unreadable", (nn.Parameter,), {"__getitem__": refuse, "numel": refuse})
    for parameter in network.parameters():
        parameter.__class__ = weight_class
    for name, tensor in expected.items():
        assert torch.equal(network.initial(name, 0), tensor), name


def test_untrained_network_predicts_zero() -> None:
    assert UNet(TWO_LEVELS)(**inputs(TWO_LEVELS)).abs().max() == 0


def test_initial_parameters_are_drawn_as_torch_draws_them() -> None:
    """Each from its own seed: the first numbers that a layer's own `reset_parameters` draws from there."""
    with torch.device("meta"):
        network = UNet(TWO_LEVELS)
    real = UNet(TWO_LEVELS)
    drawn = {name: network.initial(name, seed=7) for name, _ in network.named_parameters()}
    for name, parameter in real.named_parameters():
        owner, _, kind = name.rpartition(".")
        layer = real.get_submodule(owner)
        if owner not in real.zero and isinstance(layer, nn.Linear | nn.Conv2d):
            digest = sha256(f"7/{name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
            if kind == "weight":
                layer.reset_parameters()
            else:
                nn.init.uniform_(parameter, -1 / math.sqrt(layer.weight[0].numel()), layer.weight[0].numel() ** -0.5)
        assert torch.equal(drawn[name], parameter), name  # norms and zero layers: as the constructor has them
    assert sum(bool(tensor.any()) for tensor in drawn.values()) > len(drawn) / 2
    other = network.initial("conv_in.weight", seed=8)
    assert not torch.equal(other, drawn["conv_in.weight"])
