"""A small project, trained once for all tests of stages and evaluation: scenes, autoencoder, CLIP, latents, U-Net."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose, to_plain
from conf.schema import Device, ImageFormat, RuntimeConfig
from data.images import encode_image
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from train.engine.runtime import Runtime, start
from train.stages.tasks import STAGES

EVERY_STEP = ["loop.log_every=16", "loop.evaluate_every=100000", "loop.checkpoint_every=100000"]
TRAININGS = {
    "autoencoder": ["loop.samples=1600", "loss.adversarial_start=100000", "loss.perceptual=none", "optim.lr=4e-3"],
    "clip": ["loop.samples=960", "optim.lr=2e-3"],
    "unet": ["loop.samples=960", "optim.lr=3e-3", "ema.half_life_samples=50"],
}


class Project:
    """A run folder; `config(stage, option=value …)` is the smoke experiment in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, name: str, *overrides: str) -> Any:
        stage = next(stage for stage in STAGES if stage.name == name)
        given = ["experiment=smoke", f"run_dir={self.folder}"]
        if name != "build":
            given.append("runtime=cpu")
        if name not in ("build", "sample"):
            given.append("wandb.mode=disabled")
        return compose(stage.script.stem, stage.schema, [*given, *overrides])

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """What the stage recorded."""
        return [json.loads(line) for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()]

    def losses(self, stage: str) -> list[float]:
        """`train/loss` of every step."""
        return [row["train/loss"] for row in self.rows(stage) if "train/loss" in row]


@pytest.fixture
def runtime() -> Runtime:
    """This process alone, on the CPU."""
    return start(RuntimeConfig(device=Device.cpu))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """60 scenes of 32 pixels in three shards and a held-out one."""
    from data.building.build import build_shards

    project = Project(tmp_path_factory.mktemp("project"))
    build_shards(project.config("build", "samples=60", "shard_samples=20", "heldout_fraction=0.2", "workers=1"))
    return project


@pytest.fixture(scope="session")
def towers(scenes: Project) -> Project:
    """The scenes with an autoencoder and a CLIP that have learnt something."""
    from train.engine import trainer
    from train.training.autoencoder import AutoencoderStage
    from train.training.clip import ClipStage

    runtime = start(RuntimeConfig(device=Device.cpu))
    for stage in (AutoencoderStage, ClipStage):
        cfg = scenes.config(stage.name, *TRAININGS[stage.name], *EVERY_STEP)
        trainer.fit(stage(cfg, runtime), cfg, runtime)
    return scenes


@pytest.fixture(scope="session")
def latents(towers: Project) -> Project:
    """And their latents."""
    from train.latents import precompute as latents

    cfg = towers.config("latents")
    latents.run_precompute(cfg, start(RuntimeConfig(device=Device.cpu)), to_plain(cfg))
    return towers


@pytest.fixture(scope="session")
def project(latents: Project) -> Project:
    """And a U-Net trained on them."""
    from train.engine import trainer
    from train.training.unet import UNetStage

    runtime = start(RuntimeConfig(device=Device.cpu))
    cfg = latents.config("unet", *TRAININGS["unet"], *EVERY_STEP)
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    return latents


@pytest.fixture(scope="session")
def framed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that precompute images of three shapes, 32 x 32, 40 x 24 and 24 x 40 pixels in their buckets."""
    folder = tmp_path_factory.mktemp("framed")
    sizes = [(64, 64), (96, 64), (60, 90)]
    for side, count in (("train", 45), ("heldout", 6)):
        with ShardWriter(folder / side, 20) as writer:
            for i in range(count):
                pixels = np.random.default_rng(i).integers(256, size=(4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize(sizes[i % 3], Image.Resampling.BICUBIC)
                png = encode_image(image, ImageFormat.png, 0)
                writer.add(f"{i:05d}", {"png": png, "txt": f"noise number {i}".encode()})
        Manifest(kind="images", shards=writer.finished).save(folder / side)
    return [f"shards={folder}", "buckets.max_aspect=2", "buckets.step=8", "min_psnr=1", "batch_size=4"]
