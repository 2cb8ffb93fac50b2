"""How the batch scripts behave under SLURM, with a stand-in for the training programs."""

import json
import sys
import time
from pathlib import Path
from typing import Any

LONG = "steps=100000"  # only a signal ends it


def events(slurm: Any, name: str) -> list[dict[str, Any]]:
    path = slurm.folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


def wait_for_starts(slurm: Any, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(events(slurm, "start")) < count:
        assert time.monotonic() < deadline, f"fewer than {count} processes started"
        time.sleep(0.1)


def wait_until_gone(slurm: Any, job: str) -> None:
    deadline = time.monotonic() + 60
    while job in slurm.run("squeue", "-h", "-o", "%i").split():
        assert time.monotonic() < deadline, f"job {job} is still in the queue"
        time.sleep(0.1)


def steps(found: list[dict[str, Any]]) -> dict[int, int]:
    return {event["rank"]: event["step"] for event in found}


def test_resources_and_overrides_reach_every_process(stand_in):
    override = 'prompts=["a red planet, large"]'  # spaces, quotes and a comma survive
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", "steps=1", "optim.lr=1e-4", override, NPROC="2")
    facts = stand_in.wait(job)
    starts = events(stand_in, "start")
    nodes = [(start["rank"], start["node"]) for start in starts]
    assert sorted(nodes) == [(0, "node1"), (1, "node1"), (2, "node2"), (3, "node2")]
    assert {start["world"] for start in starts} == {"4"}
    assert {start["gpus"] for start in starts} == {"0,1,2,3,4,5,6,7"}
    assert {start["rendezvous"] for start in starts} == {f"127.0.0.1:{20000 + int(job) % 10000}"}
    passed = [
        "runtime=gpu",
        "events=events.jsonl",
        "steps=1",
        "optim.lr=1e-4",
        override,
    ]  # the user's come last and win
    assert all(start["overrides"] == passed for start in starts)
    assert facts["StdOut"] == str(stand_in.folder / f"slurm/logs/train_unet-{job}.out")


def test_job_that_runs_out_of_time_goes_on_from_its_checkpoint(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    # what the script's --signal=B:USR1@300 does as the end of its time comes near
    stand_in.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_starts(stand_in, 4)
    assert {event["name"] for event in events(stand_in, "signal")} == {"SIGUSR1"}
    stopped, resumed = events(stand_in, "end"), events(stand_in, "start")[2:]
    assert steps(stopped) == steps(resumed) and stopped[0]["step"] > 0
    facts = stand_in.job(job)
    assert facts["Restarts"] == "1"
    log = Path(facts["StdOut"]).read_text()
    assert "attempt 1:" in log and "attempt 2:" in log  # one log for both
    assert "srun: error" not in log  # torchrun outlived the signal


def test_preempted_job_goes_on_from_its_checkpoint(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    stand_in.run("scontrol", "requeue", job)  # TERM to everything, then KILL: what a preemption does
    wait_for_starts(stand_in, 4)
    assert steps(events(stand_in, "end")) == steps(events(stand_in, "start")[2:])
    assert stand_in.job(job)["Restarts"] == "1"


def test_latents_job_that_runs_out_of_time_is_ended_and_started_again(stand_in):
    job = stand_in.sbatch("slurm/precompute_latents.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 1)
    stand_in.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_starts(stand_in, 2)
    assert not events(stand_in, "signal") and not events(stand_in, "end")
    assert events(stand_in, "start")[1]["attempt"] == "1"


def test_cancelled_job_checkpoints_and_stays_cancelled(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    stand_in.run("scancel", job)
    wait_until_gone(stand_in, job)
    assert set(steps(events(stand_in, "end"))) == {0, 1}
    facts = stand_in.job(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")


def test_pipeline_runs_stages_in_order_and_gives_each_its_overrides(stand_in):
    overrides = ("events=events.jsonl", "steps=1", "unet.optim.lr=1e-4")
    lines = stand_in.run("slurm/pipeline.sh", "--nodes=1", *overrides).splitlines()
    jobs = {stage: job for job, stage in map(str.split, lines)}
    assert list(jobs) == ["autoencoder", "clip", "latents", "unet"]
    stand_in.wait(jobs["unet"])
    seen = [event["program"] for event in events(stand_in, "end")]
    assert set(seen[:2]) == {"train_autoencoder", "train_clip"} and seen[2:] == ["precompute_latents", "train_unet"]
    given = {start["program"]: start["overrides"][3:] for start in events(stand_in, "start")}
    assert given.pop("train_unet") == ["optim.lr=1e-4"] and set(map(tuple, given.values())) == {()}


def test_pipeline_with_a_failed_stage_is_cancelled(stand_in):
    overrides = ("events=events.jsonl", "steps=1", "clip.steps=none")
    lines = stand_in.run("slurm/pipeline.sh", "--nodes=1", *overrides).splitlines()
    jobs = {stage: job for job, stage in map(str.split, lines)}
    stand_in.wait(jobs["unet"], "CANCELLED")
    stand_in.wait(jobs["latents"], "CANCELLED")
    assert stand_in.wait(jobs["clip"], "FAILED")["Restarts"] == "0"
    assert {event["program"] for event in events(stand_in, "end")} <= {"train_autoencoder"}


def test_pipeline_leaves_no_job_when_sbatch_refuses_one(stand_in):
    (stand_in.folder / "slurm/precompute_latents.sh").unlink()
    out = stand_in.run("slurm/pipeline.sh", "--hold", "events=events.jsonl", "steps=1", check=False)
    assert len(out.splitlines()) == 2  # autoencoder and clip had been submitted
    for line in out.splitlines():
        stand_in.wait(line.split()[0], "CANCELLED")


def test_submitted_from_another_folder(stand_in, tmp_path):
    repository = stand_in.folder
    stand_in.folder = tmp_path / "elsewhere"
    stand_in.folder.mkdir()
    events_file = f"events={stand_in.folder}/events.jsonl"
    script = repository / "slurm/precompute_latents.sh"
    stand_in.wait(stand_in.sbatch(f"--chdir={repository}", script, events_file, "steps=1"))
    assert len(events(stand_in, "end")) == 1


def test_virtual_environment_by_name_where_sbatch_exports_nothing_else(stand_in):
    export = f"--export=LATENTLINE_VENV={sys.prefix},NPROC=1"
    script = ("--nodes=1", "slurm/train_unet.sh", "events=events.jsonl", "steps=1")
    stand_in.wait(stand_in.sbatch(export, *script, PATH="/usr/bin:/bin", VIRTUAL_ENV=""))
    assert len(events(stand_in, "end")) == 1


def test_missing_environment_is_named(stand_in):
    job = stand_in.sbatch("--nodes=1", "slurm/train_unet.sh", PATH="/usr/bin:/bin", VIRTUAL_ENV="")
    facts = stand_in.wait(job, "FAILED")
    assert "set LATENTLINE_VENV=FOLDER" in Path(facts["StdOut"]).read_text()
