"""The whole pipeline from one command, a second start of it, a kill in the middle, and two processes instead of one.

The pipeline runs once for all tests; the U-Net's trainings of the other tests read what it left and write elsewhere.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
STAGES = ["build", "autoencoder", "clip", "latents", "unet", "sample", "evaluate"]
STEPS, BATCH = 50, 16
LAYOUTS = ("ddp", "zero2", "fsdp", "compiled")  # of distill_worker.py
WAIT_S = 250.0


def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "LATENTLINE_TRACEBACK"}
    return inherited | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def launch(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*command: str) -> str:
    """Output of a command that must succeed."""
    process = launch(*command)
    try:
        output, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, output[-5000:]
    return output


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in lines]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of the one command."""
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    return run_dir, finish("train/pipeline.py", "experiment=smoke", f"run_dir={run_dir}")


def test_one_command_leaves_metrics_of_every_stage(smoke: tuple[Path, str]) -> None:
    run_dir, output = smoke
    summary = json.loads((run_dir / "summary.json").read_text())
    expected = {
        "autoencoder/psnr",
        "autoencoder/ssim",
        "clip/retrieval_image_to_text",
        "unet/loss",
        "latents/train_psnr",
    }
    expected |= {"eval/fd_efficientnet", *(f"seconds/{stage}" for stage in [*STAGES, "total"])}
    for attribute in ("kind", "background", "color"):
        expected |= {f"eval/prompt_following/{attribute}", f"probe/accuracy/{attribute}"}
    assert expected <= summary.keys()
    assert all(isinstance(value, float) and np.isfinite(value) for value in summary.values())
    assert any("eval/loop/fd_efficientnet" in row for row in rows(run_dir / "unet"))
    assert all(f"{name} " in output for name in expected if not name.startswith("seconds/"))
    with Image.open(run_dir / "grid.png") as grid:
        assert grid.width > 256 and len(grid.convert("RGB").getcolors(maxcolors=2**20) or []) > 100


def test_every_stage_leaves_its_files(smoke: tuple[Path, str]) -> None:
    run_dir, _ = smoke
    for stage in ("autoencoder", "clip", "unet"):
        folder = run_dir / stage
        done = json.loads((folder / "DONE").read_text())
        assert done["metrics"].keys() <= rows(folder)[-1].keys()
        assert (folder / "config.yaml").is_file() and (folder / "export" / "config.json").is_file()
        assert len(list((folder / "checkpoints").iterdir())) == 2
    assert all((run_dir / "samples" / name).is_file() for name in ("00001.png", "grid.png", "film.png"))
    assert (run_dir / "latents" / "null_text.safetensors").is_file()
    left = [path for path in run_dir.rglob(".*") if path.name not in (".stages", ".lock")]
    assert [path for path in left if "wandb" not in path.parts] == []


def test_metrics_reach_wandb_as_they_stand_in_the_file(smoke: tuple[Path, str], wandb_history: Any) -> None:
    run_dir, _ = smoke
    for stage in ("autoencoder", "clip", "latents", "unet"):
        merged: dict[int, dict[str, Any]] = {}
        for row in rows(run_dir / stage):
            merged.setdefault(row["samples_seen"], {}).update(row)
        dashboard = {row["samples_seen"]: row for row in wandb_history(run_dir / stage)}
        assert dashboard.keys() == merged.keys()
        for seen, row in merged.items():
            assert {name: dashboard[seen][name] for name in row} == pytest.approx(row)
    assert any(name.startswith("samples/prompts") for row in wandb_history(run_dir / "unet") for name in row)
    ids = [(run_dir / stage / "wandb_run_id").read_text() for stage in ("unet", "evaluation", "clip")]
    assert ids[0] == ids[1] != ids[2]


def test_second_start_skips_everything(smoke: tuple[Path, str]) -> None:
    run_dir, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.parent != run_dir}
    summary = (run_dir / "summary.json").read_text()
    output = finish("train/pipeline.py", "experiment=smoke", f"run_dir={run_dir}")
    first, *lines = output.splitlines()
    assert first.startswith("live page: ")
    assert [line.split()[:2] for line in lines[: len(STAGES)]] == [[stage, "skipped"] for stage in STAGES]
    assert (run_dir / "summary.json").read_text() == summary
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.parent != run_dir}
    assert after == before


def unet_command(smoke: tuple[Path, str], folder: Path, *overrides: str) -> list[str]:
    """50 steps of the U-Net on the latents of the one command, each step on a line."""
    given = smoke[0]
    return [
        *("train/train_unet.py", "experiment=smoke", f"run_dir={folder}", f"latents={given}/latents"),
        *(f"autoencoder={given}/autoencoder/export", f"clip={given}/clip/export", "runtime=cpu"),
        *(f"loop.samples={STEPS * BATCH}", f"loop.log_every={BATCH}", "loop.evaluate_every=400"),
        *("loop.checkpoint_every=128", "evaluation.samples=0", *overrides),
    ]


def distill_command(smoke: tuple[Path, str], folder: Path, *overrides: str) -> list[str]:
    """As many steps of a student of that U-Net."""
    _, *options = unet_command(smoke, folder, f"teacher={smoke[0]}/unet/export", *overrides)
    return ["train/distill_unet.py", *options]


@pytest.fixture(scope="session")
def undisturbed(smoke: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of a training that one process brought to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(*unet_command(smoke, folder, "wandb.mode=disabled"))
    found = rows(folder / "unet")
    assert len([row for row in found if "train/loss" in row]) == STEPS
    return found


def test_killed_training_ends_as_the_undisturbed_one(
    smoke: tuple[Path, str], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    command, unet = unet_command(smoke, tmp_path), tmp_path / "unet"
    process, deadline = launch(*command), time.monotonic() + WAIT_S
    seen = 0
    try:
        while seen < 20 * BATCH:
            assert process.poll() is None and time.monotonic() < deadline
            lines = (unet / "metrics.jsonl").read_text().splitlines() if (unet / "metrics.jsonl").exists() else []
            seen = json.loads(lines[-2])["samples_seen"] if len(lines) > 1 else 0  # the last line may be a part
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (unet / "DONE").exists() and not (unet / "export").exists()
    run_id = (unet / "wandb_run_id").read_text()
    output = finish(*command)
    assert "continues from the checkpoint at" in output
    assert rows(unet) == undisturbed
    assert (unet / "wandb_run_id").read_text() == run_id and (unet / "DONE").exists()


@pytest.mark.parametrize(("command", "kills", "processes"), [(unet_command, 3, 2), (distill_command, 2, 1)])
def test_kills_at_random_moments_leave_no_trace(
    smoke: tuple[Path, str], tmp_path: Path, command: Any, kills: int, processes: int
) -> None:
    """The short form of `chaos.py`: ranks and whole jobs."""
    spec = importlib.util.spec_from_file_location("chaos", Path(__file__).with_name("chaos.py"))
    assert spec and spec.loader
    chaos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chaos)
    words = command(smoke, tmp_path, "runtime.threads=1", "loop.checkpoint_every=48", "sample_prompts=0")
    whole, struck_at = tmp_path / "undisturbed", tmp_path / "disturbed"
    chaos.finish(processes, [*words, f"output_dir={whole}"])
    struck = chaos.disturbed(struck_at, STEPS * BATCH, kills, processes, [*words, f"output_dir={struck_at}"])
    assert len(struck) == kills
    chaos.compare(struck_at, whole)


@pytest.mark.parametrize("layout", ["zero_stage=2", "zero_stage=3", "backend=fsdp"])
def test_two_processes_have_the_loss_curve_of_one(
    smoke: tuple[Path, str], undisturbed: list[dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    overrides = (f"runtime.{layout}", "runtime.threads=1", "wandb.mode=disabled")
    finish(*torchrun, *unet_command(smoke, tmp_path, *overrides))
    one, two = ([row["train/loss"] for row in r if "train/loss" in row] for r in (undisturbed, rows(tmp_path / "unet")))
    assert len(two) == STEPS and np.mean(one[-5:]) < 0.9 * np.mean(one[:5])
    difference = np.abs(np.subtract(one, two)) / np.abs(one)
    print(f"largest relative difference of train/loss over {STEPS} steps: {difference.max():.2e}")
    assert difference.max() <= 1e-3
    evaluations = [
        [row["eval/loss"] for row in r if "eval/loss" in row] for r in (undisturbed, rows(tmp_path / "unet"))
    ]
    assert len(evaluations[0]) == 2 and evaluations[0] == pytest.approx(evaluations[1], rel=1e-3)


def test_student_has_the_losses_of_one_process_in_every_layout(smoke: tuple[Path, str], tmp_path: Path) -> None:
    """As `train/distill_unet.py` would run, one launch for all layouts; the compiled one without generating code."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    short = (f"loop.samples={12 * BATCH}", f"loop.evaluate_every={6 * BATCH}", "sample_prompts=0", "runtime.threads=1")
    _, *options = distill_command(smoke, tmp_path, *short, "wandb.mode=disabled")
    worker = str(Path(__file__).with_name("distill_worker.py"))
    finish(worker, f"{tmp_path}/1", *options)
    finish(*torchrun, worker, f"{tmp_path}/2", *options)
    names = ("train/loss", "train/grad_norm", "eval/loss")
    plain, *others = (
        {name: [row[name] for row in rows(folder) if name in row] for name in names}
        for folder in (tmp_path / processes / layout for processes in "12" for layout in LAYOUTS)
    )
    assert [len(plain[name]) for name in names] == [12, 12, 2] and len(others) == 2 * len(LAYOUTS) - 1
    for found in others:
        for name in names:
            assert found[name] == pytest.approx(plain[name], rel=1e-3)
        assert found["train/loss"][0] == pytest.approx(plain["train/loss"][0], rel=1e-5)  # of the same weights


def test_sweep_gives_each_member_its_own_folder_and_trains_none_twice(smoke: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, _ = smoke
    inputs = [f"latents={run_dir}/latents", f"autoencoder={run_dir}/autoencoder/export", f"clip={run_dir}/clip/export"]
    short = ["loop.samples=64", "loop.log_every=64", "sample_prompts=0", "evaluation.samples=0", "wandb.mode=disabled"]
    sweep = ["-m", "experiment=smoke", f"run_dir={tmp_path}", *inputs, *short, "optim.lr=1e-4,1e-2"]
    first = finish("train/train_unet.py", *sweep)
    members = [path.parent for path in (tmp_path / "sweep/train_unet").glob("*/DONE")]
    rates = sorted(rows(member)[0]["train/lr"] for member in members)
    assert rates == pytest.approx([1e-4, 1e-2])
    second = finish("train/train_unet.py", *sweep)
    assert second.count("already done at 64 samples") == 2
    table = second[second.index("objective   member") :]
    assert table == first[first.index("objective   member") :]
    losses = sorted(
        (json.loads((member / "DONE").read_text())["metrics"]["eval/loss"], member.name) for member in members
    )
    assert [line.split(maxsplit=1) for line in table.splitlines()[1:]] == [
        [f"{loss:.6g}", name] for loss, name in losses
    ]
