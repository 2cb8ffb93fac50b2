"""The U-Net against diffusers' with the same weights and inputs: seconds and memory of a training step and a forward.

The bars are those that the project set itself. Both networks spend nine tenths of their time in the same matrix
products, so a third kind of line sets our seconds against the limit: what as many operations take in one large product.
The smallest network is also compiled, which takes minutes.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _compare import Comparison, main
from _networks import THREADS, forward, in_seconds_and_bytes, peak_bytes, product_seconds, seconds, training_step
from diffusers import UNet2DConditionModel
from torch import Tensor

from conf.schema.networks import UNetConfig
from models.flops import unet_flops
from models.unet import UNet

Call = Callable[[], Tensor]

TOKENS, COMPILED = 77, "8M"
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


def pair(cfg: UNetConfig) -> tuple[UNet, Any]:
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

        def theirs(peer: Any = peer, inputs: tuple[Tensor, ...] = (sample, timesteps, context)) -> Tensor:
            return peer(*inputs, return_dict=False)[0]

        expected = theirs()
        torch.testing.assert_close(mine(), expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
        for kind, wrap in (("training_step", training_step), ("forward", forward)):
            yield from in_seconds_and_bytes(f"{kind}_{name}", mine, theirs, wrap)
            passes = 3 if wrap is training_step else 1
            flops = passes * batch * unet_flops(cfg, cfg.sample_size, cfg.sample_size, TOKENS)
            yield Comparison(
                name=f"{kind}_{name}_of_its_limit",
                ours=seconds(wrap(mine)),
                peer=product_seconds(flops),
                unit="s",
                bar=2.0,
                lower_is_better=True,
            )
        yield with_checkpointing(f"training_step_{name}_checkpointed", ours, peer, mine, theirs)
        if name == COMPILED:
            yield from compiled(name, ours, peer, (sample, timesteps, context))


def with_checkpointing(name: str, ours: UNet, peer: Any, mine: Call, theirs: Call) -> Comparison:
    """Bytes of a training step in which both compute activations again going back."""

    def measured(call: Call, network: Any) -> Callable[[], float]:
        measure = peak_bytes(training_step(call))

        def run() -> float:
            ours.checkpoint_gradients(network is ours)
            (peer.enable_gradient_checkpointing if network is peer else peer.disable_gradient_checkpointing)()
            found = measure()
            ours.checkpoint_gradients(False)
            peer.disable_gradient_checkpointing()
            return found

        return run

    return Comparison(
        name=name,
        ours=measured(mine, ours),
        peer=measured(theirs, peer),
        unit="bytes",
        bar=1.0,
        lower_is_better=True,
        pairs=1,
    )


def compiled(name: str, ours: UNet, peer: Any, inputs: tuple[Tensor, ...]) -> Iterator[Comparison]:
    """Seconds of both under torch.compile, ours as one graph."""
    one_graph, graphs = torch.compile(ours, fullgraph=True), torch.compile(peer)
    for kind, wrap in (("training_step", training_step), ("forward", forward)):
        yield Comparison(
            name=f"{kind}_{name}_compiled",
            ours=seconds(wrap(lambda: one_graph(*inputs))),
            peer=seconds(wrap(lambda: graphs(*inputs, return_dict=False)[0])),
            unit="s",
            bar=1.0,
            lower_is_better=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    main(comparisons())
