"""Attention control reaches every attention layer and costs the result nothing when it changes nothing."""

import torch
from torch import Tensor

from conf.networks import UNetConfig
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


def test_control_sees_the_probabilities_of_every_layer() -> None:
    network, inputs = network_and_inputs()
    seen: dict[str, tuple[torch.Size, bool]] = {}

    def watch(probs: Tensor, name: str, is_cross: bool) -> Tensor:
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        seen[name] = (probs.shape, is_cross)
        return probs

    controlled = network(*inputs, attn_control=watch)
    torch.testing.assert_close(controlled, network(*inputs), rtol=1e-4, atol=1e-5)
    assert set(seen) == {name for name, module in network.named_modules() if isinstance(module, Attention)}
    assert seen["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == ((2, 2, 64, 64), False)
    assert seen["mid_block.attentions.0.transformer_blocks.0.attn2"] == ((2, 2, 16, 5), True)


def test_control_replaces_the_probabilities() -> None:
    """Words that share the attention evenly, but for one that gets none: that one cannot change the picture."""
    network, (sample, timesteps, context) = network_and_inputs()
    other = context.clone()
    other[:, 2] = 9.0

    def without_word_2(probs: Tensor, name: str, is_cross: bool) -> Tensor:
        return torch.full_like(probs, 0.25).index_fill(-1, torch.tensor(2), 0.0) if is_cross else probs

    assert not torch.allclose(network(sample, timesteps, context), network(sample, timesteps, other), atol=1e-3)
    with_control = [network(sample, timesteps, text, attn_control=without_word_2) for text in (context, other)]
    torch.testing.assert_close(*with_control, rtol=1e-4, atol=1e-5)
