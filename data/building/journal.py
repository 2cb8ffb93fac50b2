"""What a build has done so far, so that one that was killed goes on where its finished shards end.

In the staging folder: `journal.jsonl`, one line for each finished shard, `rejects.jsonl`, and `hashes.bin`, the
perceptual hashes of what was kept. The last two are on the disk before a line of the journal says how far they reach.
"""

import json
import os
import shutil
import struct
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from conf.files import atomic_write
from data.building.filters import NearDuplicates
from data.building.records import Done, Record, Reject
from data.captions import Border
from data.labels import LabelError, Vocabulary
from data.shards.shard import ShardInfo

REJECTS = "rejects.jsonl"
REPORT = "report.json"
ATTRIBUTION = "ATTRIBUTION"
TIMES = "times"  # of the source's files; in no manifest, since equal files are the same data set
SIDES = ("train", "heldout")
PUBLISHED = ("heldout", REJECTS, REPORT, ATTRIBUTION, TIMES)  # and, after them, train
MOST = 500  # characters of a name or reason: those of a broken source may be as long as its images
HASH = struct.Struct("<qQ")  # number of the sample, perceptual hash


@dataclass(slots=True)
class BuildReport:
    """Counts of a source's samples: kept, broken, dropped."""

    kept: dict[str, int]  # by side
    broken: Counter[str] = field(default_factory=Counter)  # by reason
    dropped: Counter[str] = field(default_factory=Counter)  # by filter

    @property
    def seen(self) -> int:
        """Number of all samples of the source."""
        return sum(self.kept.values()) + sum(self.broken.values()) + sum(self.dropped.values())

    def as_dict(self) -> dict[str, Any]:
        """Values for `report.json`, the commonest reason first."""
        return {
            "seen": self.seen,
            "kept": self.kept,
            "broken": dict(self.broken.most_common()),
            "dropped": dict(self.dropped.most_common()),
        }

    def commonest(self) -> str:
        """Why most samples were left out."""
        return max([*self.broken.items(), *self.dropped.items()], key=lambda item: item[1])[0]

    def show(self) -> None:
        """Say it, if anything was left out."""
        if not self.broken and not self.dropped:
            return
        rows = [("seen", self.seen)]
        rows += [(f"broken: {reason}", count) for reason, count in self.broken.most_common(3)]
        if len(self.broken) > 3:
            rows.append(("broken for other reasons", sum(self.broken.values()) - sum(c for _, c in rows[1:])))
        rows += [(f"dropped by filters.{name}", count) for name, count in self.dropped.most_common()]
        for name, count in [*rows, ("kept", sum(self.kept.values()))]:
            print(f"{count:>12,}  {100 * count / self.seen:5.1f} %  {name}")


class BuildJournal:
    """The staging folder of a build; what a build with other options left there is removed.

    As a context manager it holds its files open for `reject`, `without_copies` and `shard_finished`.
    """

    def __init__(self, staging: Path, options: dict[str, Any]) -> None:
        self.staging, self.rejects, self.hashes = staging, staging / REJECTS, staging / "hashes.bin"
        self.lines, self.options = staging / "journal.jsonl", staging / "options.json"
        self.finished: dict[str, list[ShardInfo]] = {side: [] for side in SIDES}
        self.done, self.kept = Done(), dict[int, int]()
        self.written: dict[str, list[str]] = {}  # names of classes, as the journal has them
        self._open: list[IO[bytes]] = []
        wanted = json.dumps(options, sort_keys=True).encode()
        if not (self.options.exists() and self.options.read_bytes() == wanted and self._continue()):
            self.finished, self.done, self.written = {side: [] for side in SIDES}, Done(), {}
            if staging.exists():
                print(f"the build in {staging} had other options or files: it starts again")
                for path in (staging, *(staging.parent / side for side in SIDES)):
                    shutil.rmtree(path, ignore_errors=True)
            atomic_write(self.lines, b"")
            atomic_write(self.options, wanted)
        self.vocabulary = Vocabulary.of(self.written)
        self._cut()

    def _continue(self) -> bool:
        """Read which shards are finished; False when the folder is not as the journal says."""
        for name in PUBLISHED:  # it was killed while it moved its results out
            if (self.staging.parent / name).exists() and not (self.staging / name).exists():
                os.replace(self.staging.parent / name, self.staging / name)
        whole = list[str]()
        for line in self.lines.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by the kill, and so the last
                break
            info = ShardInfo(**entry["shard"])
            path = self.staging / entry["side"] / info.name
            if not path.exists() or path.stat().st_size != info.bytes:
                return False
            self.finished[entry["side"]].append(info)
            border = Border(entry["fraction"], entry.get("by_key", False))
            self.done = Done(border, {**self.done.until, entry["side"]: entry["until"]})
            self.written = entry.get("labels", self.written)
            whole.append(line + "\n")
        atomic_write(self.lines, "".join(whole).encode())
        if whole:
            print(f"going on with the build in {self.staging}: {len(whole)} shards are finished")
        return True

    def _cut(self) -> None:
        """Leave of rejects and hashes what the finished shards account for."""
        end = self.done.end
        lines = self.rejects.read_bytes().splitlines(keepends=True) if self.rejects.exists() else []
        whole = [line for line in lines if line.endswith(b"\n") and json.loads(line)["number"] < end]
        atomic_write(self.rejects, b"".join(whole))
        content = self.hashes.read_bytes() if self.hashes.exists() else b""
        entries = HASH.iter_unpack(content[: len(content) // HASH.size * HASH.size])
        self.kept = {number: value for number, value in entries if number < end}
        atomic_write(self.hashes, b"".join(HASH.pack(*entry) for entry in self.kept.items()))

    def __enter__(self) -> Self:
        self._open = [open(path, "ab") for path in (self.rejects, self.hashes, self.lines)]  # noqa: SIM115
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open:
            with suppress(OSError) if error else nullcontext():  # a full disk was told already
                file.close()

    def copies(self, distance: int) -> NearDuplicates | None:
        """The images kept so far, where near duplicates are looked for (distance >= 0)."""
        if distance < 0:
            return None
        known = NearDuplicates(distance)
        for value in self.kept.values():
            known.keep(value)
        return known

    def without_copies(self, number: int, record: Record, copies: NearDuplicates) -> Record | Reject:
        """The record, unless one before it looks the same; what was decided before a kill stays so."""
        if number < self.done.end:
            return record if number in self.kept else Reject(record.key, record.path, "as before", "near_duplicates")
        twin = copies.find(record.hash)
        if twin is not None:
            reason = f"looks like an image before it, whose phash is {twin:016x}"
            return Reject(record.key, record.path, reason, "near_duplicates")
        copies.keep(record.hash)
        self._open[1].write(HASH.pack(number, record.hash))
        return record

    def with_known_classes(self, record: Record) -> Record | Reject:
        """The record, unless its labels contradict those of a sample before it."""
        try:
            self.vocabulary.learn(record.uses)
        except LabelError as error:
            return Reject(record.key, record.path, str(error))
        return record

    def reject(self, number: int, reject: Reject) -> None:
        """Write a line, unless it is there from before a kill."""
        if number >= self.done.end:
            line = {"key": reject.key, "path": reject.path[:MOST], "reason": reject.reason[:MOST]}
            line |= {"filter": reject.filter} if reject.filter else {}
            self._open[0].write(json.dumps(line | {"number": number}).encode() + b"\n")

    def shard_finished(self, side: str, info: ShardInfo, until: int, border: Border) -> None:
        """A line, after all that it vouches for: the samples before number `until` of this side are on the disk."""
        line = {"side": side, "until": until, **asdict(border), "shard": asdict(info)}
        labels = self.vocabulary.as_dict()
        if labels != self.written:
            line["labels"] = self.written = labels
        self._open[2].write(json.dumps(line).encode() + b"\n")
        for file in self._open:
            file.flush()
            os.fsync(file.fileno())

    def report(self, kept: dict[str, int]) -> BuildReport:
        """Counts of all samples; call it after the last one."""
        report = BuildReport(kept)
        with open(self.rejects, "rb") as lines:
            for line in map(json.loads, lines):
                counter, name = (
                    (report.dropped, line["filter"]) if "filter" in line else (report.broken, line["reason"])
                )
                counter[name] += 1
        return report

    def publish(self, output: Path) -> None:
        """Move everything to its place, `train/` last: it marks the build as finished."""
        for name in PUBLISHED:
            if (self.staging / name).exists():
                os.replace(self.staging / name, output / name)
        os.replace(self.staging / "train", output / "train")
        shutil.rmtree(self.staging)
