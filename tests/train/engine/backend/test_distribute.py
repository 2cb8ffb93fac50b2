"""Compiling a network block by block: the same numbers, and no graph more than blocks and shapes."""

from collections import Counter
from typing import Any

import pytest
import torch

from conf.entry import compose
from conf.schema import UNetRun
from models.attention import SpatialTransformer, TransformerBlock
from models.layers import Downsample, ResBlock, Upsample
from models.unet import UNet
from train.engine.backend.distribute import compile_blocks

SHAPES = ((8, 8), (8, 16), (16, 8), (8, 8))  # latents of three aspects; the last one is known


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at its inputs
def test_each_block_has_one_graph_for_each_shape_and_computes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = UNet(compose("train_unet", UNetRun, ["experiment=smoke", "run_dir=unused"]).model)
    with torch.no_grad():
        for parameter in network.parameters():  # branches start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = [(torch.randn(2, 4, *shape), torch.tensor([10.0, 900.0]), torch.randn(2, 7, 16)) for shape in SHAPES]
    expected = [(network(*given), gradient(network, *given)) for given in inputs]
    real, graphs, compiled = torch.compile, list[Any](), Counter[tuple[type, str]]()

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_(call: Any, **named: Any) -> Any:
        compiled[type(call.__self__), call.__name__] += 1
        return real(call, backend=count, fullgraph=True, **named)

    monkeypatch.setattr(torch, "compile", compile_)
    compile_blocks(network, torch.device("cpu"))
    for given, (output, slope) in zip(inputs, expected, strict=True):
        torch.testing.assert_close(network(*given), output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(network, *given), slope, rtol=1e-4, atol=1e-5)
    blocks = {(kind, "forward") for kind in (ResBlock, TransformerBlock, Downsample, Upsample)}
    between = {(SpatialTransformer, "tokens"), (SpatialTransformer, "pixels"), (UNet, "features"), (UNet, "prediction")}
    assert compiled.keys() == blocks | between
    # To a transformer block 8 x 16 and 16 x 8 pixels are one shape: a row of them.
    assert len(graphs) == 3 * compiled.total() - compiled[TransformerBlock, "forward"]
    assert {"conv_in.weight", "mid_block.resnets.0.conv1.weight"} <= dict(network.named_parameters()).keys()


def gradient(network: UNet, *given: torch.Tensor) -> torch.Tensor:
    """The gradient of the first layer's weights."""
    weight = network.conv_in.weight
    return torch.autograd.grad(network(*given).square().mean(), weight)[0]
