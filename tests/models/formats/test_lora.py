"""Low-rank adapters: they begin as nothing, merge into the weights, and diffusers reads their file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import LoraConfig
from conf.schema.networks import UNetConfig
from models.formats.lora import FILE_NAME, adapters_of, add_adapters, load_adapters, merged, save_adapters
from models.unet import UNet

CFG = UNetConfig(
    block_out_channels=[12, 24],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=8,
    attention_head_dim=[3],
    norm_num_groups=4,
)
LORA = LoraConfig(rank=3, alpha=5.0)


@torch.no_grad()
def network(seed: int = 0, cfg: UNetConfig = CFG) -> UNet:
    """No weight of it is zero, so that every layer shows."""
    torch.manual_seed(seed)
    unet = UNet(cfg)
    for parameter in unet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.eval()


@torch.no_grad()
def adapted(lora: LoraConfig = LORA, cfg: UNetConfig = CFG) -> UNet:
    """The network with adapters as a training leaves them."""
    unet = network(cfg=cfg)
    add_adapters(unet, lora)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return unet


def of_denoiser(unet: UNet) -> dict[str, Tensor]:
    """Its weights under the names that they have there."""
    return {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 12), (5, 8)))
    return sample, torch.tensor([3.0, 800.0]), context


def predict(unet: UNet) -> Tensor:
    with torch.no_grad():
        return unet(*inputs())


def test_start_equals_the_base_bit_for_bit() -> None:
    base, unet = network(), network()
    add_adapters(unet, LORA)
    assert torch.equal(predict(unet), predict(base))
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in base.state_dict().items())


def test_adapters_alone_are_trained() -> None:
    unet = network()
    add_adapters(unet, LORA)
    trained = {name: p.shape for name, p in unet.named_parameters() if p.requires_grad}
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert trained[f"{layer}.lora_A.weight"] == (3, 8) and trained[f"{layer}.lora_B.weight"] == (12, 3)
    attentions = sum(name.endswith("to_q.weight") for name in unet.state_dict())
    assert len(trained) == attentions * 4 * 2 and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("modules", [LORA.modules, ["attn2.to_k", "ff.net.0.proj", "time_emb_proj", "linear_2"]])
def test_merged_weights_give_the_same_output(modules: list[str]) -> None:
    lora = replace(LORA, modules=modules)
    unet, plain = adapted(lora), UNet(CFG).eval()
    plain.load_state_dict(merged(unet.state_dict(), lora))
    assert (predict(plain) - predict(network())).abs().max() > 0.01
    torch.testing.assert_close(predict(plain), predict(unet), rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_the_text_have_their_adapters() -> None:
    unet = adapted()
    sample, timesteps, context = inputs()
    with torch.no_grad():
        ahead = unet(sample, timesteps, unet.keys_values(context))
    torch.testing.assert_close(ahead, predict(unet), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [5.0, None])
def test_diffusers_reads_the_file(tmp_path: Path, alpha: float | None) -> None:
    pytest.importorskip("peft")
    lora = replace(LORA, alpha=alpha)
    unet = adapted(lora)
    network().save_pretrained(tmp_path / "unet")
    save_adapters(tmp_path, of_denoiser(unet), lora)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    theirs.load_lora_adapter(tmp_path, weight_name=FILE_NAME, prefix="unet")
    sample, timesteps, context = inputs()
    with torch.no_grad():
        torch.testing.assert_close(theirs(sample, timesteps, context).sample, predict(unet), rtol=1e-4, atol=1e-4)


def test_diffusers_writes_the_same_file(tmp_path: Path) -> None:
    """Names, shapes and values, after its own reader has had ours."""
    pytest.importorskip("peft")
    unet = adapted()
    network().save_pretrained(tmp_path / "unet")
    save_adapters(tmp_path, of_denoiser(unet), LORA)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    theirs.load_lora_adapter(tmp_path, weight_name=FILE_NAME, prefix="unet", adapter_name="default")
    theirs.save_lora_adapter(tmp_path / "again")
    written, ours = load_file(tmp_path / "again" / FILE_NAME), load_file(tmp_path / FILE_NAME)
    assert {f"unet.{name}" for name in written} == ours.keys()
    assert all(torch.equal(tensor, ours[f"unet.{name}"]) for name, tensor in written.items())


def test_layer_that_is_not_there_is_refused() -> None:
    for name in ("to_x", "o_q", "conv1", "ff.net.2"):
        with pytest.raises(UserError, match=f"lora.modules: no linear layer of the network is called '{name}'"):
            add_adapters(nn.Sequential(network()), replace(LORA, modules=["to_q", name]))


def read_back(source: Path, scale: float = 1.0) -> Tensor:
    """What the network says with the adapters of a file."""
    unet = network()
    load_adapters(str(source)).merge(unet, scale)
    return predict(unet)


def of_diffusers(folder: Path, file: Path) -> UNet2DConditionModel:
    """Its network with the adapters of a file, as `load_lora_weights` gives them to a pipeline's U-Net."""
    network().save_pretrained(folder / "unet")
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    weights, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        file.parent, weight_name=file.name, return_lora_metadata=True, unet_config=theirs.config
    )
    StableDiffusionPipeline.load_lora_into_unet(weights, alphas, theirs, adapter_name="first", metadata=metadata)
    return theirs


def require_same_output(theirs: UNet2DConditionModel, ours: Tensor) -> None:
    with torch.no_grad():
        found = theirs(*inputs()).sample
    assert (found - predict(network())).abs().max() > 0.01
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.8, -1.5])
def test_file_is_merged_as_diffusers_does_at_the_same_scale(tmp_path: Path, scale: float) -> None:
    pytest.importorskip("peft")
    save_adapters(tmp_path, of_denoiser(adapted()), LORA)
    theirs, ours = of_diffusers(tmp_path, tmp_path / FILE_NAME), read_back(tmp_path, scale)
    theirs.set_adapters(["first"], [scale])
    require_same_output(theirs, ours)
    theirs.set_adapters(["first"], [1.0])
    theirs.fuse_lora(lora_scale=scale)
    require_same_output(theirs, ours)


@pytest.mark.parametrize("rslora", [False, True])
def test_file_of_peft_with_ranks_and_alphas_of_its_own_is_read(tmp_path: Path, rslora: bool) -> None:
    """Convolutions too, and layers of different rank."""
    peft = pytest.importorskip("peft")
    network().save_pretrained(tmp_path / "unet")
    made = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "proj_in", "conv1", "ff.net.2"]}
    patterns = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 7, "conv1": 2}}
    made.add_adapter(peft.LoraConfig(**options, **patterns, use_rslora=rslora, init_lora_weights=False))
    made.save_lora_adapter(tmp_path / "bare")
    weights = load_file(tmp_path / "bare" / FILE_NAME)
    metadata = made.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=metadata)
    require_same_output(made.eval(), read_back(tmp_path))


def test_file_of_kohya_is_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    renamed = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapters_of(adapted().state_dict()).items():
        layer, part = name.rsplit(".lora_", 1)
        start = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{start}.{renamed[f'lora_{part[0]}']}.weight"] = tensor
        tensors[f"{start}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "other.safetensors")
    theirs = of_diffusers(tmp_path, tmp_path / "other.safetensors")
    require_same_output(theirs, read_back(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("[]", "its lora_adapter_metadata is no JSON object"),
        ("{", "not a readable safetensors file"),
        ('{"unet.lora_alpha": NaN}', "not a readable safetensors file"),
        ('{"unet.lora_alpha": "much"}', "damaged: .* has no alpha that is a number"),
        ('{"unet.lora_alpha": [1]}', "damaged: .* has no alpha that is a number"),
        ('{"unet.alpha_pattern": {"(": 1}}', "damaged: .* has no alpha that is a number"),
        ('{"unet.alpha_pattern": 3, "unet.lora_alpha": null}', ""),
        ("{}", ""),
    ],
)
def test_what_a_file_tells_of_its_adapters_may_be_anything(tmp_path: Path, told: str, message: str) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(3, 8), f"{name}.lora_B.weight": torch.ones(12, 3)}
    save_file(tensors, tmp_path / "x", {"lora_adapter_metadata": told})
    if not message:
        load_adapters(str(tmp_path / "x")).merge(network(), 1.0)
        return
    with pytest.raises(UserError, match=rf"^lora=\S+: {message}"):
        load_adapters(str(tmp_path / "x")).merge(network(), 1.0)


@pytest.mark.parametrize(("a", "b"), [((0, 8), (12, 0)), ((3, 8), (12, 2)), ((3,), (12, 3))])
def test_matrices_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{name}.lora_A.weight": torch.ones(a), f"{name}.lora_B.weight": torch.ones(b)}, tmp_path / "x")
    with pytest.raises(UserError, match=r"^lora=\S+: damaged: the two matrices of \S+ do not fit"):
        load_adapters(str(tmp_path / "x")).merge(network(), 1.0)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^lora=\S+: no such file; name one of adapters .* or a folder with pytorch_lo"
    ):
        load_adapters(str(tmp_path))
    (tmp_path / FILE_NAME).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"^lora=\S+: not a readable safetensors file"):
        load_adapters(str(tmp_path))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    a, b = torch.ones(3, 8), torch.ones(12, 3)
    wrong = {
        r"of another network: unet= has no layer 'down_blocks_7_to_k'": {"unet.down_blocks.7.to_k": (a, b)},
        r"of another network: down_blocks\.0\.\S+\.attn2\.to_k is 12 x 9 there, 12 x 8 in": {
            layer: (torch.ones(3, 9), b)
        },
        r"damaged: down_blocks\.0\.\S+\.attn2\.to_k lacks one of its two": {layer: (a,)},
        r"'text_encoder\.fc1\.lora_A\.weight' is no adapter of a U-Net": {"text_encoder.fc1": (a, b)},
    }
    for message, layers in wrong.items():
        named = {f"{name}.lora_{'AB'[i]}.weight": tensor for name, ts in layers.items() for i, tensor in enumerate(ts)}
        save_file(named, tmp_path / "x")
        with pytest.raises(UserError, match=rf"^lora=\S+: {message}"):
            load_adapters(str(tmp_path / "x")).merge(network(), 1.0)
