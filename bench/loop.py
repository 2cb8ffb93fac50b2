"""What our loop costs beside a bare one: the same U-Net, batches, optimiser and average, written out in plain torch.

The networks have the sizes of `experiment=demo` and random weights; the latents are those of rendered scenes.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import _diffusers_example
import torch
from _compare import Comparison, main
from _networks import THREADS, seconds
from torch import Tensor, nn

from conf.entry import compose, to_plain
from conf.schema import AutoencoderRun, BuildRun, ClipRun, PrecomputeRun, RuntimeConfig, UNetRun
from data.building.build import build_shards
from data.image_dataset import ImageDataset
from data.latent_dataset import LatentDataset
from data.loader import batches, sequential
from models.autoencoder import Autoencoder, sample_moments
from models.clip import Clip
from models.unet import UNet
from train.engine import trainer
from train.engine.checkpoint import Checkpoints
from train.engine.runtime import Runtime, start
from train.engine.state import State
from train.latents import precompute as latents
from train.training.unet import UNetStage

STEPS, WARMUP, NEVER = 12, 3, 10**9
PLAIN = "runtime.backend=ddp"  # nothing but the network, where there is one process
SHORT = [f"loop.log_every={NEVER}", f"loop.evaluate_every={NEVER}", f"loop.checkpoint_every={NEVER}"]


def configured(name: str, schema: Any, folder: Path, *overrides: str) -> Any:
    """The demo's options for a command, in this folder."""
    return compose(name, schema, ["experiment=demo", f"run_dir={folder}", *overrides])


def prepare(folder: Path, runtime: Runtime) -> None:
    """Scenes, frozen networks that have learnt nothing, and the latents that they make."""
    torch.manual_seed(0)
    build_shards(configured("build_shards", BuildRun, folder, "samples=640", "shard_samples=320"))
    Autoencoder(configured("train_autoencoder", AutoencoderRun, folder).model).save_pretrained(
        folder / "autoencoder/export"
    )
    Clip.from_config(configured("train_clip", ClipRun, folder).model).save_pretrained(folder / "clip/export")
    cfg = configured("precompute_latents", PrecomputeRun, folder, "min_psnr=-100", "wandb.mode=disabled")
    latents.run_precompute(cfg, runtime, to_plain(cfg))


def training(folder: Path, *overrides: str) -> UNetRun:
    """The demo's U-Net for some steps, with nothing in between: under DeepSpeed and by AdamW, unless told otherwise."""
    usual = ["runtime=cpu", "runtime.backend=deepspeed", "optim.name=adamw", "wandb.mode=disabled", "sample_prompts=0"]
    given = {item.partition("=")[0]: item for item in [*usual, *SHORT, *overrides]}.values()
    return configured("train_unet", UNetRun, folder, *given)


def our_loop(folder: Path, runtime: Runtime, *overrides: str) -> Callable[[], float]:
    """Seconds per step of the product's own loop, from the end of one optimiser step to the end of a later one."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as output_dir:
            length = f"loop.samples={32 * (WARMUP + STEPS)}"
            cfg = training(folder, f"output_dir={output_dir}", length, *overrides)
            stage, ends = UNetStage(cfg, runtime), list[float]()
            finish_step = stage.finish_step

            def noted(samples_seen: int) -> dict[str, Tensor | float]:
                found = finish_step(samples_seen)
                ends.append(time.perf_counter())
                return found

            stage.finish_step = noted  # type: ignore[method-assign]
            trainer.fit(stage, cfg, runtime)
        return (ends[-1] - ends[WARMUP - 1]) / STEPS

    return measure


def bare_loop(folder: Path) -> Callable[[], float]:
    """Seconds per step of a loop as one writes it by hand: batches, flow loss, clipping, AdamW, average."""
    cfg = training(folder)
    step = bare_step(cfg)
    dataset = LatentDataset(folder / "latents/train", 0)

    def measure() -> float:
        source = batches(dataset, 32, 32, 0, 1, 0, 0)
        for index in range(WARMUP + STEPS):
            if index == WARMUP:
                began = time.perf_counter()
            batch = next(source)
            step(sample_moments(batch["moments"].float(), torch.randn(32, *network_shape(cfg))), batch["text"].float())
        return (time.perf_counter() - began) / STEPS

    return measure


def network_shape(cfg: UNetRun) -> tuple[int, int, int]:
    """(C, h, w) of a latent."""
    return cfg.model.in_channels, cfg.model.sample_size, cfg.model.sample_size


def bare_step(cfg: UNetRun) -> Callable[[Tensor, Tensor], None]:
    """One optimiser step of a new network on latents [B, C, h, w] and text states [B, L, D]."""
    torch.manual_seed(0)
    network = UNet(cfg.model)
    parameters: list[Tensor] = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.optim.lr, betas=(cfg.optim.beta1, cfg.optim.beta2), fused=True)

    def step(x0: Tensor, context: Tensor) -> None:
        noise, t = torch.randn_like(x0), torch.sigmoid(torch.randn(len(x0)))
        mix = t.view(-1, 1, 1, 1)
        loss = (network((1 - mix) * x0 + mix * noise, 1000 * t, context) - (noise - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, cfg.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.001)
        loss.item()

    return step


def checkpoint_stall(folder: Path, runtime: Runtime) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds that an asynchronous checkpoint adds to the steps around it, and seconds of a step."""
    stage, cfg = UNetStage(training(folder), runtime), training(folder)
    source = batches(stage.dataset, 32, 32, 0, 1, 0, 0)
    output = tempfile.TemporaryDirectory()
    checkpoints, seen = Checkpoints(Path(output.name), runtime, cfg.loop), [0]

    def steps(count: int, save: bool) -> float:
        began = time.perf_counter()
        for index in range(count):
            stage.micro_step(next(source), True, seen[0])
            seen[0] += 32
            stage.finish_step(seen[0])
            if save and index == 0:
                checkpoints.save(stage.trainables, State(samples_seen=seen[0]), wait=False)
        return time.perf_counter() - began

    def stall() -> float:
        without = steps(4, save=False)
        return max(1e-9, steps(4, save=True) - without)

    return stall, lambda: steps(4, save=False) / 4


def average_share(folder: Path, runtime: Runtime) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of the average's update, and of a step."""
    stage = UNetStage(training(folder), runtime)
    source, average = batches(stage.dataset, 32, 32, 0, 1, 0, 0), stage.unet.ema
    assert average is not None
    masters = stage.unet.backend.masters

    def step() -> None:
        stage.micro_step(next(source), True, 32)
        stage.finish_step(32)

    return seconds(lambda: average.update(masters, 32, 32)), seconds(step)


def encoding_each_step(folder: Path) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of a step on cached latents, and of one that encodes its decoded_images and captions first."""
    cfg = training(folder)
    step = bare_step(cfg)
    autoencoder = Autoencoder.from_pretrained(folder / "autoencoder/export")
    clip = Clip.from_pretrained(folder / "clip/export")
    cached = batches(LatentDataset(folder / "latents/train", 0), 32, 32, 0, 1, 0, 0)
    images = compose("train_autoencoder", AutoencoderRun, ["experiment=demo", "run_dir=unused"]).images
    decoded_images = next(sequential(ImageDataset(folder / "shards/train", images, 0), range(32), 32))
    noise = torch.randn(32, *network_shape(cfg))

    def from_cache() -> None:
        batch = next(cached)
        step(sample_moments(batch["moments"].float(), noise), batch["text"].float())

    def from_images() -> None:
        with torch.no_grad():
            moments = autoencoder.encode(decoded_images["image"])
            context = clip.text_states(clip.tokenize(decoded_images["caption"]))
        step(sample_moments(moments, noise), context)

    return seconds(from_cache), seconds(from_images)


def comparisons(folder: Path, runtime: Runtime) -> Iterator[Comparison]:
    """Each in seconds; the bars are the project's own."""
    with redirect_stdout(sys.stderr):
        prepare(folder, runtime)
    for name, pair, bar in (
        ("step_of_our_loop_against_bare_torch", (our_loop(folder, runtime, PLAIN), bare_loop(folder)), 1.03),
        ("the_same_under_deepspeed_zero_2", (our_loop(folder, runtime), bare_loop(folder)), 1.03),
        ("stall_by_a_checkpoint_in_steps", checkpoint_stall(folder, runtime), 1.0),
        ("average_of_the_weights_in_steps", average_share(folder, runtime), 0.02),
        ("step_on_cached_latents_against_encoding", encoding_each_step(folder), 1.0),
    ):
        ours, peer = map(quietly, pair)
        yield Comparison(name=name, ours=ours, peer=peer, unit="s", bar=bar, lower_is_better=True, pairs=5)
    if "DIFFUSERS_EXAMPLE" in os.environ:
        yield from _diffusers_example.comparisons(folder, os.environ["DIFFUSERS_EXAMPLE"])
    else:
        print("DIFFUSERS_EXAMPLE is not set: left out, see bench/_diffusers_example.py", file=sys.stderr)


def quietly(measure: Callable[[], float]) -> Callable[[], float]:
    """The same with the console lines of a training on stderr: stdout has the comparisons alone."""

    def run() -> float:
        with redirect_stdout(sys.stderr):
            return measure()

    return run


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        main(comparisons(Path(name), start(RuntimeConfig(threads=THREADS))))
