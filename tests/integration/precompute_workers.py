"""Several precompute processes on one folder, each killed at random moments, until the cache is finished.

    python precompute_workers.py KILLS OVERRIDE...

They are forked from this one, which imports everything once: a fresh start takes longer than they live.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from conf.entry import compose, to_plain
from conf.schema import PrecomputeRun
from train.engine.runtime import start
from train.latents import precompute as latents

WORKERS = 3


def work(overrides: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cfg = compose("precompute_latents", PrecomputeRun, overrides)
    latents.run_precompute(cfg, start(cfg.runtime), to_plain(cfg))
    os._exit(0)


def main(kills: int, overrides: list[str]) -> None:
    dice, fork = random.Random(0), multiprocessing.get_context("fork")
    folder = Path(next(o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")))
    workers = [fork.Process(target=work, args=(overrides,)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    killed = 0
    while any(worker.is_alive() for worker in workers) or not (folder / "heldout" / "manifest.json").exists():
        time.sleep(dice.uniform(0.05, 0.3))
        for number, worker in enumerate(workers):
            if worker.is_alive() and killed < kills and dice.random() < 0.7:
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join()
                killed += 1
            if not worker.is_alive() and worker.exitcode not in (0, -signal.SIGKILL):
                sys.exit(f"a worker ended with {worker.exitcode}")
            if not worker.is_alive() and worker.exitcode:
                workers[number] = fork.Process(target=work, args=(overrides,))
                workers[number].start()
    print(f"killed {killed}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
