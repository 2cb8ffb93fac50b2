"""Kills a training again and again at random moments, and starts it again each time, until it reaches its end.

By hand, on a run folder whose latents are there (`python train/pipeline.py experiment=smoke run_dir=RUN`):

    python tests/integration/chaos.py 20 2 train/train_unet.py experiment=smoke run_dir=CHAOS latents=RUN/latents \
        autoencoder=RUN/autoencoder/export clip=RUN/clip/export runtime=cpu loop.samples=32000 ...

runs it once undisturbed (in CHAOS/undisturbed) and once with 20 kills (in CHAOS/disturbed), on 2 processes, and
compares the two. With train/distill_unet.py teacher=RUN/unet/export it is that of a student.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

PROGRAMS = {"train/train_unet.py", "train/distill_unet.py"}
ROOT = Path(__file__).parents[2]
POLL_S = 0.02
WAIT_S = 3000.0  # for one start to get ahead, or to its end


def started(processes: int, command: list[str]) -> subprocess.Popen[str]:
    """One start of the training, a program and its options, in a session of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--max-restarts=0"]
    several = [*launcher, f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, *several, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train; the launcher's command names the program, too."""
    launcher, found = psutil.Process(process.pid), []
    for member in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            command = set(member.cmdline())
            if command & PROGRAMS and "torch.distributed.run" not in command:
                found.append(member)
    return found


def strike(process: subprocess.Popen[str], draw: random.Random) -> str:
    """SIGKILL to one rank, or to all of the job at once; returns after all of it has ended."""
    victims = ranks(process)
    if len(victims) > 1 and draw.random() < 0.5:
        struck = "a rank"
        draw.choice(victims).kill()
    else:
        struck = "the job"
        process.kill()
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
    process.communicate(timeout=WAIT_S)
    psutil.wait_procs(victims, timeout=60)
    return struck


def seen(folder: Path) -> int:
    """Samples that the newest line of metrics speaks of."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return int(json.loads(lines[-2])["samples_seen"]) if len(lines) > 1 else 0  # the last one may be a part


def moments(total: int, kills: int, draw: random.Random) -> Iterator[tuple[int, float]]:
    """Where to strike: after so many samples, and then so many seconds later, some in the middle of a checkpoint."""
    for place in sorted(draw.uniform(0.02, 0.95) for _ in range(kills)):
        yield int(place * total), draw.uniform(0.0, 0.3)


def disturbed(folder: Path, total: int, kills: int, processes: int, command: list[str], seed: int = 0) -> list[str]:
    """Bring a training to its end through so many kills; returns what was struck. Fails if a start gets nowhere."""
    draw, struck = random.Random(seed), list[str]()
    for place, delay_s in moments(total, kills, draw):
        process, deadline = started(processes, command), time.monotonic() + WAIT_S
        while (seen(folder) < place or not ranks(process)) and process.poll() is None:
            assert time.monotonic() < deadline, f"no progress to {place} samples"
            time.sleep(POLL_S)
        assert process.poll() is None, process.communicate()[0][-5000:]
        time.sleep(delay_s)
        struck.append(f"{strike(process, draw)} at {seen(folder):,} samples")
        assert place <= seen(folder) < total, f"killed {struck[-1]}, which is too late"
        left = [path.name for path in (folder / "checkpoints").glob("*")] if (folder / "checkpoints").exists() else []
        print(f"killed {struck[-1]}, checkpoints {sorted(left)}", flush=True)
    finish(processes, command)
    return struck


def finish(processes: int, command: list[str]) -> None:
    """Run to the end without a disturbance."""
    process = started(processes, command)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output[-5000:]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in lines]


def compare(disturbed_dir: Path, undisturbed_dir: Path) -> None:
    """Weights, averages and moments bit for bit, and every line of metrics: each sample counted once, in its place."""
    newest = [max((folder / "checkpoints").glob("[0-9]*")) for folder in (disturbed_dir, undisturbed_dir)]
    assert newest[0].name == newest[1].name
    files = sorted(path.relative_to(newest[1]) for path in newest[1].rglob("*.safetensors"))
    assert len(files) >= 4
    for file in files:
        found, expected = load_file(newest[0] / file), load_file(newest[1] / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"{file} differs"
    assert rows(disturbed_dir) == rows(undisturbed_dir)


if __name__ == "__main__":
    KILLS, PROCESSES, COMMAND = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    FOLDER = Path(next(o.removeprefix("run_dir=") for o in COMMAND if o.startswith("run_dir=")))
    SAMPLES = int(next(o.removeprefix("loop.samples=") for o in COMMAND if o.startswith("loop.samples=")))
    print("undisturbed", flush=True)
    finish(PROCESSES, [*COMMAND, f"output_dir={FOLDER}/undisturbed"])
    disturbed(FOLDER / "disturbed", SAMPLES, KILLS, PROCESSES, [*COMMAND, f"output_dir={FOLDER}/disturbed"])
    compare(FOLDER / "disturbed", FOLDER / "undisturbed")
    print(f"{KILLS} kills left no trace in {SAMPLES:,} samples")
