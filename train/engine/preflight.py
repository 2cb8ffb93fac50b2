"""Seconds before a training of several processes: does each machine compute, reach the others, and see one folder?

A GPU that multiplies wrongly, a link that is slow or a folder that is not shared show themselves hours later, as a loss
that is not finite, a slow run, or a checkpoint that is not found. Findings travel through the launcher's store, which
needs neither the devices nor the links that are looked at; one line each goes to stderr, with the rank and its machine.
What is an error ends the run on all processes, and names the machine for the batch script, which leaves it out.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed import P2POp, PrefixStore  # type: ignore[attr-defined]

from conf.errors import UserError, first_line
from conf.process import node_name, suspect
from conf.schema import AutoencoderRun, ClipRun, DistillRun, UNetRun
from train.engine.runtime import Runtime

PATIENCE_S = 120.0  # for what takes a second: the first collective over many nodes takes some
SIDE = 512  # of the matrices
FREE = 0.8  # share of a GPU's memory: with less, somebody else is on it
NUMBERS = 2**20  # float32, 4 MiB, that travel to the next process
ROUNDS = 3  # of which the fastest counts
SLOW, NOTICEABLE_S = 3.0, 0.02  # times the median, and at least so much longer
SHARED_WITHIN_S = 10.0  # that a network file system may take to show a new file
SAME_TIME_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong on one process, and what to do about it."""

    text: str
    fatal: bool = True
    shared: bool = False  # of a link or a folder, so that sound machines may find it, too


@dataclass(frozen=True, slots=True)
class Report:
    """What one process found in a round of checks."""

    node: str  # empty: not known
    findings: list[Finding]
    seconds: float = 0.0  # of the exchange with its neighbours
    time: float = 0.0  # of its clock, at a moment that all share

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: bytes) -> "Report":
        facts = json.loads(text)
        return cls(**facts | {"findings": [Finding(**finding) for finding in facts["findings"]]})


def preflight(cfg: AutoencoderRun | ClipRun | DistillRun | UNetRun, runtime: Runtime) -> None:
    """Look at devices first, since what follows needs them; then at links, folder and clocks.

    Raises:
        UserError: on all processes, if something is wrong on one of them.

    """
    if runtime.world == 1 or not cfg.runtime.preflight:
        return
    store = PrefixStore("preflight", c10d._get_default_store().clone())  # whose patience is its own
    store.set_timeout(timedelta(seconds=2 * PATIENCE_S))
    exchange(store, runtime, "device", Report(node_name(), check_device(runtime.device)))
    folder = Path(cfg.output_dir)
    token = folder / ".preflight"
    findings = write_token(token, store) if runtime.is_main else []
    linked, seconds = check_links(runtime)
    now = time.time()
    if runtime.local_rank == 0:
        findings += check_folder(folder, token, answered(store, "token"), runtime.rank)
    try:
        exchange(store, runtime, "links", Report(node_name(), linked + findings, seconds, now))
    finally:
        if runtime.is_main:
            token.unlink(missing_ok=True)


def exchange(store: Any, runtime: Runtime, name: str, own: Report) -> None:
    """Bring the reports of a round to the main process, which tells what it makes of them; raises UserError on all."""
    store.set(f"{name}/{runtime.rank}", own.dumps())
    if runtime.is_main:
        store.set(f"{name}/verdict", judged(collected(store, name, runtime.world)))
    if verdict := answered(store, f"{name}/verdict").decode():
        raise UserError(verdict)


def answered(store: Any, key: str) -> bytes:
    """What the main process says; raises UserError where it says nothing."""
    try:
        answer: bytes = store.get(key)  # waits for it
        return answer
    except dist.DistStoreError:
        raise UserError(
            f"the preflight's main process did not answer in {2 * PATIENCE_S:.0f} s: look at its machine, and whether "
            "it can write to output_dir"
        ) from None


def collected(store: Any, name: str, world: int) -> list[Report]:
    """The report of each process; of one that does not answer, that it does not, and where it was when it last did."""
    keys = [f"{name}/{rank}" for rank in range(world)]
    try:
        store.wait(keys, timedelta(seconds=PATIENCE_S))
    except dist.DistStoreError:
        dead = [Finding(f"does not answer in {PATIENCE_S:.0f} s: look whether its machine lives")]
        before = [f"device/{rank}" for rank in range(world)]
        places = [Report.loads(store.get(key)).node if store.check([key]) else "" for key in before]
        return [
            Report.loads(store.get(key)) if store.check([key]) else Report(place, dead)
            for key, place in zip(keys, places, strict=True)
        ]
    return [Report.loads(text) for text in store.multi_get(keys)]


def judged(reports: Sequence[Report]) -> str:
    """Print a line for each finding, and name the nodes at fault for the batch script; returns what ends the run."""
    lines = [(rank, finding) for rank, report in enumerate(reports) for finding in report.findings]
    fatal = [(reports[rank].node, finding) for rank, finding in lines if finding.fatal]
    if not fatal:  # else times and clocks are not those of all
        suspicions = slow_links(reports) | wrong_clocks(reports)
        lines += [(rank, Finding(text, fatal=False)) for rank, text in sorted(suspicions.items())]
    for rank, finding in lines:
        kind, where = "error" if finding.fatal else "warning", reports[rank].node or "unknown machine"
        print(f"{kind}: preflight: rank {rank} ({where}): {finding.text}", file=sys.stderr, flush=True)
    if not fatal:
        return ""
    nodes = {node for node, finding in fatal if not finding.shared}
    # What half of the machines find of something that they share is not the fault of those that find it.
    of_shared = {node for node, finding in fatal if finding.shared}
    if 2 * len(of_shared) < len({report.node for report in reports}):
        nodes |= of_shared
    if nodes := nodes - {""}:
        suspect(sorted(nodes))
    remedy = f"leave out {', '.join(sorted(nodes))} (sbatch --exclude=), or mend" if nodes else "mend"
    return f"the preflight found what its lines above say: {remedy} it; runtime.preflight=false does not look"


def check_device(device: torch.device) -> list[Finding]:
    """Multiply matrices of small whole numbers, whose product every precision has exactly; look for other users."""
    left, right = (
        torch.randint(-8, 8, (SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)
    )
    try:
        product = (left.float().to(device) @ right.float().to(device)).cpu().double()
        if not torch.equal(product, left @ right):
            return [Finding(f"{device} multiplies wrongly: have it looked at, and leave out its machine")]
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free < FREE * total:
                used = f"{(total - free) / 2**30:.0f} of {total / 2**30:.0f} GiB of {device} are taken"
                return [Finding(f"{used}: nvidia-smi says by whom", fatal=False)]
    except RuntimeError as error:
        return [Finding(f"{device} fails: {first_line(error)}: have it looked at, and leave out its machine")]
    return []


def check_links(runtime: Runtime) -> tuple[list[Finding], float]:
    """Sum known numbers over all processes; then the seconds that a few megabytes take to and from the neighbours."""
    numbers = torch.arange(1024, dtype=torch.float32, device=runtime.device) % 16 + runtime.rank % 16
    expected = torch.arange(1024) % 16 * runtime.world + sum(rank % 16 for rank in range(runtime.world))
    block, received = (torch.ones(NUMBERS, device=runtime.device) for _ in range(2))
    after, before = (runtime.rank + 1) % runtime.world, (runtime.rank - 1) % runtime.world

    def to_the_next() -> list[Any]:
        return dist.batch_isend_irecv([P2POp(dist.isend, block, after), P2POp(dist.irecv, received, before)])

    try:
        finish([dist.all_reduce(numbers, async_op=True)], runtime.device)
        if not torch.equal(numbers.cpu().long(), expected):
            text = "sums over the processes are wrong: have network cards and NVLinks looked at"
            return [Finding(text, shared=True)], 0.0
        return [], min(timed(to_the_next, runtime.device) for _ in range(ROUNDS))
    except (RuntimeError, TimeoutError) as error:
        text = f"does not reach the others ({first_line(error)}): look at its network, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
        return [Finding(text, shared=True)], 0.0


def finish(works: Sequence[Any], device: torch.device) -> None:
    """Wait for collectives, but not as long as `runtime.timeout_s`.

    NCCL's are asked, since their `wait` takes no limit.
    """
    deadline = time.monotonic() + PATIENCE_S
    while device.type == "cuda" and not all(work.is_completed() for work in works):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer in {PATIENCE_S:.0f} s")
        time.sleep(1e-4)
    for work in works:
        work.wait(timedelta(seconds=PATIENCE_S))


def timed(begin: Callable[[], list[Any]], device: torch.device) -> float:
    """Seconds of one exchange, begun by all at once."""
    finish([dist.all_reduce(torch.zeros(1, device=device), async_op=True)], device)
    began = time.perf_counter()
    finish(begin(), device)
    return time.perf_counter() - began


def slow_links(reports: Sequence[Report]) -> dict[int, str]:
    """Processes whose exchange took much longer than that of others which cross as many machines."""
    found, kinds = dict[int, str](), dict[int, list[int]]()
    for rank, report in enumerate(reports):
        neighbours = reports[rank - 1], reports[(rank + 1) % len(reports)]
        kinds.setdefault(sum(neighbour.node != report.node for neighbour in neighbours), []).append(rank)
    for ranks in kinds.values():
        usual = median(reports[rank].seconds for rank in ranks)
        for rank in ranks:
            took = reports[rank].seconds
            if took > SLOW * usual and took > usual + NOTICEABLE_S:
                size = f"{4 * NUMBERS / 2**20:.0f} MiB to and from its neighbours took {1000 * took:.0f} ms"
                found[rank] = f"{size}, others took {1000 * usual:.0f}: look at its cables and cards"
    return found


def wrong_clocks(reports: Sequence[Report]) -> dict[int, str]:
    """The first process of each machine whose clock is far from the others'."""
    usual, told = median(report.time for report in reports), set[str]()
    found = dict[int, str]()
    for rank, report in enumerate(reports):
        if abs(report.time - usual) > SAME_TIME_S and report.node not in told:
            told.add(report.node)
            off = f"its clock is {report.time - usual:+.0f} s from the others'"
            found[rank] = f"{off}: times in logs and of files mislead; start chrony or ntpd there"
    return found


def write_token(token: Path, store: Any) -> list[Finding]:
    """Leave a file that all machines should see, and tell them what it holds."""
    text, findings = os.urandom(8).hex(), list[Finding]()
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(text)
    except OSError as error:
        findings = [Finding(f"cannot write '{token}' ({error.strerror}): set run_dir= to another folder", shared=True)]
    store.set("token", "" if findings else text)
    return findings


def check_folder(folder: Path, token: Path, expected: bytes, rank: int) -> list[Finding]:
    """Write, read and delete a file of this machine's, and look for the main process's."""
    own, text = folder / f".preflight-{rank}", os.urandom(8).hex()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(text)
        same = own.read_text() == text
        own.unlink()
    except OSError as error:
        return [Finding(f"cannot use '{folder}' ({error.strerror}): mount it there, or set run_dir=", shared=True)]
    if not same:
        return [Finding(f"'{folder}' does not give back what was written: look at its mount", shared=True)]
    deadline = time.monotonic() + SHARED_WITHIN_S
    while expected and content_of(token) != expected:
        if time.monotonic() > deadline:
            text = (
                f"'{folder}' is another one than the main process's: set run_dir= to a folder that all machines share"
            )
            return [Finding(text, shared=True)]
        time.sleep(0.1)
    return []


def content_of(path: Path) -> bytes:
    """Nothing where it cannot be read yet: a network file system may remember the file of an earlier start."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
