"""The jobs with the real programs on two to four pretended nodes, one CPU process each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.timeout(600)  # the chain of all jobs is one test's
REPOSITORY = Path(__file__).resolve().parents[3]
STAGES = ["build", "autoencoder", "clip", "latents", "unet", "evaluate"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_samples(folder: Path, samples: int) -> None:
    deadline = time.monotonic() + 250
    while max((line["samples_seen"] for line in metrics(folder)), default=0) < samples:
        assert time.monotonic() < deadline, f"{folder} did not get to {samples} samples"
        time.sleep(0.2)


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 250
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty project."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def trained(slurm: Any, run_dir: Path) -> Path:
    """The project after all jobs, chained by pipeline.sh; once for the module."""
    if not (run_dir / "evaluation/metrics.json").exists():
        overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={run_dir}", "unet.optim.lr=1.5e-4")
        output = f"--output={run_dir}/%x.log"
        lines = slurm.run("slurm/pipeline.sh", output, "latents.--array=0-1", "latents.--nodes=1", *overrides)
        jobs = {stage: job for job, stage in map(str.split, lines.splitlines())}
        assert list(jobs) == STAGES
        for stage in STAGES:
            slurm.wait(jobs[stage], timeout_s=300)
    return run_dir


def test_pipeline_trains_every_stage_on_two_nodes(trained):
    rates = {}
    for stage in ("autoencoder", "clip", "unet"):
        done = json.loads((trained / stage / "DONE").read_text())
        config = OmegaConf.load(trained / stage / "config.yaml")
        assert done["samples_seen"] == config.loop.samples
        assert "2 nodes of 1 processes" in (trained / f"train_{stage}.log").read_text()
        rates[stage] = config.optim.lr
    assert [stage for stage, lr in rates.items() if lr == 1.5e-4] == ["unet"]  # its own override
    for split in ("train", "heldout"):
        images, latents = (
            json.loads((trained / f / split / "manifest.json").read_text()) for f in ("shards", "latents")
        )
        assert images["samples"] == latents["samples"] > 0


def claimants(folder: Path) -> dict[int, str]:
    """Processes that work on a shard of a cache: the task of the array that each belongs to."""
    found = {}
    for claim in folder.glob("*/.parts/claims/*.claim"):
        with suppress(OSError, ValueError):  # given back, or ended, this moment
            pid = json.loads(claim.read_text())["pid"]
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found[pid] = dict(line.split("=", 1) for line in environment if "=" in line)["SLURM_ARRAY_TASK_ID"]
    return found


def test_array_of_precompute_jobs_makes_the_cache_of_one_although_tasks_are_killed(slurm, trained, tmp_path):
    overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", f"output_dir={tmp_path}/latents")
    script = "slurm/precompute_latents.sh"
    array = slurm.sbatch("--array=0-2", "--nodes=1", f"--output={tmp_path}/%a.log", script, *overrides)
    deadline = time.monotonic() + 250
    while not (working := claimants(tmp_path / "latents")):
        assert time.monotonic() < deadline, "no task claimed a shard"
        time.sleep(0.005)
    pid, killed = working.popitem()
    os.kill(pid, signal.SIGKILL)  # out of memory: torchrun starts it again
    cancelled, other = (task for task in "012" if task != killed)
    slurm.run("scancel", f"{array}_{cancelled}")
    for task in (killed, other):
        slurm.wait(f"{array}_{task}", timeout_s=300)
    assert slurm.wait(f"{array}_{cancelled}", "CANCELLED")["Restarts"] == "0"
    assert "exitcode: -9" in (tmp_path / f"{killed}.log").read_text()
    files = [path.relative_to(trained) for path in sorted((trained / "latents").glob("*/*.tar"))]
    assert len(files) > 3
    for file in files:
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()
    made = [json.loads((folder / "latents/train/manifest.json").read_text()) for folder in (tmp_path, trained)]
    assert made[0] == made[1]


def test_sweep_of_jobs_ends_with_the_objectives_of_those_that_lived(slurm, trained):
    inputs = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", "loop.samples=64", "sample_prompts=0")
    swept = ("hydra/launcher=submitit_slurm", "batch.global_batch_size=16,100000")  # more than there are samples
    output = slurm.run(
        sys.executable, "train/train_unet.py", "-m", *inputs, *swept, "wandb.mode=offline", check=False, timeout_s=500
    )
    best, failed = output[output.index("objective   member") :].splitlines()[1:]
    (done,) = (trained / "sweep/train_unet").glob("*/DONE")
    assert best.split() == [f"{json.loads(done.read_text())['metrics']['eval/loss']:.6g}", done.parent.name]
    assert failed.startswith("failed") and "samples, fewer than batch.global_batch_size=100000" in failed
    wandb = OmegaConf.load(done.parent / "config.yaml").wandb
    assert (wandb.group, wandb.name) == (f"{trained.name}/sweep/train_unet", done.parent.name)


@pytest.mark.parametrize("program", ["train_unet", "distill_unet"])
def test_job_requeued_before_its_time_limit_resumes_and_cancelled_stays_cancelled(slurm, trained, tmp_path, program):
    unet = tmp_path / "unet"
    overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", f"output_dir={unet}")
    long = ("loop.samples=1000000", "loop.log_every=16", "loop.checkpoint_every=1000000", "loop.evaluate_every=1000000")
    job = slurm.sbatch(f"--output={tmp_path}/log", f"slurm/{program}.sh", *overrides, *long, "optim.lr=1e-4")
    wait_for_samples(unet, 64)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(job, "PENDING")
    run_id = (unet / "wandb_run_id").read_text()
    saved = [int(folder.name) for folder in (unet / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] >= 64
    wait_for_samples(unet, saved[0] + 32)
    seen = [line["samples_seen"] for line in metrics(unet)]
    assert seen == list(range(16, len(seen) * 16 + 1, 16))  # one curve: nothing trained twice, nothing left out
    assert OmegaConf.load(unet / "config.yaml").optim.lr == 1e-4

    assert [path.name.rpartition("-")[2] for path in unet.glob("wandb/offline-run-*")] == [
        run_id
    ] * 2  # one per attempt

    slurm.run("scancel", job)
    wait_for(lambda: job not in slurm.run("squeue", "-h", "-o", "%i").split(), f"job {job} is still in the queue")
    facts = slurm.job(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1")
    assert max(int(folder.name) for folder in (unet / "checkpoints").iterdir()) > saved[0]


def worker_on(node: str, job: str) -> int:
    """The training process of a job on a node; of those of the same environment, the one that torchrun started."""
    started_at = dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended this moment
            lines = set((folder / "environ").read_text().split("\0"))
            started = any(line.startswith("TORCHELASTIC_RUN_ID=") for line in lines)
            if started and {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}"} <= lines:
                started_at[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
    return min(started_at, key=started_at.__getitem__)  # whatever it started has its environment, and is younger


@pytest.mark.parametrize("lost", ["node is down", "process is stopped"])
def test_job_that_loses_a_node_trains_on_with_those_that_are_left(slurm, trained, tmp_path, lost):
    unet, log = tmp_path / "unet", tmp_path / "log"
    overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", f"output_dir={unet}", "sample_prompts=0")
    # A batch that divides among neither number of nodes.
    long = ("loop.samples=1500", "loop.log_every=10", "loop.checkpoint_every=40", "loop.evaluate_every=1500")
    options = (*overrides, *long, "batch.global_batch_size=10", "batch.uneven=true")
    watched = ("runtime.watchdog_s=12", "runtime.watchdog_ends=true")
    script = ("--partition=wide", "--nodes=3-4", f"--output={log}", "slurm/train_unet.sh")
    job = slurm.sbatch(*script, *options, *watched)
    wait_for_samples(unet, 100)
    if lost == "node is down":
        slurm.run("scontrol", "update", "nodename=node3", "state=down", "reason=test")
    else:
        os.kill(worker_on("node3", job), signal.SIGSTOP)
    try:
        facts = slurm.wait(job, timeout_s=480)
    finally:
        slurm.run("scancel", job, check=False)
        slurm.resume("node3")
    assert facts["Restarts"] == "1"
    assert "attempt 1: 4 nodes of 1" in log.read_text() and "attempt 2: 3 nodes of 1" in log.read_text()
    assert facts["ExcNodeList"] == ("(null)" if lost == "node is down" else "node3")
    assert json.loads((unet / "DONE").read_text())["samples_seen"] == 1500
    seen = [line["samples_seen"] for line in metrics(unet) if "train/loss" in line]
    assert seen == list(range(10, 1501, 10))  # nothing trained twice, nothing left out
    if lost == "node is down":
        alone = tmp_path / "alone"
        command = [sys.executable, "train/train_unet.py", *options, f"output_dir={alone}"]
        subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"WANDB_MODE": "disabled"}, timeout=200)
        curves = [[line["train/loss"] for line in metrics(folder) if "train/loss" in line] for folder in (unet, alone)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
