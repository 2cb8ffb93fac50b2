"""Attention control reaches every attention layer and costs the result nothing when it changes nothing."""

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema.networks import UNetConfig
from models.attention import Attention
from models.unet import UNet

CFG = UNetConfig(
    block_out_channels=[8, 16],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=6,
    attention_head_dim=[2],
    norm_num_groups=4,
)


def network_and_inputs() -> tuple[UNet, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    network = UNet(CFG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network, (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 6))


def test_control_computes_every_layer() -> None:
    network, inputs = network_and_inputs()
    seen: dict[str, tuple[torch.Size, torch.Size, bool]] = {}

    def watch(q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        assert k.shape == v.shape
        seen[name] = (q.shape, k.shape, is_cross)
        return F.scaled_dot_product_attention(q, k, v)

    assert torch.equal(network(*inputs, attn_control=watch), network(*inputs))
    assert set(seen) == {name for name, module in network.named_modules() if isinstance(module, Attention)}
    assert seen["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == ((2, 2, 64, 4), (2, 2, 64, 4), False)
    assert seen["mid_block.attentions.0.transformer_blocks.0.attn2"] == ((2, 2, 16, 8), (2, 2, 5, 8), True)


def test_control_replaces_attention() -> None:
    """Words that share the attention evenly, but for one that gets none: that one cannot change the image."""
    network, (sample, timesteps, context) = network_and_inputs()
    other = context.clone()
    other[:, 2] = 9.0

    def without_word_2(q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        if not is_cross:
            return F.scaled_dot_product_attention(q, k, v)
        return v[:, :, [0, 1, 3, 4]].mean(2, keepdim=True).expand_as(q)

    assert not torch.allclose(network(sample, timesteps, context), network(sample, timesteps, other), atol=1e-3)
    with_control = [network(sample, timesteps, text, attn_control=without_word_2) for text in (context, other)]
    torch.testing.assert_close(*with_control, rtol=1e-4, atol=1e-5)
