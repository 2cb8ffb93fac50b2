"""Stands in for all programs in the tests of the batch scripts: steps, checkpoints on a signal, resumes.

Started like the real ones, by torchrun on every node or alone, but imports nothing heavy. Reads the overrides `steps=N`
and `events=FILE`; each process appends a line of JSON per event to that file. `broken=NODES` ends a run that has one of
them, as the real ones end when a node does not answer.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

program, overrides = Path(sys.argv[0]).stem, sys.argv[1:]
options = dict(override.split("=", 1) for override in overrides)
rank = int(os.environ.get("RANK", "0"))
stopped = False


def log(event: str, **facts: object) -> None:
    line = {"event": event, "program": program, "rank": rank, "attempt": os.environ.get("SLURM_RESTART_COUNT", "0")}
    with Path(options["events"]).open("a") as file:
        file.write(json.dumps(line | facts) + "\n")


def on_signal(number: int, frame: object) -> None:
    global stopped
    stopped = True
    log("signal", name=signal.Signals(number).name)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, on_signal)
checkpoint = Path(f"{options['events']}-{program}-{rank}")
step, steps = int(checkpoint.read_text()) if checkpoint.exists() else 0, int(options["steps"])
log(
    "start",
    step=step,
    node=os.environ["SLURMD_NODENAME"],
    world=os.environ.get("WORLD_SIZE", "1"),
    rendezvous=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
    gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
    overrides=overrides,
    environment=dict(os.environ),
    prefix=sys.prefix,
)
if os.environ["SLURMD_NODENAME"] in options.get("broken", "").split(","):
    with Path(os.environ["SUSPECTS_FILE"]).open("a") as file:
        file.write(os.environ["SLURMD_NODENAME"] + "\n")
    sys.exit(1)
while step < steps and not stopped:
    step += 1
    time.sleep(0.05)
if stopped:
    time.sleep(2)  # a checkpoint takes time: nothing may end this process meanwhile
checkpoint.write_text(str(step))
if stopped and rank == 0:
    Path(os.environ["REQUEUE_FILE"]).touch()
log("end", step=step)
