"""The four jobs with the real programs on two pretended nodes, one CPU process each."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[3]
STAGES = ["autoencoder", "clip", "latents", "unet"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_samples(folder: Path, samples: int) -> None:
    deadline = time.monotonic() + 120
    while max((line["samples_seen"] for line in metrics(folder)), default=0) < samples:
        assert time.monotonic() < deadline, f"{folder} did not get to {samples} samples"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with image shards."""
    folder = tmp_path_factory.mktemp("run")
    build = [sys.executable, "data/build_shards.py", "experiment=smoke", f"run_dir={folder}"]
    subprocess.run(build, cwd=REPOSITORY, stdin=subprocess.DEVNULL, check=True, timeout=120)
    return folder


@pytest.fixture
def trained(slurm: Any, run_dir: Path) -> Path:
    """The project after all four jobs, chained by pipeline.sh; once for the module."""
    if not (run_dir / "unet/DONE").exists():
        overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={run_dir}", "unet.optim.lr=1.5e-4")
        lines = slurm.run("slurm/pipeline.sh", f"--output={run_dir}/%x.log", *overrides).splitlines()
        jobs = {stage: job for job, stage in map(str.split, lines)}
        assert list(jobs) == STAGES
        for stage in STAGES:
            slurm.wait(jobs[stage], timeout_s=200)
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


def test_array_of_precompute_jobs_makes_the_cache_of_one(slurm, trained, tmp_path):
    overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", f"output_dir={tmp_path}/latents")
    script = "slurm/precompute_latents.sh"
    array = slurm.sbatch("--array=0-2", "--nodes=1", f"--output={tmp_path}/%a.log", script, *overrides)
    for task in range(3):
        slurm.wait(f"{array}_{task}", timeout_s=200)
    files = [path.relative_to(trained) for path in sorted((trained / "latents").glob("*/*.tar"))]
    assert len(files) > 3
    for file in files:
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()
    made = [json.loads((folder / "latents/train/manifest.json").read_text()) for folder in (tmp_path, trained)]
    assert made[0] == made[1]


def test_unet_job_requeued_before_its_time_limit_resumes_and_cancelled_stays_cancelled(slurm, trained, tmp_path):
    unet = tmp_path / "unet"
    overrides = ("experiment=smoke", "runtime=cpu", f"run_dir={trained}", f"output_dir={unet}")
    long = ("loop.samples=1000000", "loop.log_every=16", "loop.checkpoint_every=1000000", "loop.evaluate_every=1000000")
    job = slurm.sbatch(f"--output={tmp_path}/log", "slurm/train_unet.sh", *overrides, *long, "optim.lr=1e-4")
    wait_for_samples(unet, 64)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(job, "PENDING")
    saved = [int(folder.name) for folder in (unet / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] >= 64
    wait_for_samples(unet, saved[0] + 32)
    seen = [line["samples_seen"] for line in metrics(unet)]
    assert seen == list(range(16, len(seen) * 16 + 1, 16))  # one curve: nothing trained twice, nothing left out
    assert OmegaConf.load(unet / "config.yaml").optim.lr == 1e-4

    slurm.run("scancel", job)
    deadline = time.monotonic() + 60
    while job in slurm.run("squeue", "-h", "-o", "%i").split():
        assert time.monotonic() < deadline, f"job {job} is still in the queue"
        time.sleep(0.2)
    facts = slurm.job(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1")
    assert max(int(folder.name) for folder in (unet / "checkpoints").iterdir()) > saved[0]
