"""What a GPU makes of this project, in fifteen minutes and one line: `python bench/gpu_check.py | tee check.jsonl`.

Each section is a process of its own with a time limit, so that one which fails or hangs costs only itself, and prints
JSON lines to be pasted into a report. `--only speed` runs one section in this process, `--device cpu --tiny` all where
there is no GPU, to see that the script itself works. Beside timings it compares with what a CPU computes, so that the
last line, `{"name": "gpu_check", "holds": true}`, says whether all sections ended and all errors were small.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.entry import compose
from conf.schema import AutoencoderRun, Device, Precision, RuntimeConfig, UNetRun
from models.attention import FeedForward, SpatialTransformer
from models.autoencoder import Autoencoder
from models.flops import unet_flops
from models.layers import NearestConv2d, ResBlock, SiluConv2d
from models.unet import UNet
from train.engine.accelerators import device_name, peak_flops
from train.engine.precision import autocast
from train.engine.runtime import set_numerics
from train.engine.sample_rng import normal, uniform

ROOT = Path(__file__).parents[1]
HEADS = ((40, 4096), (64, 4096), (80, 1024), (160, 256), (512, 1024))  # channels of a head, and pixels
SAMPLES = range(32)
LOW, EXACT = 2e-2, 1e-4  # largest relative errors, in 16 bits and in fp32 without TF32
Line = dict[str, Any]


class Machine:
    """The device, and how it is timed."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny, self.cuda = torch.device(device), tiny, device == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int = 6) -> float:
        """Median after three for warming up."""
        for _ in range(1 if self.tiny else 3):
            work()
        found = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        return sorted(found)[times // 2]

    def unet(self) -> UNet:
        """Stable Diffusion 1's, or the smallest that has all its parts."""
        options = ["experiment=smoke"] if self.tiny else ["model=sd1"]
        with self.device:
            return UNet(compose("train_unet", UNetRun, ["run_dir=unused", *options]).model)

    def inputs(self, network: UNet, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, times and text states."""
        cfg = network.cfg
        assert cfg.cross_attention_dim is not None
        latents = torch.randn(batch, cfg.in_channels, cfg.sample_size, cfg.sample_size, device=self.device)
        text = torch.randn(batch, 77, cfg.cross_attention_dim, device=self.device)
        return latents, 999 * torch.rand(batch, device=self.device), text


def environment(on: Machine) -> Iterator[Line]:
    """Versions, and what the device multiplies and copies."""
    size, space = (256, 1 << 20) if on.tiny else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    plain = torch.empty(space, device=on.device, dtype=torch.uint8)
    yield {
        "torch": torch.__version__,
        "device": device_name(on.device) or "cpu",
        "bf16_tflops": 2e-12 * size**3 / on.seconds(lambda: left @ right),
        "copy_tb_per_s": 2e-12 * space / on.seconds(plain.clone),
    }


def layers(on: Machine) -> Iterator[Line]:
    """Outputs and all gradients of the layers with backward passes of their own, against fp64 on the CPU."""
    torch.manual_seed(0)
    image, text = torch.randn(2, 64, 16, 16), torch.randn(2, 7, 48)
    cases: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "SiluConv2d": (SiluConv2d(64, 32), (image,)),
        "NearestConv2d": (NearestConv2d(64, 32, 3), (image,)),
        "ResBlock": (ResBlock(64, 32, 128, 8, 1e-5), (image, torch.randn(2, 128))),
        "FeedForward": (FeedForward(64), (torch.randn(2, 50, 64),)),
        "SpatialTransformer": (SpatialTransformer(64, 2, 48, 1, 8, False), (image, text)),
    }

    def gradients(network: nn.Module, inputs: tuple[Tensor, ...], low: torch.dtype | None) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        control = (None,) * isinstance(network, SpatialTransformer)
        with torch.autocast(leaves[0].device.type, low, enabled=low is not None):
            output = network(*leaves, *control)
        return [output, *torch.autograd.grad(output.double().square().mean(), [*leaves, *network.parameters()])]

    types = {"fp32": None, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if on.cuda else {})
    for name, (network, inputs) in cases.items():
        exact = gradients(copy.deepcopy(network).double(), tuple(tensor.double() for tensor in inputs), None)
        for precision, low in types.items():
            there = tuple(tensor.to(on.device) for tensor in inputs)
            found = gradients(copy.deepcopy(network).to(on.device), there, low)
            pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(found, exact, strict=True)]
            worst = max(relative_error(pairs[:1]), relative_error(pairs[1:]))
            yield {"layer": name, "precision": precision, "error": worst, "holds": worst < (LOW if low else EXACT)}


def relative_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of tensors and those that they should be, all together."""
    wrong, right = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True))
    return float((wrong - right).norm() / right.norm())


def attention(on: Machine) -> Iterator[Line]:
    """Milliseconds of a forward and backward pass of attention, by the kernel, for the heads of our networks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for channels, pixels in HEADS if on.cuda else HEADS[3:4]:
        shape = (4, 1 if channels == 512 else 8, pixels, channels)
        q = torch.randn(shape, device=on.device, dtype=torch.bfloat16, requires_grad=True)

        def attend(q: Tensor = q) -> None:
            F.scaled_dot_product_attention(q, q, q).sum().backward()

        line: Line = {"head": channels, "pixels": pixels, "default_ms": 1e3 * on.seconds(attend)}
        for kernel in kernels if on.cuda else []:
            try:
                with sdpa_kernel(kernel):
                    line[kernel.name.lower()] = 1e3 * on.seconds(attend)
            except RuntimeError as error:  # it has none for this head
                line[kernel.name.lower()] = str(error).splitlines()[0][:60]
        yield line


def drawn(shape: tuple[int, ...]) -> None:
    """What a training draws for some samples."""
    for purpose in ("noise", "posterior"):
        normal(0, SAMPLES, shape, purpose)
    uniform(0, SAMPLES, "timestep")


def draws(on: Machine) -> Iterator[Line]:
    """What noise costs the processes that load, and what the device would take for as much."""
    for side in (32, 64, 128):
        own = on.seconds(partial(drawn, (4, side, side)), 3)
        there = on.seconds(partial(torch.randn, 2 * len(SAMPLES), 4, side, side, device=on.device), 3)
        yield {
            "side": side,
            "us_per_sample": 1e6 * own / len(SAMPLES),
            "device_us_per_sample": 1e6 * there / len(SAMPLES),
        }


def speed(on: Machine) -> Iterator[Line]:
    """Forward and backward pass of Stable Diffusion 1, as it is, in other layouts and compiled."""
    batch, network = 2 if on.tiny else 32, on.unet()
    inputs, cfg = on.inputs(network, batch), network.cfg
    flops = 3 * batch * unet_flops(cfg, cfg.sample_size, cfg.sample_size, 77)

    def measured(variant: str, call: Callable[..., Tensor]) -> Line:
        def step() -> None:
            network.zero_grad(set_to_none=True)
            with autocast(on.device, Precision.bf16):
                output = call(*inputs)
            output.float().square().mean().backward()

        began = time.perf_counter()
        step()
        on.wait()
        first = time.perf_counter() - began
        if on.cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = on.seconds(step)
        peak = peak_flops(device_name(on.device), Precision.bf16)
        line = {"variant": variant, "batch": batch, "first_s": first, "ms": 1e3 * taken, "images_per_s": batch / taken}
        memory = torch.cuda.max_memory_allocated() / 2**30 if on.cuda else 0.0
        return line | ({"mfu": flops / taken / peak} if peak else {}) | ({"peak_gib": memory} if on.cuda else {})

    yield measured("eager", network)
    network.to(memory_format=torch.channels_last)
    yield measured("eager, weights channels last", network)
    if on.tiny and not on.cuda:  # a compiler takes minutes, and finds nothing that a test does not
        return
    torch._dynamo.config.recompile_limit = 128  # all blocks of a class share one code object
    for level in [*network.down_blocks, network.mid_block, *network.up_blocks]:
        for part in [*level.resnets, *level.attentions]:
            part.compile(dynamic=False)
    yield measured("compiled by block, weights channels last", network)
    torch._dynamo.reset()
    torch._inductor.config.force_layout_optimization = True
    network = on.unet()
    yield measured("compiled whole, layout forced", torch.compile(network))


def autoencoder(on: Machine) -> Iterator[Line]:
    """Images per second that the frozen autoencoder of Stable Diffusion encodes."""
    options = ["experiment=smoke"] if on.tiny else ["model=kl_f8"]
    with on.device:
        network = Autoencoder(compose("train_autoencoder", AutoencoderRun, ["run_dir=unused", *options]).model).eval()
    for side, batch in ((32, 2),) if on.tiny else ((256, 64), (512, 16)):
        images = torch.randn(batch, network.cfg.in_channels, side, side, device=on.device)

        @torch.no_grad()
        def encode(images: Tensor = images) -> None:
            with autocast(on.device, Precision.bf16):
                network.encode(images)

        yield {"side": side, "images_per_s": batch / on.seconds(encode)}


def curves(on: Machine) -> Iterator[Line]:
    """The smoke experiment's U-Net on the device: against the CPU, twice, stopped and resumed, and in bf16."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = [sys.executable, "train/pipeline.py", "experiment=smoke", f"run_dir={folder}/smoke", "runtime=cpu"]
        done = command([*prepared, "stages=[build,autoencoder,clip,latents]"])
        if done is not None:
            yield {"holds": False, "error": done}
            return
        exact = ["runtime.deterministic=true"]
        reference, _ = trained(folder, "cpu", 512, "runtime.device=cpu")
        first, problem = trained(folder, "first", 512, f"runtime.device={on.device.type}", *exact)
        worst = difference(first, reference)
        yield {"curve": "fp32 against the CPU", "error": problem or worst, "holds": worst < 1e-3}
        second, _ = trained(folder, "second", 512, f"runtime.device={on.device.type}", *exact)
        yield {"curve": "the same again", "identical": first == second, "holds": first == second}
        trained(folder, "stopped", 256, f"runtime.device={on.device.type}", *exact)
        resumed, _ = trained(folder, "stopped", 512, f"runtime.device={on.device.type}", *exact)
        yield {"curve": "stopped and resumed", "identical": resumed == first, "holds": resumed == first}
        low, problem = trained(folder, "bf16", 512, f"runtime.device={on.device.type}", "runtime.precision=bf16")
        last = difference({512: low.get(512, float("nan"))}, reference)
        yield {"curve": "bf16, last loss", "error": problem or last, "holds": last < 2e-2}


def trained(folder: Path, name: str, samples: int, *options: str) -> tuple[dict[int, float], str | None]:
    """Losses by samples seen of a training by the project's own command, and what it says if it fails."""
    own = [f"run_dir={folder}/smoke", f"output_dir={folder}/{name}", f"loop.samples={samples}", "loop.log_every=16"]
    quiet = ["wandb.mode=disabled", "evaluation.samples=0", "sample_prompts=0", "runtime.backend=ddp"]
    problem = command([sys.executable, "train/train_unet.py", "experiment=smoke", *own, *quiet, *options])
    path = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["samples_seen"]: row["train/loss"] for row in rows if "train/loss" in row}, problem


def difference(found: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative one; infinite where a point is missing."""
    if not found or found.keys() - reference.keys():
        return float("inf")
    return max(abs(found[at] - reference[at]) / abs(reference[at]) for at in found)


def backends(on: Machine) -> Iterator[Line]:
    """DDP, FSDP2, ZeRO 0 to 3 with all offloads, resumes, bf16 and fp16, in one process: against the CPU."""
    worker, numbers = ROOT / "tests/integration/zero_worker.py", list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", on.device.type):
            out = Path(folder) / device
            out.mkdir(exist_ok=True)
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            problem = command([sys.executable, str(worker), str(out)], **hidden)
            if problem is not None:
                yield {"device": device, "error": problem, "holds": False}
                return
            numbers.append(json.loads((out / "numbers.json").read_text()))
    for name, value in numbers[0].items():
        ours, theirs = flat(numbers[1].get(name)), flat(value)
        if theirs and len(ours) == len(theirs):
            worst = max(abs(a - b) / (abs(b) + 1e-12) for a, b in zip(ours, theirs, strict=True))
            low = "bf16" in name or "fp16" in name
            yield {"curve": name, "error": worst, "holds": worst < (LOW if low else EXACT)}


def flat(value: Any) -> list[float]:
    """Numbers of a list or of lists in one."""
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [float(value)] if isinstance(value, float) else []


def command(line: list[str], **environment: str) -> str | None:
    """Run a command of the project; what it says at the end if it fails."""
    done = subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr or done.stdout)[-400:]


SECTIONS: dict[str, tuple[Callable[[Machine], Iterator[Line]], int]] = {  # with seconds, in the order of their worth
    "environment": (environment, 60),
    "layers": (layers, 60),
    "draws": (draws, 60),
    "speed": (speed, 240),
    "curves": (curves, 300),
    "backends": (backends, 240),
    "attention": (attention, 60),
    "autoencoder": (autoencoder, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, help="one section, in this process")
    parser.add_argument("--device", default="cuda", choices=[Device.cuda.value, Device.cpu.value])
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that the script works")
    parser.add_argument("--budget", type=float, default=840.0, help="seconds in all, after which no section begins")
    arguments = parser.parse_args()
    if arguments.only:
        machine = Machine(arguments.device, arguments.tiny)
        set_numerics(RuntimeConfig(tf32=arguments.only == "speed"), machine.device)
        lines = [show(arguments.only, line) for line in SECTIONS[arguments.only][0](machine)]
        raise SystemExit(not all(line.get("holds", True) for line in lines))
    began, failed = time.monotonic(), list[str]()
    for name, (_, limit) in SECTIONS.items():
        left = arguments.budget - (time.monotonic() - began)
        options = [__file__, "--only", name, "--device", arguments.device, *["--tiny"] * arguments.tiny]
        try:
            code: int | str = subprocess.run([sys.executable, *options], timeout=max(1.0, min(limit, left))).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        failed += [name] if code else []
        show(name, {"ended": code, "seconds": time.monotonic() - began})
    show("gpu_check", {"name": "gpu_check", "holds": not failed, "failed": failed})
    raise SystemExit(bool(failed))


def show(section: str, line: Line) -> Line:
    """Print a line, its numbers to four places."""
    short = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps({"section": section, **short}), flush=True)
    return line


if __name__ == "__main__":
    main()
