"""The U-Net against diffusers' with the same weights and inputs: seconds and memory of a training step and a forward.

The bars are those that the project set itself. Both networks spend nine tenths of their time in the same matrix
products, so `docs/networks.md` sets the seconds against what the machine can multiply.
"""

import tempfile
from collections.abc import Iterator

import torch
from _compare import Comparison, main
from _networks import THREADS, forward, in_seconds_and_bytes, training_step
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from conf.networks import UNetConfig
from models.unet import UNet

TOKENS = 77
ATTEND, UP_ATTEND = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def sized(widths: list[int], side: int, text: int, layers: int) -> UNetConfig:
    """Three levels, of which the lower two attend with heads of 32 channels."""
    return UNetConfig(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=["DownBlock2D", ATTEND, ATTEND],
        up_block_types=[UP_ATTEND, UP_ATTEND, "UpBlock2D"],
        cross_attention_dim=text,
        head_channels=32,
    )


SIZES = {  # name -> configuration and batch
    "8M": (sized([64, 128, 160], 16, 128, 1), 16),
    "53M": (sized([128, 256, 320], 32, 512, 2), 4),
    "165M": (sized([224, 448, 576], 32, 768, 2), 2),
}


def pair(cfg: UNetConfig) -> tuple[UNet, nn.Module]:
    """Ours and diffusers' with the same weights, gradients allocated."""
    torch.manual_seed(0)
    ours = UNet(cfg)
    with torch.no_grad():
        for parameter in ours.parameters():  # layers that start at zero would make every comparison equal
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        peer = UNet2DConditionModel.from_pretrained(folder).train()
    for parameter in (*ours.parameters(), *peer.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    return ours, peer


def comparisons() -> Iterator[Comparison]:
    """Training step and forward pass of each size, in seconds and bytes."""
    for name, (cfg, batch) in SIZES.items():
        ours, peer = pair(cfg)
        sample = torch.randn(batch, cfg.in_channels, cfg.sample_size, cfg.sample_size)
        context = torch.randn(batch, TOKENS, cfg.cross_attention_dim or 0)
        timesteps = torch.linspace(0, 999, batch)

        def mine(ours: UNet = ours, inputs: tuple[Tensor, ...] = (sample, timesteps, context)) -> Tensor:
            return ours(*inputs)

        def theirs(peer: nn.Module = peer, inputs: tuple[Tensor, ...] = (sample, timesteps, context)) -> Tensor:
            return peer(*inputs, return_dict=False)[0]

        expected = theirs()
        torch.testing.assert_close(mine(), expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
        for kind, wrap in (("training_step", training_step), ("forward", forward)):
            yield from in_seconds_and_bytes(f"{kind}_{name}", mine, theirs, wrap)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    main(comparisons())
