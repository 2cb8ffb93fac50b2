"""Any source to WebDataset shards `train/` and `heldout/`: made by a pool of processes, written in order by one.

The shards grow in `output_dir/.building` and move to their places when all are complete, `train/` last: a folder with
`train/manifest.json` is a finished build, and nobody ever sees a part of one.
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import BuildRun, ImageFormat
from data.captions import caption_rank
from data.images import parse_color
from data.manifest import MANIFEST, Manifest
from data.records import Record, RecordMaker, Reject, make_all
from data.shards import ShardInfo, ShardWriter, atomic_write
from data.sources import SampleSource, open_source

REJECTS = "rejects.jsonl"
ATTRIBUTION = "ATTRIBUTION"
STAGING = ".building"
MADE_BY = "data/build_shards.py"
PENDING_BYTES = 2**28  # of samples kept in memory while the split of a small set is not settled
LINE_EVERY_S = 10.0  # seconds between two lines of progress where there is no terminal


@dataclass(kw_only=True, slots=True)
class Built:
    """What lies in the output folder now."""

    train: Manifest
    heldout: Manifest
    rejected: int
    skipped: bool  # it was there already


def build(cfg: BuildRun) -> Built:
    """Build the shards that `cfg` describes, or find them finished.

    Raises UserError when the folder holds a build with other options, or when no sample at all could be used.
    """
    try:
        parse_color(cfg.background)
    except ValueError as error:
        raise UserError(f"background={cfg.background}: not a colour name or #rrggbb") from error
    source = open_source(cfg)
    options = _identity(cfg, source)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if (output / "train" / MANIFEST).is_file():
            built = _finished(output, options)
            print(f"already built: {_summary(built)} in {output}")
            return built
        _clear_killed_build(output)
        built = _build(cfg, source, options, output)
    print(f"built {_summary(built)} in {output}")
    return built


def _build(cfg: BuildRun, source: SampleSource, options: dict[str, Any], output: Path) -> Built:
    staging = output / STAGING
    staging.mkdir()
    try:
        shards, reasons = _write_shards(cfg, source, staging)
        if not shards["train"]:
            os.replace(staging / REJECTS, output / REJECTS)
            raise UserError(
                f"source={cfg.source.value}: none of {len(source)} samples can be used, most often because: "
                f"{reasons.most_common(1)[0][0]}; all reasons are in {output / REJECTS}"
            )
        description = source.describe()
        manifests = {
            side: Manifest(
                kind="images",
                shards=shards[side],
                provenance={"made_by": MADE_BY, "split": side, "options": options, "source": description},
                stats={"rejected": reasons.total()},
            )
            for side in ("heldout", "train")
        }
        for side, manifest in manifests.items():
            manifest.save(staging / side)
        if "attribution" in description:
            atomic_write(staging / ATTRIBUTION, (description["attribution"] + "\n").encode())
        for name in os.listdir(staging):
            if name != "train":
                os.replace(staging / name, output / name)
        os.replace(staging / "train", output / "train")  # last: it marks the build as finished
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for reason, count in reasons.most_common(3):
        print(f"rejected {count} x: {reason}", file=sys.stderr)
    return Built(train=manifests["train"], heldout=manifests["heldout"], rejected=reasons.total(), skipped=False)


def _write_shards(
    cfg: BuildRun, source: SampleSource, staging: Path
) -> tuple[dict[str, list[ShardInfo]], Counter[str]]:
    """Make all samples and write each to its side; the reasons of the rejects, counted."""
    reasons = Counter[str]()
    with (
        ShardWriter(staging / "train", cfg.shard_samples) as train,
        ShardWriter(staging / "heldout", cfg.shard_samples) as heldout,
        open(staging / REJECTS, "w", encoding="utf-8") as rejects,
        _progress(len(source)) as advance,
    ):
        split = Split(train, heldout, cfg.heldout_fraction)
        for made in make_all(RecordMaker(cfg, source), cfg.workers):
            if isinstance(made, Reject):
                reasons[made.reason] += 1
                rejects.write(json.dumps({"key": made.key, "path": made.path, "reason": made.reason}) + "\n")
            else:
                split.add(made)
            advance()
        split.settle()
    return {"train": train.finished, "heldout": heldout.finished}, reasons


@dataclass(slots=True)
class Split:
    """Sends each sample to training or to the held-out side, by its caption alone.

    In a set so small that one side would stay empty, the caption nearest to the border moves there, if there are two
    captions. Until both sides have a sample (or at most 256 MiB wait) nothing is written, since this is not known.
    """

    train: ShardWriter
    heldout: ShardWriter
    fraction: float
    pending: list[Record] | None = field(default_factory=list)  # None: settled
    pending_bytes: int = 0

    def __post_init__(self) -> None:
        if self.fraction == 0:
            self.pending = None

    def add(self, record: Record) -> None:
        """Write the sample, now or when the split is settled."""
        if self.pending is None:
            self._write(record)
            return
        self.pending.append(record)
        self.pending_bytes += sum(map(len, record.files.values()))
        first, last = caption_rank(self.pending[0].caption), caption_rank(record.caption)
        if (first < self.fraction) != (last < self.fraction) or self.pending_bytes > PENDING_BYTES:
            self._flush()

    def settle(self) -> None:
        """Write what still waits: call it after the last sample."""
        if self.pending is None:
            return
        ranks = sorted({caption_rank(record.caption) for record in self.pending})
        if len(ranks) < 2:
            self.fraction = 0.0
        elif ranks[0] >= self.fraction:  # no caption is held out: take the lowest
            self.fraction = ranks[1]
        else:  # all are: leave the highest for training
            self.fraction = ranks[-1]
        self._flush()

    def _flush(self) -> None:
        waiting, self.pending = self.pending or [], None
        for record in waiting:
            self._write(record)

    def _write(self, record: Record) -> None:
        held_out = caption_rank(record.caption) < self.fraction
        (self.heldout if held_out else self.train).add(record.key, record.files)


def _identity(cfg: BuildRun, source: SampleSource) -> dict[str, Any]:
    """Every option that the shards depend on, and no other: `workers` may change."""
    names = ["shard_samples", "heldout_fraction", "resolution", "background", "max_pixels"]
    names += [] if cfg.format is ImageFormat.png else ["quality"]
    options = {name: getattr(cfg, name) for name in names}
    return {"source": cfg.source.value, "format": cfg.format.value, **options, **source.identity()}


def _finished(output: Path, options: dict[str, Any]) -> Built:
    """The build that is there; raises UserError when its options are others."""
    train, heldout = (Manifest.load(output / side) for side in ("train", "heldout"))
    if train.provenance.get("made_by") != MADE_BY:
        raise UserError(f"output_dir={output}: holds shards of another origin; choose another output_dir")
    there = train.provenance["options"]
    for name in [*options, *there]:
        if options.get(name) != there.get(name):
            difference = f"{name} differs: {there.get(name)} there, {options.get(name)} now"
            if name == "path":
                difference = "the files at path have changed"
            raise UserError(
                f"output_dir={output}: holds a build with other options ({difference}); "
                "choose another output_dir or delete this one"
            )
    return Built(train=train, heldout=heldout, rejected=train.stats["rejected"], skipped=True)


def _clear_killed_build(output: Path) -> None:
    """Remove what a killed build left; what is not known to be its own is never touched."""
    sides = [output / "train", output / "heldout"]
    if (output / STAGING).exists():
        for path in (*sides, output / STAGING):
            shutil.rmtree(path, ignore_errors=True)
    for path in sides:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UserError(
                f"output_dir={output}: {path.name}/ is there and not a finished build; choose another output_dir"
            )


def _summary(built: Built) -> str:
    size = (built.train.bytes + built.heldout.bytes) / 1e6
    return (
        f"{built.train.samples} samples for training and {built.heldout.samples} held out ({size:.1f} MB), "
        f"{built.rejected} rejected{' (see ' + REJECTS + ')' if built.rejected else ''},"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a folder at a time; a second one waits, for example for a process whose parent was killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build of {folder} to end", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a network file system without locks: builds of the same folder are then the user's care
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, else a line now and then; yields the function to call after each sample."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress("build", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("build", total=total)
            yield lambda: bar.advance(task)
        return
    done, shown = 0, time.monotonic()

    def line() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown > LINE_EVERY_S:
            shown = time.monotonic()
            print(f"build: {done}/{total} samples", file=sys.stderr, flush=True)

    yield line
