"""Each demo of a task, on a few of its own images: the U-Net is trained by all that it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.entry import compose, to_plain
from conf.schema import PipelineRun, Precision
from data.building.build import build_shards
from fake_gpu import fake_gpu, without_values
from models.autoencoder import Autoencoder
from models.clip import Clip
from train.engine import trainer
from train.engine.runtime import Runtime
from train.latents import precompute
from train.stages.tasks import ROOT, STAGES
from train.training.unet import UNetStage
from waits import Waits

FINE_TUNINGS = {
    "distill_demo",
    "guidance_demo",
    "dreambooth_demo",
    "finetune_demo",
    "lora_demo",
    "mean_flow_demo",
}  # their own tests train them
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

    cfg = config("unet", *chosen, *towers, *SHORT, "init_from=null", "batch.micro_batch_size=2", "runtime.backend=ddp")
    stage = UNetStage(cfg, runtime)
    told = stage.network.conditions
    before, waits = [value.clone() for value in told.parameters()], Waits()
    waits.around(stage)
    outcome = trainer.fit(stage, cfg, runtime)

    assert outcome.samples_seen == 40 and 0 < outcome.metrics["eval/loss"] < 10
    assert not any(map(torch.equal, told.parameters(), before))
    assert waits.found == []

    # In fp32: autocast knows no such device. That nothing is waited for in 16 bits either is tested on the CPU.
    loaded = [stage.extend(stage.dataset.batch([first, first + 1])) for first in range(0, 12, 2)]
    with fake_gpu(Precision.fp32) as (gpu, copies):
        stage = UNetStage(cfg, gpu)
        copies.waited.clear()
        for number, batch in enumerate(loaded):
            found = stage.micro_step(gpu.batch(without_values(batch)), number % 2 == 1, 0)
            assert all(value.device == gpu.device for value in found.values())
            if number % 2:
                gpu.raised([False, False, ~found["train/loss"].isfinite().all()])
                stage.finish_step(4)
    assert copies.waited == []
