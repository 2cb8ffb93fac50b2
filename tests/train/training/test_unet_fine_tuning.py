"""The shipped fine-tunings of the demo, in small: from data to an export, on what a first run left."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.entry import compose, to_plain
from conf.schema import AutoencoderRun, BuildRun, ClipRun, Device, PrecomputeRun, RuntimeConfig, UNetRun
from data.building.build import build_shards
from data.shards.manifest import find_shards
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.unet import UNet
from train.engine import trainer
from train.engine.runtime import start
from train.latents import precompute as latents
from train.latents.provenance import check_latents
from train.training.unet import UNetStage

SMALL = ["batch.global_batch_size=4", "loop.samples=40", "loop.log_every=4", "sample_prompts=0", "evaluation.samples=0"]
QUIET = ["runtime=cpu", "wandb.mode=disabled"]


def prepare(experiment: str, samples: int) -> None:
    """Its images and their latents, below the working folder."""
    chosen = f"experiment={experiment}"
    build_shards(compose("build_shards", BuildRun, [chosen, f"samples={samples}", "heldout_fraction=0.3", "workers=1"]))
    cfg = compose("precompute_latents", PrecomputeRun, [chosen, "min_psnr=0", *QUIET])
    latents.run_precompute(cfg, start(RuntimeConfig(device=Device.cpu)), to_plain(cfg))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/demo`, whose networks have learnt nothing, and images of the subject."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        autoencoder = compose("train_autoencoder", AutoencoderRun, ["experiment=demo"]).model
        Autoencoder(autoencoder).save_pretrained("runs/demo/autoencoder/export")
        Clip(compose("train_clip", ClipRun, ["experiment=demo"]).model).save_pretrained("runs/demo/clip/export")
        prepare("demo", 20)
        prepare("dreambooth_demo", 16)
        cfg = compose("train_unet", UNetRun, ["experiment=demo"])
        unet = UNet(cfg.model)
        for weight in unet.parameters():  # those at zero would let no gradient through
            torch.nn.init.normal_(weight, std=0.02)
        unet.save_pretrained("runs/demo/unet/export")
        check_latents(cfg, find_shards("runs/demo/latents/train", "latents")).save(Path("runs/demo/unet/export"))
    return folder


@pytest.mark.parametrize("experiment", ["dreambooth_demo", "finetune_demo", "lora_demo"])
def test_shipped_fine_tuning_trains_ten_steps_from_the_first_run(
    first: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    monkeypatch.chdir(first)
    data = "latents=runs/dreambooth_demo/latents"
    cfg: Any = compose("train_unet", UNetRun, [f"experiment={experiment}", data, *SMALL, *QUIET])
    runtime = start(RuntimeConfig(device=Device.cpu))
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    base, tuned = (UNet.from_pretrained(f"runs/{name}/unet/export").state_dict() for name in ("demo", experiment))
    moved = {name.split(".")[-2] for name, tensor in tuned.items() if not torch.equal(tensor, base[name])}
    assert moved == {"to_q", "to_k", "to_v", "0"} if cfg.lora.rank else "conv1" in moved
    assert all(tensor.isfinite().all() for tensor in tuned.values())
