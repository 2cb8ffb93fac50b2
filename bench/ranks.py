"""What `train/plan.py` says of 8 to 512 ranks against a simulation of one of them, and how fast weights are made.

The simulation (`_ranks.py`) runs the backends' own code without a second process; it knows no time. Each figure is
compared twice, since a prediction may be wrong in both directions. The time in which one of eight processes makes its
share of a network's first weights is real, and so is that of torch's constructor, which makes all.

Usage: ranks.py [NETWORK/WAY/RANKS...] with the names of `_ranks.py`; without any, `CASES` and the first weights.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from _compare import Comparison, main
from _ranks import Facts, config
from plan import MEMORY_BARS, both_ways
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.unet import UNet
from train.engine.backend.layout import Members, made_by_all

WORKER = Path(__file__).with_name("_ranks.py")
# Of ZeRO 3 at 12 billion parameters a simulation takes many minutes: it is left to those who name it.
CASES = [
    *(f"narrow/ddp/{ranks}" for ranks in (8, 64, 512)),
    *(f"sd1/fsdp/{ranks}" for ranks in (8, 64, 512)),
    *(f"sd1/{way}/64" for way in ("fsdp_all", "zero1", "zero2", "zero3")),
    *("sd1/fsdp_all/512", "sd1/zero2/512"),
    *("sdxl/fsdp/64", "sdxl/fsdp/512", "sdxl/zero1/64", "sdxl/zero3/64"),
    *("12b/fsdp/8", "12b/fsdp/64", "12b/fsdp/512", "12b/zero2/64"),
]
SENT_BARS = (0.98, 1.02)  # padding of ZeRO's shards, and what stage 3 leaves whole
OPERATIONS_BARS = {
    "ddp": (0.5, 2.0),  # the first bucket is a small one, and a gradient is in one bucket whole
    "fsdp": (1.0, 1.0),
    "fsdp_all": (1.0, 1.0),
    "zero1": (0.8, 1.2),  # gradients do not fill buckets to the brim
    "zero2": (0.8, 1.2),
    "zero3": (0.6, 1.4),  # what is gathered ahead joins some layers and splits others
    "zero3_all": (0.6, 1.4),
}
SHARE_OF, SHARE_BAR = 8, 0.25  # processes; twice what would be fair, as parameters are few and of many sizes


def of_one(case: str) -> tuple[Facts, Facts]:
    """What was planned of a rank and what was found, from a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    plan, found = json.loads(done.stdout.splitlines()[-1])
    return Facts(**plan), Facts(**found)


def of_a_rank(case: str) -> Iterator[Comparison]:
    """Memory, and what is sent in how many operations by which groups."""
    plan, found = of_one(case)
    yield from both_ways(f"memory_{case}", plan.most, found.most, "bytes", MEMORY_BARS)
    for group in found.sent.keys() | plan.sent.keys():
        ours, peer = plan.sent.get(group, 0), found.sent.get(group, 0)
        # Less is a layer that was let go of, or what is left whole.
        if max(ours, peer) > sum(found.sent.values()) / 100:
            yield from both_ways(f"sent_{group}_{case}".replace(" ", "_"), ours, peer, "bytes", SENT_BARS)
    bars, counts = OPERATIONS_BARS[case.split("/")[1]], (plan.operations, found.operations)
    ours, peer = (sum(count.values()) for count in counts)
    yield from both_ways(f"operations_{case}", ours, peer, "operations", bars)


def first_weights() -> Iterator[Comparison]:
    """One process's share of eight, by the code that all run, against all of them by torch's constructor.

    The largest network does not fit into this machine whole: its constructor is reckoned from SDXL's time for a weight.
    """
    dist.init_process_group("fake", rank=0, world_size=SHARE_OF, store=FakeStore())
    per_weight = 0.0
    for network in ("sd1", "sdxl", "12b"):
        cfg = config(f"{network}/fsdp/{SHARE_OF}").model
        with torch.device("meta"):
            skeleton = UNet(cfg)
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        started = time.perf_counter()
        made = made_by_all(partial(skeleton.initial, seed=0), shapes, torch.device("cpu"), Members(SHARE_OF, 0))
        elements = sum(tensor.numel() for _, tensor in made)
        ours_s = time.perf_counter() - started
        if network != "12b":
            started = time.perf_counter()
            UNet(cfg)
            per_weight = (time.perf_counter() - started) / elements
        yield Comparison(
            name=f"first_weights_{network}" + "_extrapolated" * (network == "12b"),
            ours=lambda ours_s=ours_s: ours_s,  # type: ignore[misc]
            peer=lambda peer_s=per_weight * elements: peer_s,  # type: ignore[misc]
            unit="s",
            bar=SHARE_BAR,
            lower_is_better=True,
            pairs=1,
        )


def comparisons(names: list[str]) -> Iterator[Comparison]:
    """Plans against simulations of the named cases, or of all; then also how fast first weights are made."""
    for case in names or CASES:
        yield from of_a_rank(case)
    if not names:
        yield from first_weights()


if __name__ == "__main__":
    main(comparisons(sys.argv[1:]))
