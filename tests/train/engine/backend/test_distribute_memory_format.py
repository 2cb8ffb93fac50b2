"""The memory layouts that the convolutions of a network compiled for a GPU get, read from inductor's own plan.

No GPU is needed: dynamo and autograd trace as ever, tensors have no values, and inductor lowers each graph as for an
H100 up to the code of its kernels. What runs between the graphs does so as CUDA does it: a group norm there returns its
channels one after the other, whatever it was given.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor import config, decomposition, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from conf.entry import compose
from conf.schema import UNetRun
from conf.schema.networks import UNetConfig
from models import layers
from models.unet import UNet
from train.engine.backend.distribute import compile_blocks

# Torch looks at the gradients of the inputs that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
compile_fx = importlib.import_module("torch._inductor.compile_fx")  # torch._inductor has a function of that name
ATEN, CUDA = torch.ops.aten, torch.device("cuda", 0)
GROUP_NORM = ATEN.native_group_norm.default
H100 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)  # type: ignore[arg-type]
FORWARD, BACKWARD = (ATEN.convolution.default,), (ATEN.convolution_backward.default,)


class Convolutions(TorchDispatchMode):
    """Counts convolutions, forward and backward, and those of them that get channels one after the other (NCHW)."""

    def __init__(self) -> None:
        super().__init__()
        self.all = {"forward": 0, "backward": 0}
        self.nchw = {"forward": 0, "backward": 0}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo may trace, and does so without this mode."""
        return True

    def count(self, way: str, given: list[tuple[Any, Any]]) -> None:
        """`given`: sizes and strides of what it convolves; of its gradient, too, going backward."""
        self.all[way] += 1
        self.nchw[way] += not all(stride[1] == 1 or size[1] == 1 for size, stride in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is GROUP_NORM:
            return out[0].contiguous(), *out[1:]
        if func in FORWARD + BACKWARD:
            tensors = args[:1] if func in FORWARD else args[:2]
            self.count("forward" if func in FORWARD else "backward", [(x.shape, x.stride()) for x in tensors])
        return out

    def lower(self, graph: Any, inputs: Any, is_backward: bool = False, **_: Any) -> Any:
        """In the place of inductor's code generation: plan the kernels, give out what has their layouts."""
        compile_fx.view_to_reshape(graph)
        compile_fx.record_original_output_strides(graph)
        mode = detect_fake_mode(inputs)
        assert mode is not None
        with _disable_current_modes(), mode:  # inductor asks convolutions for their layouts
            for node in graph.graph.nodes:
                node.meta = tree_map_only(Tensor, on_cuda, node.meta)
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
            plan = GraphLowering(graph, is_inference=False, is_backward=is_backward)
            with V.set_graph_handler(plan), V.set_fake_mode(mode):
                plan.run(*map(on_cuda, inputs))
        operation: Any
        for operation in plan.operations:
            kernel = getattr(operation, "python_kernel_name", None) or ""
            if "convolution" in kernel:
                way = "backward" if "backward" in kernel else "forward"
                given = operation.inputs[: 2 if way == "backward" else 1]
                self.count(way, [(x.get_size(), x.get_stride()) for x in given])
        layouts = [out.maybe_get_layout() if isinstance(out, ir.IRNode) else None for out in plan.graph_outputs]
        context = TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.extend(None if layout is None else tuple(layout.stride) for layout in layouts)

        def give(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [None if x is None else torch.empty_strided(x.size, x.stride, dtype=x.dtype) for x in layouts]

        give._boxed_call = True  # type: ignore[attr-defined]
        return give


def on_cuda(x: Any) -> Any:
    """Like `x`, on a GPU that is not there."""
    return x if not isinstance(x, Tensor) else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Convolutions]:
    counted, norm, real = Convolutions(), decomposition.decompositions[GROUP_NORM], torch.compile
    monkeypatch.setattr(layers, "FEW_PIXELS", 0)  # a rule of the CPU
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: H100))
    monkeypatch.setitem(
        decomposition.decompositions, GROUP_NORM, lambda x, *rest, **named: norm(x.contiguous(), *rest, **named)
    )

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=counted.lower)

    monkeypatch.setattr(torch, "compile", lambda call, **named: real(call, backend=backend, fullgraph=True, **named))
    with config.patch(force_layout_optimization=False):
        yield counted
    torch._dynamo.reset()


def step(cfg: UNetConfig, counted: Convolutions, compiled_for: str | None) -> None:
    """One forward and one backward pass of 64 x 64 latents."""
    autograd_thread = torch.autograd.set_multithreading_enabled(False)  # other threads know no dispatch mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = UNet(cfg)
        if compiled_for is not None:
            compile_blocks(network, torch.device(compiled_for))
        given = torch.empty(2, cfg.in_channels, 64, 64), torch.empty(2), torch.empty(2, 77, cfg.cross_attention_dim)
        with autograd_thread, counted:
            network(*given).sum().backward()


def model(experiment: str) -> UNetConfig:
    return compose("train_unet", UNetRun, [f"experiment={experiment}", "run_dir=unused"]).model


def test_stable_diffusion_compiled_for_a_gpu_gives_every_convolution_its_channels_last(
    convolutions: Convolutions,
) -> None:
    step(model("sd1_512"), convolutions, compiled_for="cuda")
    assert convolutions.all == {"forward": 66, "backward": 66}
    assert convolutions.nchw == {"forward": 0, "backward": 0}


@pytest.mark.parametrize("compiled_for", [None, "cpu"], ids=["eager", "as inductor decides"])
def test_without_it_most_convolutions_get_their_channels_first(
    convolutions: Convolutions, compiled_for: str | None
) -> None:
    step(model("smoke"), convolutions, compiled_for)
    assert convolutions.all["forward"] == convolutions.all["backward"] > 20
    assert all(2 * count > convolutions.all[way] for way, count in convolutions.nchw.items())
