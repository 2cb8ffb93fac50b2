"""A real SLURM with four pretended nodes for the tests of the batch scripts."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
WAIT_S = 250  # for what takes a tenth of it on an idle machine: only what hangs takes longer
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


def free_ports(count: int) -> int:
    """First of `count` consecutive free ports, below the jobs' own (20000..) and the ephemeral ones."""
    for _ in range(50):
        first = random.randrange(12000, 19900)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no consecutive free ports on loopback")


class Slurm:
    """SLURM's commands, run in one folder with the environment of a user who activated this Python's environment."""

    def __init__(self, conf: Path, folder: Path) -> None:
        self.folder = folder
        # inductor and DeepSpeed set some in the process of these tests
        others = ("SLURM_", "SBATCH_", "TORCHINDUCTOR_", "TRITON_", "LOCAL_RANK")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        path = os.pathsep.join([str(HERE / "cluster/bin"), str(Path(sys.executable).parent), inherited["PATH"]])
        # one process per node: its pretended 8 GPUs would start 8 on this machine's cores
        self.env = inherited | {"SLURM_CONF": str(conf), "PATH": path, "NPROC": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: object, check: bool = True, timeout_s: float = WAIT_S, **env: str) -> str:
        done = subprocess.run(
            [str(c) for c in command],
            env=self.env | env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: object, **env: str) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **env).strip()

    def job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def wait(self, job: str, state: str = "COMPLETED", timeout_s: float = WAIT_S) -> dict[str, str]:
        """The job's facts once it is in that state; another end fails with the job's log."""
        deadline = time.monotonic() + timeout_s
        while (facts := self.job(job))["JobState"] != state:
            log = Path(facts["StdOut"])
            text = log.read_text() if log.exists() else "(no log)"
            assert facts["JobState"] not in ENDED, f"job {job} ended as {facts['JobState']}, not {state}:\n{text}"
            assert time.monotonic() < deadline, f"job {job} is still {facts['JobState']}, not {state}:\n{text}"
            time.sleep(0.1)
        return facts

    def resume(self, node: str) -> None:
        """Bring a node back that was set down, or was named as broken; returns once all nodes are idle."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # an error if it is not down
        deadline = time.monotonic() + WAIT_S
        while set(self.run("sinfo", "-h", "-N", "-p", "wide", "-o", "%t").split()) != {"idle"}:
            assert time.monotonic() < deadline, self.run("sinfo")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Configuration file of a running cluster."""
    if not shutil.which("slurmctld"):
        reason = "no SLURM here: apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("LATENTLINE_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("slurm")
    start = [HERE / "cluster/start.sh", base, "4", str(free_ports(5))]
    started = subprocess.run(start, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60)
    assert started.returncode == 0, f"the cluster did not start: see {base}/log"
    yield base / "etc/slurm.conf"
    subprocess.run([HERE / "cluster/stop.sh", base], stdin=subprocess.DEVNULL, timeout=60, check=True)


def empty_queue(slurm: Slurm) -> None:
    slurm.run("scancel", f"--user={os.getuid()}", check=False)
    deadline = time.monotonic() + 40
    while slurm.run("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture
def slurm(slurm_conf: Path) -> Iterator[Slurm]:
    """SLURM as used from the repository itself."""
    commands = Slurm(slurm_conf, REPOSITORY)
    yield commands
    empty_queue(commands)


@pytest.fixture
def stand_in(slurm_conf: Path, tmp_path: Path) -> Iterator[Slurm]:
    """SLURM as used from a copy of the repository's batch scripts whose programs are all stand_in.py."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm", ignore=lambda folder, _: {"logs"})
    (tmp_path / "slurm/logs").mkdir()
    trainings = ("train/train_autoencoder", "train/train_clip", "train/train_unet", "train/distill_unet")
    for program in (*trainings, "data/build_shards", "data/precompute_latents", "train/evaluate"):
        (tmp_path / program).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / "stand_in.py", tmp_path / f"{program}.py")
    commands = Slurm(slurm_conf, tmp_path)
    yield commands
    empty_queue(commands)
