"""Any source to WebDataset shards `train/` and `heldout/`: made by a pool of processes, written in order by one.

The shards grow in `output_dir/.building` and move to their places when all are complete, `train/` last: a folder with
`train/manifest.json` is a finished build, and nobody ever sees a part of one. A build that was killed goes on there.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import atomic_write
from conf.process import lock, tell, wait_for_lock
from conf.schema import BuildRun, FilterConfig, ImageFormat
from data.building.journal import ATTRIBUTION, REJECTS, REPORT, SIDES, TIMES, BuildJournal
from data.building.records import Record, RecordMaker, make_all
from data.building.sources import SampleSource, open_source
from data.building.sources.folder import by_suffix
from data.building.split import Split
from data.captions import Border
from data.images import parse_color
from data.labels import Vocabulary
from data.shards.manifest import MANIFEST, Manifest
from data.shards.remote import is_remote
from data.shards.shard import ShardInfo, ShardWriter

STAGING = ".building"
MADE_BY = "data/build_shards.py"
LINE_EVERY_S = 10.0  # seconds between two lines of progress where there is no terminal


@dataclass(kw_only=True, slots=True)
class Built:
    """Shards that lie in the output folder now."""

    train: Manifest
    heldout: Manifest
    skipped: bool  # it was there already

    @property
    def rejected(self) -> int:
        """Broken samples."""
        return int(self.train.stats.get("rejected", 0))

    @property
    def dropped(self) -> int:
        """Samples that filters left out."""
        return sum(self.train.stats.get("dropped", {}).values())


def build_shards(cfg: BuildRun) -> Built:
    """Build the shards that `cfg` describes, or find them finished.

    Raises UserError when the folder holds a build with other options, or when no sample at all could be used.
    """
    try:
        parse_color(cfg.background)
    except ValueError as error:
        raise UserError(f"background={cfg.background}: not a colour name or #rrggbb") from error
    source = open_source(cfg)
    options, known = _identity(cfg, source), source.vocabulary()
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if (output / "train" / MANIFEST).is_file():
            built = _finished(output, options, source.times())
            shutil.rmtree(output / STAGING, ignore_errors=True)  # killed in its very last step
            print(f"already built: {_summary(built)} in {output}")
            return built
        _check_folder(output)
        built = _build(cfg, source, options, known, output)
    print(f"built {_summary(built)} in {output}")
    return built


def is_outdated(cfg: BuildRun) -> bool:
    """Whether a finished build is of other files than its source has now; False where the source is gone."""
    folder = Path(cfg.output_dir) / "train"
    if not (folder / MANIFEST).is_file() or not (cfg.path or cfg.sources) or is_remote(cfg.path or ""):
        return False
    try:
        source = open_source(cfg)
        there, now = Manifest.load(folder).provenance, _identity(cfg, source)
    except UserError:
        return False
    return (_difference(there.get("options", now), now) or _edited(folder.parent, source.times())) != ""


def _build(cfg: BuildRun, source: SampleSource, options: dict[str, Any], known: Vocabulary, output: Path) -> Built:
    journal = BuildJournal(output / STAGING, options | {TIMES: source.times()})
    journal.vocabulary.learn(known.uses())
    shards, border = _write_shards(cfg, source, journal)
    report = journal.report({side: sum(shard.samples for shard in shards[side]) for side in SIDES})
    if not shards["train"]:
        os.replace(journal.rejects, output / REJECTS)
        shutil.rmtree(journal.staging)
        if not report.seen:
            where = f"in path={cfg.path}" if cfg.path else "in one of the sources, and so none in their mix"
            raise UserError(f"source={cfg.source.value}: there is no sample {where}")
        if shards["heldout"]:
            raise UserError(f"heldout_fraction={cfg.heldout_fraction}: no sample is left for training; lower it")
        raise UserError(
            f"source={cfg.source.value}: none of {report.seen} samples can be used, most often because: "
            f"{report.commonest()}; all reasons are in {output / REJECTS}"
        )
    description, labels = source.describe(), journal.vocabulary.as_dict()
    manifests = {
        side: Manifest(
            kind="images",
            shards=shards[side],
            provenance={"made_by": MADE_BY, "split": side, "options": options, "source": description}
            | ({"labels": labels} if labels else {})
            | ({"split_by": "key"} if border.by_key else {}),
            stats={"rejected": sum(report.broken.values()), "dropped": dict(report.dropped)},
        )
        for side in SIDES
    }
    for side, manifest in manifests.items():
        manifest.save(journal.staging / side)
    atomic_write(journal.staging / REPORT, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
    if source.times():
        atomic_write(journal.staging / TIMES, source.times().encode())
    if "attribution" in description:
        atomic_write(journal.staging / ATTRIBUTION, (description["attribution"] + "\n").encode())
    journal.publish(output)
    report.show()
    for line in _remarks(cfg.heldout_fraction, report.kept, border):
        print(line)
    return Built(train=manifests["train"], heldout=manifests["heldout"], skipped=False)


def _remarks(fraction: float, kept: dict[str, int], border: Border) -> Iterator[str]:
    """Remarks on what is unusual about the held-out side, a line each."""
    held_out, total = kept["heldout"], sum(kept.values())
    if fraction == 0:
        return
    if held_out == 0:
        why = "there is only one" if total == 1 else f"no caption falls below heldout_fraction={fraction}; raise it"
        yield f"no sample is held out: {why}"
    elif border.by_key:
        yield "samples are held out one by one, since nearly all captions are the same: they are trained on, too"
    elif held_out > max(fraction, 0.5) * total:
        yield f"{held_out} of {total} samples are held out, since many have the same caption; see heldout_fraction"


def _write_shards(
    cfg: BuildRun, source: SampleSource, journal: BuildJournal
) -> tuple[dict[str, list[ShardInfo]], Border]:
    """Make all samples that no finished shard holds yet, and write each to its side; the border between the sides."""
    done, finished = journal.done, journal.finished
    writers = [ShardWriter(journal.staging / side, cfg.shard_samples, len(finished[side])) for side in SIDES]
    copies = journal.copies(cfg.filters.near_duplicates)
    made = make_all(RecordMaker(cfg, source, done), cfg.workers, journal.staging / "fetched")
    expected = source.expected()
    with writers[0] as train, writers[1] as heldout, journal, _progress(expected, done.start) as advance:
        split = Split(train, heldout, cfg.heldout_fraction, journal.shard_finished)
        if done.border is not None:
            split.go_on(done.border)
        for number, item in enumerate(made, done.start):
            if isinstance(item, Record):
                item = journal.with_known_classes(item)
            if copies is not None and isinstance(item, Record):
                item = journal.without_copies(number, item, copies)
            if isinstance(item, Record):
                split.add(number, item)
            elif item is not None:
                journal.reject(number, item)
            advance()
            tell("building", number + 1, expected or 0)
        split.settle()
    shards = {side: finished[side] + writer.finished for side, writer in zip(SIDES, writers, strict=True)}
    return shards, split.border


def _identity(cfg: BuildRun, source: SampleSource) -> dict[str, Any]:
    """Every option that the shards depend on, and no other: `workers` may change."""
    names = ["shard_samples", "heldout_fraction", "resolution", "background", "max_pixels"]
    names += [] if cfg.format is ImageFormat.png else ["quality"]
    options = {name: getattr(cfg, name) for name in names}
    filters = {"filters": asdict(cfg.filters)} if cfg.filters != FilterConfig() else {}
    return {"source": cfg.source.value, "format": cfg.format.value, **options, **filters, **source.identity()}


def _finished(output: Path, options: dict[str, Any], times: str) -> Built:
    """The build that is there; raises UserError when its options or files are others."""
    train, heldout = (Manifest.load(output / side) for side in ("train", "heldout"))
    there = train.provenance.get("options")
    if train.provenance.get("made_by") != MADE_BY or not isinstance(there, dict):
        raise UserError(f"output_dir={output}: holds shards of another origin; choose another output_dir")
    difference = _difference(there, options) or _edited(output, times)
    if difference:
        raise UserError(
            f"output_dir={output}: holds a build of other options or files ({difference}); "
            "choose another output_dir or delete this one"
        )
    return Built(train=train, heldout=heldout, skipped=True)


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that two builds differ in, in words; empty where they are the same."""
    for name in {**now, **there}:
        if there.get(name) != now.get(name):
            if name == "path":
                return "the files at path have changed"
            return f"{name} differs: {there.get(name)} there, {now.get(name)} now"
    return ""


def _edited(output: Path, times: str) -> str:
    """Warning about files that were written again, with their names and sizes as before."""
    before = output / TIMES
    same = not before.is_file() or before.read_text() == times  # an older build has no times
    return "" if same else "files at path were written again since then"


def _check_folder(output: Path) -> None:
    """Refuse a folder with files that are of no build: they are never touched."""
    for path in (output / side for side in SIDES):
        if not (output / STAGING).exists() and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise UserError(
                f"output_dir={output}: {path.name}/ is there and not a finished build; choose another output_dir"
            )


def _summary(built: Built) -> str:
    others = by_suffix(_others(built.train.provenance["source"]))
    size = (built.train.bytes + built.heldout.bytes) / 1e6
    return (
        f"{built.train.samples} samples for training and {built.heldout.samples} held out ({size:.1f} MB), "
        f"{built.rejected} rejected, {built.dropped} dropped by filters"
        f"{' (see ' + REJECTS + ')' if built.rejected or built.dropped else ''},"
        f"{' other files left out: ' + others + ',' if others else ''}"
    )


def _others(source: dict[str, Any]) -> Counter[str]:
    """Files that a source, or those of a mix, did not take for images, by suffix."""
    counts = Counter(source.get("other_files", {}))
    return sum(map(_others, source.get("sources", {}).values()), counts)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: one build at a time; a second one waits, as for one whose parent was killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor):
            print(f"waiting for another build of {folder} to end", file=sys.stderr)
            wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _progress(total: int | None, start: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, else a line now and then; yields the function to call after each sample."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress("build", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("build", total=total, completed=start)
            yield lambda: bar.advance(task)
        return
    done, shown = start, time.monotonic()

    def line() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown > LINE_EVERY_S:
            shown = time.monotonic()
            print(f"build: {done}{f'/{total}' if total is not None else ''} samples", file=sys.stderr, flush=True)

    yield line
