"""How the batch scripts behave under SLURM, with a stand-in for the training programs."""

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LONG = "steps=100000"  # only a signal ends it


def events(slurm: Any, name: str) -> list[dict[str, Any]]:
    path = slurm.folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


def wait_for(condition: Callable[[], bool], otherwise: str, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def wait_for_starts(slurm: Any, count: int) -> None:
    wait_for(lambda: len(events(slurm, "start")) >= count, f"fewer than {count} processes started")


def wait_until_gone(slurm: Any, job: str) -> None:
    wait_for(lambda: job not in slurm.run("squeue", "-h", "-o", "%i").split(), f"job {job} is still in the queue")


def steps(found: list[dict[str, Any]]) -> dict[int, int]:
    return {event["rank"]: event["step"] for event in found}


@pytest.mark.parametrize("program", ["train_unet", "distill_unet"])
def test_resources_and_overrides_reach_every_process(stand_in, program):
    override = 'prompts=["a red planet, large"]'  # spaces, quotes and a comma survive
    given = ("events=events.jsonl", "steps=1", "optim.lr=1e-4", override)
    job = stand_in.sbatch(f"slurm/{program}.sh", *given, NPROC="2")
    facts = stand_in.wait(job)
    starts = events(stand_in, "start")
    assert {start["program"] for start in starts} == {program}
    nodes = [(start["rank"], start["node"]) for start in starts]
    assert sorted(nodes) == [(0, "node1"), (1, "node1"), (2, "node2"), (3, "node2")]
    assert {start["world"] for start in starts} == {"4"}
    assert {start["gpus"] for start in starts} == {"0,1,2,3,4,5,6,7"}
    assert {start["rendezvous"] for start in starts} == {f"127.0.0.1:{20000 + int(job) % 10000}"}
    passed = ["runtime=gpu", *given]  # the user's come last and win
    assert all(start["overrides"] == passed for start in starts)
    assert facts["StdOut"] == str(stand_in.folder / f"slurm/logs/{program}-{job}.out")


def check_resumed(slurm: Any, job: str) -> None:
    """That two processes went on from the steps at which they had stopped."""
    wait_for_starts(slurm, 4)
    stopped, resumed = events(slurm, "end"), events(slurm, "start")[2:]
    assert steps(stopped) == steps(resumed) and stopped[0]["step"] > 0
    assert slurm.job(job)["Restarts"] == "1"


def test_job_that_runs_out_of_time_goes_on_from_its_checkpoint(stand_in):
    # SLURM's own signal: it counts time in minutes and looks every half of one
    job = stand_in.sbatch("--time=1", "--signal=B:USR1@50", "slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    wait_for(lambda: stand_in.job(job)["Restarts"] == "1", "the job was not requeued")
    check_resumed(stand_in, job)
    assert {event["name"] for event in events(stand_in, "signal")} == {"SIGUSR1"}
    log = Path(stand_in.job(job)["StdOut"]).read_text()
    assert "attempt 1:" in log and "attempt 2:" in log  # one log for both
    assert "srun: error" not in log  # torchrun outlived the signal


def test_job_that_an_admin_requeues_goes_on_from_its_checkpoint(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    stand_in.run("scontrol", "requeue", job)
    check_resumed(stand_in, job)


def test_job_that_a_more_urgent_one_preempts_goes_on_from_its_checkpoint(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    urgent = stand_in.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    stand_in.wait(urgent)
    check_resumed(stand_in, job)


def test_job_whose_node_fails_goes_on_on_another(stand_in):
    job = stand_in.sbatch("--nodes=1", "slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 1)
    node = events(stand_in, "start")[0]["node"]
    stand_in.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        wait_for_starts(stand_in, 2)
    finally:
        stand_in.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert {start["node"] for start in events(stand_in, "start")} == {"node1", "node2"}
    assert events(stand_in, "start")[1]["attempt"] == "1" and stand_in.job(job)["Restarts"] == "1"


def test_job_that_names_a_broken_node_goes_on_without_it_and_what_was_excluded(stand_in):
    options = ("--partition=wide", "--nodes=1", "--exclude=node1", "slurm/train_unet.sh")
    job = stand_in.sbatch(*options, "events=events.jsonl", "steps=1", "broken=node2,node3")
    facts = stand_in.wait(job)
    assert [start["node"] for start in events(stand_in, "start")] == ["node2", "node3", "node4"]
    assert (facts["Restarts"], facts["ExcNodeList"]) == ("2", "node1,node2,node3")
    left = {path.name for path in (stand_in.folder / "slurm/logs").iterdir()}
    assert left == {f"train_unet-{job}.out"}  # nothing that a later job of this id could take for its own


def test_job_that_finds_every_node_broken_is_requeued_so_often_and_no_more(stand_in):
    options = ("--partition=wide", "--nodes=1", "slurm/train_unet.sh", "events=events.jsonl", "steps=1")
    job = stand_in.sbatch(*options, "broken=node1,node2,node3,node4", NODE_REQUEUES="1")
    facts = stand_in.wait(job, "FAILED")
    assert facts["Restarts"] == "1" and len(events(stand_in, "start")) == 2
    assert "NODE_REQUEUES=1" in Path(facts["StdOut"]).read_text()


def test_job_of_three_to_four_nodes_goes_on_with_three_when_one_fails(stand_in):
    job = stand_in.sbatch("--partition=wide", "--nodes=3-4", "slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 4)
    stand_in.run("scontrol", "update", "nodename=node3", "state=down", "reason=test")
    try:
        wait_for_starts(stand_in, 7)
        starts = events(stand_in, "start")
        assert [start["world"] for start in starts] == ["4"] * 4 + ["3"] * 3
        assert {start["node"] for start in starts[4:]} == {"node1", "node2", "node4"}
        assert stand_in.job(job)["Restarts"] == "1"
    finally:
        stand_in.run("scancel", job)
        stand_in.resume("node3")


def test_latents_job_that_runs_out_of_time_is_ended_and_started_again(stand_in):
    job = stand_in.sbatch("slurm/precompute_latents.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 1)
    stand_in.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_starts(stand_in, 2)
    assert not events(stand_in, "signal") and not events(stand_in, "end")
    assert events(stand_in, "start")[1]["attempt"] == "1"


def test_task_of_an_array_that_is_started_again_leaves_the_others_alone(stand_in):
    """The last task has the id of the array."""
    array = stand_in.sbatch("--array=0-1", "slurm/precompute_latents.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    stand_in.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
    wait_for_starts(stand_in, 3)
    assert [stand_in.job(f"{array}_{task}")["Restarts"] for task in "01"] == ["0", "1"]


def test_cancelled_job_checkpoints_and_stays_cancelled(stand_in):
    job = stand_in.sbatch("slurm/train_unet.sh", "events=events.jsonl", LONG)
    wait_for_starts(stand_in, 2)
    stand_in.run("scancel", job)
    wait_until_gone(stand_in, job)
    assert set(steps(events(stand_in, "end"))) == {0, 1}
    facts = stand_in.job(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")


def submitted(slurm: Any, *arguments: str) -> dict[str, str]:
    """The jobs of a pipeline by their stages; all on one node, with the events in one file."""
    common = ("--nodes=1", "events=events.jsonl", "steps=1", "build.events=events.jsonl", "build.steps=1")
    lines = slurm.run("slurm/pipeline.sh", *common, *arguments).splitlines()
    return {stage: job for job, stage in map(str.split, lines)}


def test_pipeline_runs_stages_in_order_and_gives_each_its_arguments(stand_in):
    arguments = ("run_dir=run", "unet.optim.lr=1e-4", "latents.--array=0-1", "evaluate.--comment=last")
    jobs = submitted(stand_in, *arguments)
    assert list(jobs) == ["build", "autoencoder", "clip", "latents", "unet", "evaluate"]
    assert stand_in.wait(jobs["evaluate"])["Comment"] == "last"
    assert "Comment" not in stand_in.job(jobs["unet"])
    seen = [event["program"] for event in events(stand_in, "end")]
    assert seen[0] == "build_shards" and set(seen[1:3]) == {"train_autoencoder", "train_clip"}
    assert seen[3:] == ["precompute_latents", "precompute_latents", "train_unet", "evaluate"]
    given = {start["program"]: start["overrides"] for start in events(stand_in, "start")}
    assert given.pop("build_shards") == ["events=events.jsonl", "steps=1", "run_dir=run"]  # of the others only run_dir
    own = {program: overrides[4:] for program, overrides in given.items()}
    assert own.pop("train_unet") == ["optim.lr=1e-4"] and set(map(tuple, own.values())) == {()}


def test_pipeline_with_shards_has_no_build(stand_in):
    (stand_in.folder / "run/shards/train").mkdir(parents=True)
    for arguments in (["run_dir=run"], ["shards=elsewhere"]):
        assert "build" not in submitted(stand_in, "--hold", *arguments)


def test_pipeline_with_a_failed_stage_is_cancelled(stand_in):
    jobs = submitted(stand_in, "clip.steps=none")
    for stage in ("evaluate", "unet", "latents"):
        stand_in.wait(jobs[stage], "CANCELLED")
    assert stand_in.wait(jobs["clip"], "FAILED")["Restarts"] == "0"
    assert {event["program"] for event in events(stand_in, "end")} <= {"build_shards", "train_autoencoder"}


def test_pipeline_leaves_no_job_when_sbatch_refuses_one(stand_in):
    (stand_in.folder / "slurm/precompute_latents.sh").unlink()
    out = stand_in.run("slurm/pipeline.sh", "--hold", "events=events.jsonl", "steps=1", check=False)
    assert len(out.splitlines()) == 3  # build, autoencoder and clip had been submitted
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


def test_command_runs_inside_the_container(stand_in):
    inside = stand_in.folder / "container"  # stands in for `apptainer exec FILE`
    inside.write_text('#!/bin/bash\necho "inside $1"\nshift\nexec "$@"\n')
    inside.chmod(0o755)
    script = ("--nodes=1", "slurm/train_unet.sh", "events=events.jsonl", "steps=1")
    job = stand_in.sbatch(*script, CONTAINER=f"--no-kill {inside} image.sif")  # options of srun may come before
    facts = stand_in.wait(job)
    assert "0: inside image.sif" in Path(facts["StdOut"]).read_text()
    assert len(events(stand_in, "end")) == 1


CHOSEN = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "PYTORCH_ALLOC_CONF")


@pytest.mark.parametrize("processes", [1, 2, 100])
def test_cores_of_a_node_are_shared_out_and_caches_are_its_own(stand_in, processes):
    """Without torchrun: a hundred processes would take minutes."""
    del stand_in.env["OMP_NUM_THREADS"]
    script = ("--nodes=1", "--time=1", "slurm/evaluate.sh", "events=events.jsonl", "steps=1")
    inside = stand_in.folder / "container"
    inside.write_text(f"#!/bin/bash\n{sys.executable} train/evaluate.py events=events.jsonl steps=1\n")
    inside.chmod(0o755)
    job = stand_in.sbatch(*script, CONTAINER=str(inside), NPROC=str(processes), TMPDIR="/tmp")
    stand_in.wait(job)
    environment = events(stand_in, "start")[0]["environment"]
    own = str(max(1, 64 // processes))
    assert [environment[name] for name in CHOSEN] == [own, own, "expandable_segments:True"]
    caches = {name: environment[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    assert set(caches.values()) == {f"/tmp/latentline-{os.getuid()}/{name}" for name in ("inductor", "triton")}


def test_what_the_user_has_set_stays(stand_in):
    own = dict(zip(CHOSEN, ("7", "6", "max_split_size_mb:64"), strict=True))
    own |= {"TORCHINDUCTOR_CACHE_DIR": "/a", "TRITON_CACHE_DIR": "/b"}
    script = ("--nodes=1", "slurm/train_unet.sh", "events=events.jsonl", "steps=1")
    stand_in.wait(stand_in.sbatch(*script, **own))
    assert events(stand_in, "start")[0]["environment"].items() >= own.items()


def test_environment_is_unpacked_once_on_the_nodes_own_disk_and_goes_when_nobody_uses_it(stand_in):
    made = stand_in.folder / "made"
    venv.create(made, symlinks=True)
    (packages,) = made.glob("lib/*/site-packages")
    (packages / "all.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    tar = stand_in.folder / "venv.tar"
    subprocess.run(["tar", "-cf", tar, "-C", made, "."], check=True)
    disk = stand_in.folder / "disk"
    options = ("slurm/train_unet.sh", "events=events.jsonl", "steps=1")
    unpacked = []
    for _ in range(2):
        stand_in.wait(stand_in.sbatch(*options, LATENTLINE_VENV_TAR=str(tar), NODE_DISK=str(disk)))
        (folder,) = disk.glob("latentline-*/venv-*")  # no tar, no draft; torch may have made its caches beside it
        unpacked.append(folder.stat().st_ino)
    assert unpacked[0] == unpacked[1]
    starts = events(stand_in, "start")
    assert len(starts) == 4 and {start["prefix"] for start in starts} == {str(folder)}

    for name, days in (("venv-1-1", 40), ("venv-1-1.AbCdEf", 2), ("venv-2-2", 20), ("venv-2-2.AbCdEf", 0)):
        (folder.parent / name).mkdir()
        os.utime(folder.parent / name, times=(time.time() - days * 86400,) * 2)
    broken = stand_in.folder / "broken.tar"
    broken.write_bytes(tar.read_bytes()[:20_000])
    stand_in.wait(stand_in.sbatch(*options, LATENTLINE_VENV_TAR=str(broken), NODE_DISK=str(disk)), "FAILED")
    assert len(events(stand_in, "start")) == 4 and len(list(folder.parent.glob("venv-*"))) == 5  # nothing of it
    stand_in.wait(stand_in.sbatch(*options, LATENTLINE_VENV_TAR=str(tar), NODE_DISK=str(disk)))
    assert {path.name for path in folder.parent.glob("venv-*")} == {folder.name, "venv-2-2", "venv-2-2.AbCdEf"}


@pytest.mark.parametrize("chosen", ["", "socket", "none"])
def test_processes_are_bound_near_their_gpus_where_that_works(stand_in, chosen):
    """The machine has no GPU that answers, so by itself nothing is bound; whoever chooses has it in torchrun's line."""
    fake = stand_in.folder / "venv/bin"
    fake.mkdir(parents=True)
    (fake / "python").write_text('#!/bin/bash\n[ "$1" = -c ] || echo "line: $*"\n')
    (fake / "python").chmod(0o755)
    script = ("--nodes=1", "slurm/train_unet.sh", "steps=1")
    job = stand_in.sbatch(*script, LATENTLINE_VENV=str(fake.parent), NUMA_BINDING=chosen)
    (line,) = re.findall("line: (.*)", Path(stand_in.wait(job)["StdOut"]).read_text())
    assert re.findall("--numa-binding=(.*?) ", line) == ([chosen] if chosen == "socket" else [])
    assert line.endswith("train/train_unet.py runtime=gpu steps=1")


def test_missing_environment_is_named(stand_in):
    job = stand_in.sbatch("--nodes=1", "slurm/train_unet.sh", PATH="/usr/bin:/bin", VIRTUAL_ENV="")
    facts = stand_in.wait(job, "FAILED")
    assert "set LATENTLINE_VENV=FOLDER" in Path(facts["StdOut"]).read_text()
