"""Low-rank adapters: they begin as nothing, merge into the weights, and diffusers reads their file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.networks import UNetConfig
from conf.schema import LoraConfig
from models.lora import FILE_NAME, add_adapters, merged, save_adapters
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
    save_adapters(tmp_path, unet.state_dict(), lora)
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
    save_adapters(tmp_path, unet.state_dict(), LORA)
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
