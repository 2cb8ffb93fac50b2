"""A training on the CPU that gives way to other processes, against the best fixed number of threads.

The demo's U-Net trains alone, beside one busy process, and while one comes and goes. Each line sets the images per
second with `runtime.threads=0` against the most that a fixed number gives over the whole time. All else must be idle.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache
from multiprocessing import get_context

import torch
from _compare import Comparison, main

from conf.entry import compose
from conf.process import wait_briefly
from conf.schema import Device, RuntimeConfig, UNetRun
from models.unet import UNet
from train.engine.runtime import TORCHS_CHOICE, WINDOW_S, start

BAR = 0.8
TOKENS = 32
FIXED = sorted({1, max(1, TORCHS_CHOICE - 1), TORCHS_CHOICE})
Phases = Sequence[tuple[bool, float]]  # is another process busy, and for how many seconds
SITUATIONS: dict[str, Phases] = {
    "alone": [(False, 12.0)],
    "beside_a_busy_process": [(True, 12.0)],
    "while_one_comes_and_goes": [(False, 10.0), (True, 10.0), (False, 10.0)],
}


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@cache
def training() -> tuple[Callable[[], None], int]:
    """One step of the demo's U-Net, with its optimiser, and the images in it."""
    cfg = compose("train_unet", UNetRun, ["experiment=demo", "run_dir=unused"])
    torch.manual_seed(0)
    network, images = UNet(cfg.model), cfg.batch.global_batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=cfg.optim.lr, fused=True)
    x = torch.randn(images, cfg.model.in_channels, cfg.model.sample_size, cfg.model.sample_size)
    timesteps, context = 1000 * torch.rand(images), torch.randn(images, TOKENS, cfg.model.cross_attention_dim or 0)

    def step() -> None:
        network(x, timesteps, context).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, images


def images_per_s(phases: Phases, threads: int) -> float:
    """The speed over all phases with as many threads; 0: as the training itself chooses."""
    (step, images), done, seconds = training(), 0, 0.0
    with redirect_stdout(sys.stderr):  # of the lines on threads: stdout has the comparisons alone
        with busy_process() if phases[0][0] else nullcontext():
            runtime = start(RuntimeConfig(device=Device.cpu, threads=threads))
            time.sleep(2 * WINDOW_S)  # while which a training reads its data and networks
            runtime.threads.adjust()
        for busy, length in phases:
            with busy_process() if busy else nullcontext():
                began = time.perf_counter()
                while time.perf_counter() - began < length:
                    runtime.threads.adjust()
                    step()
                    done += images
                seconds += time.perf_counter() - began
    return done / seconds


def comparisons(pool: ProcessPoolExecutor) -> Iterator[Comparison]:
    """One for each situation, in a process that began as commands do."""

    def measured(phases: Phases, *numbers: int) -> Callable[[], float]:
        return lambda: max(pool.submit(images_per_s, phases, threads).result() for threads in numbers)

    for name, phases in SITUATIONS.items():
        yield Comparison(
            name=f"training_{name}",
            ours=measured(phases, 0),
            peer=measured(phases, *FIXED),
            unit="images/s",
            bar=BAR,
            pairs=3,
        )


if __name__ == "__main__":
    wait_briefly()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        main(comparisons(pool))
