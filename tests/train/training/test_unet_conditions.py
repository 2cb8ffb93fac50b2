"""Each demo of a task, on a few of its own images: the U-Net is trained by all that it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.entry import compose, to_plain
from conf.schema import PipelineRun
from data.building.build import build_shards
from models.autoencoder import Autoencoder
from models.clip import Clip
from train.engine import trainer
from train.engine.runtime import Runtime
from train.latents import precompute
from train.stages.tasks import ROOT, STAGES
from train.training.unet import UNetStage

FINE_TUNINGS = {"dreambooth_demo", "finetune_demo", "lora_demo"}  # their own tests train them
DEMOS = sorted({path.stem for path in (ROOT / "conf/experiment").glob("*_demo.yaml")} - FINE_TUNINGS)
FEW = ["samples=24", "heldout_fraction=0.25", "workers=1"]
SHORT = [
    *("loop.samples=40", "loop.log_every=4", "loop.evaluate_every=40", "batch.global_batch_size=4"),
    *("sample_prompts=2", "sampling.steps=2", "evaluation.samples=0"),
]


def config(stage: str, *overrides: str) -> Any:
    """Of a stage that computes on the CPU."""
    command = next(command for command in STAGES if command.name == stage)
    runtime = [] if stage == "build" else ["runtime=cpu", "wandb.mode=disabled"]
    return compose(command.script.stem, command.schema, [*runtime, *overrides])


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name an autoencoder and a CLIP of the demo's sizes, untrained."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    sizes = ["experiment=demo", "run_dir=unused"]
    Autoencoder(config("autoencoder", *sizes).model).save_pretrained(folder / "autoencoder")
    Clip.from_config(config("clip", *sizes).model).save_pretrained(folder / "clip")
    return [f"autoencoder={folder}/autoencoder", f"clip={folder}/clip"]


@pytest.mark.parametrize("experiment", DEMOS)
def test_a_demo_trains_its_network_and_all_that_it_is_told(
    experiment: str, towers: list[str], tmp_path: Path, runtime: Runtime
) -> None:
    chosen = [f"experiment={experiment}", f"run_dir={tmp_path}"]
    stages = compose("pipeline", PipelineRun, chosen).stages
    assert {"latents", "unet"} <= set(stages)
    scenes = [f"experiment={experiment if 'build' in stages else 'demo'}", f"run_dir={tmp_path}"]
    build_shards(config("build", *scenes, *FEW))
    latents = config("latents", *chosen, *towers, f"shards={tmp_path}/shards", "min_psnr=1")
    precompute.run_precompute(latents, runtime, to_plain(latents))

    cfg = config("unet", *chosen, *towers, *SHORT, "init_from=null")
    stage = UNetStage(cfg, runtime)
    told = stage.network.conditions
    before = [value.clone() for value in told.parameters()]
    outcome = trainer.fit(stage, cfg, runtime)

    assert outcome.samples_seen == 40 and 0 < outcome.metrics["eval/loss"] < 10
    assert not any(map(torch.equal, told.parameters(), before))
