"""Encoding a data set: the whole precompute against the bare encoder on batches in memory; two workers against one."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _compare import Comparison, main, rate
from PIL import Image

from conf.entry import compose, to_plain
from conf.schema import ImageFormat, PrecomputeRun
from conf.schema.networks import AutoencoderConfig, ClipConfig
from data.image_dataset import collate
from data.images import encode_image
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.conditions import Conditions
from train.engine.metric_log import MetricLog
from train.engine.runtime import start
from train.latents.encoder import LatentEncoder
from train.latents.precompute import open_splits, precompute

IMAGES, SHARD, BATCH, SIDE = 240, 40, 10, 128  # images, of them in a shard and in a batch, pixels
AUTOENCODER = AutoencoderConfig(
    latent_channels=4, block_out_channels=[64, 128, 128, 128], layers_per_block=2, norm_num_groups=16
)  # a third of Stable Diffusion's width: what is not encoding weighs more here than there
CLIP = ClipConfig(vision_layers=1, vision_width=64, text_layers=4, text_width=128, text_heads=4, context_length=32)
FORK = multiprocessing.get_context("fork")


def write_project(folder: Path) -> None:
    """Shards of smooth noise, whose decoding costs what photographs cost, and two untrained towers."""
    for side, images in (("train", IMAGES), ("heldout", 1)):
        with ShardWriter(folder / "shards" / side, SHARD) as writer:
            for i in range(images):
                coarse = np.random.default_rng(i).integers(256, size=(20, 24, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((192, 160), Image.Resampling.BICUBIC)
                jpg = encode_image(image, ImageFormat.jpg, 90)
                writer.add(f"{i:06d}", {"jpg": jpg, "txt": f"noise number {i}".encode()})
        Manifest(kind="images", shards=writer.finished).save(folder / "shards" / side)
    Autoencoder(AUTOENCODER).save_pretrained(folder / "autoencoder")
    Clip.from_config(CLIP).save_pretrained(folder / "clip")


def config(folder: Path, output: str) -> PrecomputeRun:
    """The command's configuration for a fresh cache."""
    options = [f"{name}={folder / name}" for name in ("shards", "autoencoder", "clip")]
    options += [f"run_dir={folder}", f"output_dir={output}", f"images.resolution={SIDE}", f"batch_size={BATCH}"]
    return compose(
        "precompute_latents",
        PrecomputeRun,
        [*options, "min_psnr=0.1", "check_samples=4", "runtime=cpu", "wandb.mode=disabled"],
    )


def encoder_of(cfg: PrecomputeRun, runtime: Any) -> LatentEncoder:
    """The two towers as the command loads them."""
    autoencoder, clip = Autoencoder.from_pretrained(cfg.autoencoder), Clip.from_pretrained(cfg.clip)
    return LatentEncoder(
        autoencoder.eval(),
        clip.eval(),
        Conditions(cfg.conditions),
        runtime.device,
        runtime.precision,
        text_states=True,
        seed=cfg.seed,
        limit=cfg.batch_size,
    )


def encode_all(cfg: PrecomputeRun, runtime: Any, encoder: LatentEncoder) -> None:
    """The precompute without the start of a process."""
    journal = MetricLog(cfg.output_dir, cfg.wandb, "latents", to_plain(cfg), is_main=False)
    precompute(cfg, encoder, open_splits(cfg, encoder), runtime, journal)


def work(folder: Path, output: str, ready: Any) -> None:
    """One of several workers, with one thread."""
    cfg = config(folder, output)
    cfg.threads = cfg.runtime.threads = 1
    runtime = start(cfg.runtime)
    encoder = encoder_of(cfg, runtime)
    encoder.moments(torch.zeros(1, 3, SIDE, SIDE))
    ready.wait()
    encode_all(cfg, runtime, encoder)


def workers_rate(folder: Path, count: int) -> float:
    """Images per second of `count` workers on one fresh cache."""
    with tempfile.TemporaryDirectory() as output:
        ready = FORK.Barrier(count + 1)
        workers = [FORK.Process(target=work, args=(folder, output, ready)) for _ in range(count)]
        for worker in workers:
            worker.start()
        ready.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")
    return IMAGES / seconds


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Workers first: a process that has computed with threads cannot be forked."""
    yield Comparison(
        name="two_workers_of_one_thread_against_one",
        ours=lambda: workers_rate(folder, 2),
        peer=lambda: workers_rate(folder, 1),
        unit="images/s",
        bar=1.8,
        pairs=3,
    )
    cfg = config(folder, str(folder / "latents"))
    runtime = start(cfg.runtime)
    encoder = encoder_of(cfg, runtime)
    images = open_splits(cfg, encoder)[0].images
    starts = range(0, IMAGES, cfg.batch_size)
    batches = [collate([images.variants(start + i, 1) for i in range(cfg.batch_size)]) for start in starts]

    def whole() -> None:
        with tempfile.TemporaryDirectory() as output:
            encode_all(config(folder, output), runtime, encoder)

    def bare() -> None:
        for batch in batches:
            encoder.forget()
            encoder(batch)

    yield Comparison(
        name="precompute_against_the_bare_encoder",
        ours=lambda: 1 / rate(1, whole)(),
        peer=lambda: 1 / rate(1, bare)(),
        unit="s",
        bar=1.10,
        lower_is_better=True,
    )


def run() -> None:
    """Write the data in a process of its own, then compare."""
    with tempfile.TemporaryDirectory() as folder:
        writer = FORK.Process(target=write_project, args=(Path(folder),))
        writer.start()
        writer.join()
        main(comparisons(Path(folder)))


if __name__ == "__main__":
    run()
