"""Fine-tuning with adapters: the base stays, training resumes, and the export is an ordinary U-Net."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from conf.entry import compose
from conf.errors import UserError
from conf.files import sha256
from conf.schema import AverageRun, Device, PlanRun, RuntimeConfig
from models.formats.lora import FILE_NAME, adapter_file
from models.unet import UNet
from train.engine import trainer
from train.engine.runtime import Runtime, start
from train.evaluation.watch import of_checkpoint
from train.exporting import average
from train.sampling import run as sampling
from train.sampling.load import load_model
from train.training.unet import UNetStage

RUN = ["loop.samples=96", "loop.checkpoint_every=48", "loop.log_every=16", "ema.half_life_samples=50", "optim.lr=1e-2"]


def config(project: Any, *overrides: str) -> Any:
    export = project.folder / "unet" / "export"
    return project.config("unet", f"init_from={export}", "lora.rank=4", "lora.alpha=8", "sample_prompts=2", *overrides)


@pytest.fixture(scope="module")
def tuned(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 6 steps with a checkpoint after 3."""
    folder = tmp_path_factory.mktemp("tuned")
    cfg, runtime = config(project, f"output_dir={folder}", *RUN), start(RuntimeConfig(device=Device.cpu))
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    return folder


@pytest.mark.parametrize("backend", ["runtime.backend=ddp", "runtime.zero_stage=2"])
def test_loss_falls_and_the_base_stays(project: Any, runtime: Runtime, backend: str) -> None:
    stage = UNetStage(config(project, backend, "optim.lr=1e-2"), runtime)
    base, losses = UNet.from_pretrained(project.folder / "unet" / "export").state_dict(), []
    batch = stage.dataset.batch(range(16))
    for step in range(15):  # the same samples with the same noise
        losses.append(float(stage.micro_step(batch, True, 16 * step)["train/loss"]))
        stage.finish_step(16 * (step + 1))
    assert losses[-1] < 0.95 * losses[0]
    weights = stage.unet.weights()
    assert all(torch.equal(weights[f"unet.{name}"], tensor) for name, tensor in base.items())


def test_resume_equals_uninterrupted(project: Any, runtime: Runtime, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "checkpoints" / "000000000048", tmp_path / "checkpoints" / "000000000048")
    cfg = config(project, f"output_dir={tmp_path}", *RUN)
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    last = Path("checkpoints", "000000000096", "unet")
    for file in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        before, after = (load_file(folder / last / f"{file}.safetensors") for folder in (tuned, tmp_path))
        assert before.keys() == after.keys() and all(".lora_" in name for name in before)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_export_is_the_base_with_the_averaged_adapters(project: Any, tuned: Path) -> None:
    merged = UNet.from_pretrained(tuned / "export").state_dict()
    unet = UNet.from_pretrained(project.folder / "unet" / "export")
    base = unet.state_dict()
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] for name in moved} == {"to_q", "to_k", "to_v", "0"}  # to_out.0
    average = load_file(tuned / "checkpoints" / "000000000096" / "unet" / "ema.safetensors")
    for name in moved:
        a, b = (average[f"unet.{name}".replace("weight", f"lora_{half}.weight")] for half in "AB")
        torch.testing.assert_close(merged[name], base[name] + 8 / 4 * b @ a)


def test_diffusers_pipelines_read_the_adapters_of_an_export(tuned: Path) -> None:
    weights, alphas, metadata = StableDiffusionPipeline.lora_state_dict(tuned / "export", return_lora_metadata=True)
    assert weights.keys() == load_file(tuned / "export" / FILE_NAME).keys() and not alphas
    assert metadata == {
        "unet.r": 4,
        "unet.lora_alpha": 8.0,
        "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_adapters_are_merged_when_the_base_is_read(project: Any, runtime: Runtime, tuned: Path, scale: float) -> None:
    export = tuned / "export"
    cfg = project.config("sample", "prompts=[x]", f"lora={export}", f"lora_scale={scale}")
    base, whole = (UNet.from_pretrained(folder).state_dict() for folder in (cfg.unet, export))
    read = load_model(cfg, runtime.device).denoiser.unet.state_dict()
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, base[name] + scale * (whole[name] - base[name]), rtol=0, atol=1e-6)
    facts = {"lora_sha256": sha256(adapter_file(cfg.lora)), "lora_scale": scale}
    assert facts.items() <= sampling.lora_facts(cfg).items()


def test_adapters_do_not_count_twice(project: Any, runtime: Runtime, tuned: Path) -> None:
    cfg = project.config("evaluate", f"lora={tuned}/export", f"unet={tuned}/export")
    with pytest.raises(UserError, match=r"^lora=\S+: already in the weights of unet=\S+; set unet=FOLDER to what it"):
        load_model(cfg, runtime.device)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sample", ["lora=x", "lora_scale=nan"], r"^lora_scale=nan: must be a number, such as 0\.8$"),
        ("sample", ["lora_scale=0.8"], r"^lora_scale=0\.8: without effect; set lora=FOLDER as well$"),
        ("evaluate", ["lora=x", "watch=true"], r"^lora: goes with an export; leave it out with watch=true$"),
        ("evaluate", ["lora=x", "subject=autoencoder"], r"^lora: is for a U-Net; leave it out with subject=autoenc"),
    ],
)
def test_adapters_without_their_place_are_refused(project: Any, command: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        project.config(command, *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["lora.rank=2"], r"began differently \(lora.rank was 4, is 2\)"),
        (["lora.alpha=null"], r"began differently \(lora.alpha was 8.0, is None\)"),
        (["lora.rank=0"], r"began differently \(lora.alpha was 8.0, is None"),
    ],
)
def test_other_adapters_do_not_continue_a_run(
    project: Any, runtime: Runtime, tuned: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    shutil.copytree(tuned / "checkpoints", tmp_path / "checkpoints")
    cfg = config(project, f"output_dir={tmp_path}", *RUN, *change)
    with pytest.raises(UserError, match=message):
        trainer.fit(UNetStage(cfg, runtime), cfg, runtime)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["init_from=null"], r"^lora\.rank=4: adapters need a trained U-Net; set init_from=FOLDER$"),
        (["runtime.zero_stage=3"], r"^lora\.rank=4: frozen weights cannot be sharded; set .*zero_stage=0, 1 or 2$"),
        (["runtime.backend=fsdp"], r"^lora\.rank=4: frozen weights cannot be sharded"),
        (["lora.rank=-1"], r"^lora\.rank=-1: must be 0 \(off\) or positive$"),
        (["lora.alpha=0"], r"^lora\.alpha=0\.0: must be positive$"),
        (["lora.modules=[]"], r"^lora\.modules=\[\]: name at least one layer, such as to_q$"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(project: Any, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(project, *options)


def test_commands_that_need_whole_checkpoints_refuse_those_of_adapters(
    project: Any, runtime: Runtime, tuned: Path, tmp_path: Path
) -> None:
    options = [f"trained={tuned}", f"output_dir={tmp_path}/x", "half_life_samples=50"]
    with pytest.raises(UserError, match=r"averages there are of adapters only \(lora\.rank\); use its export"):
        average.export_average(compose("average", AverageRun, options))
    evaluation = project.config("evaluate", f"unet={tuned}/export")
    with pytest.raises(UserError, match=r"hold adapters only \(lora\.rank\); wait for its export"):
        of_checkpoint(evaluation, runtime, tuned, 96)
    with pytest.raises(UserError, match=r"^lora\.rank=4: the plan is of training all weights; leave it out"):
        compose("plan", PlanRun, ["experiment=smoke", "lora.rank=4", "run_dir=unused", "init_from=unused"])
