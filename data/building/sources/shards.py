"""WebDataset shards of others, img2dataset's and LAION's as they are: on disk, or behind http(s):// and s3://."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from conf.errors import UserError
from conf.plain_json import loads
from conf.schema import BuildRun
from data.building.sources import Ref, Sample
from data.building.sources.files import Listing
from data.labels import MAP, Vocabulary
from data.samples import caption_of, fields_of, image_of
from data.shards.remote import fetch, is_remote, listed
from data.shards.shard import ShardReader, tars_in

IN_FLIGHT = 2**14  # refs after which those of an earlier shard are made, so that a fetched one can go
OPEN = 8  # shards that a process holds open


class ShardsSource:
    """`cfg.path`: a folder, a tar, or tars as in `FOLDER/{00000..00099}.tar`; also addresses of those."""

    def __init__(self, cfg: BuildRun) -> None:
        self.path, self.samples, self.timeout_s = cfg.path or "", cfg.samples, cfg.timeout_s
        self.shards = _expanded(self.path, self.timeout_s)
        if not self.shards:
            below = sorted({tar.parent.name for tar in Path(self.path).expanduser().glob("*/[!.]*.tar")})
            hint = f"; its subfolders {', '.join(below[:3])}{' …' * (len(below) > 3)} have some" if below else ""
            raise UserError(f"path={cfg.path}: no .tar in it{hint}")
        self._readers: dict[str, ShardReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def expected(self) -> int | None:
        """Number of samples, as img2dataset wrote it beside local shards, if it did."""
        counts = [_successes(Path(shard)) for shard in self.shards if not is_remote(shard)]
        known = [count for count in counts if count is not None]
        total = sum(known) if len(known) == len(self.shards) else None
        return min(total, self.samples) if total is not None and self.samples else total

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """Shard by shard; remote ones are fetched while the one before is at work, and removed some time afterwards."""
        return islice(self._refs(scratch), self.samples or None)

    def _refs(self, scratch: Path) -> Iterator[Ref]:
        yielded, spent = 0, deque[tuple[int, Path]]()
        with ThreadPoolExecutor(1) as ahead:
            following: dict[int, Future[Path]] = {}
            for number, shard in enumerate(self.shards):
                for near in (number, number + 1):
                    if near < len(self.shards) and near not in following:
                        following[near] = ahead.submit(self._local, near, scratch)
                for ref in self._refs_of(number, following.pop(number)):
                    yielded += 1
                    yield ref
                if is_remote(shard):
                    spent.append((yielded, scratch / f"{number}.tar"))
                while spent and yielded - spent[0][0] > IN_FLIGHT:
                    spent.popleft()[1].unlink(missing_ok=True)

    def _refs_of(self, number: int, local: Future[Path]) -> Iterator[Ref]:
        shard, prefix = self.shards[number], f"{number:05d}"
        try:
            reader = ShardReader(local.result(), tolerant=True)
            rows = len(reader)
        except UserError as error:
            yield Ref(prefix, shard, None, str(error))
            return
        for row in range(rows):
            yield Ref(f"{prefix}{row:06d}", f"{shard}: {reader.key(row)}", (str(reader.path), row))
        rejects = [(name, "no extension, and so of no sample") for name in reader.index.others]
        if problem := reader.index.problem:
            rejects.append(("", problem + (f"; its first {rows} samples are used" if rows else "")))
        for row, (name, problem) in enumerate(rejects, rows):
            yield Ref(f"{prefix}{row:06d}", f"{shard}: {name}" if name else shard, None, problem)

    def _local(self, number: int, folder: Path) -> Path:
        shard = self.shards[number]
        if not is_remote(shard):
            return Path(shard)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{number}.tar"
        fetch(shard, target, self.timeout_s)
        return target

    def sample(self, place: tuple[str, int]) -> Sample:
        """Contents and caption of a sample; raises UserError."""
        path, row = place
        if path not in self._readers:
            if len(self._readers) == OPEN:
                self._readers.pop(next(iter(self._readers)))
            self._readers[path] = ShardReader(Path(path), tolerant=True)
        record = self._readers[path][row]
        segments = bytes(record[MAP]) if MAP in record else None
        meta = {**fields_of(record), "source_key": record["__key__"]}
        return Sample(image_of(record), caption_of(record), meta, segments)

    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the samples' labels."""
        return Vocabulary()

    def identity(self) -> dict[str, Any]:
        """The shards: their names, and the sizes of local ones."""
        return {"path": self._files()[0], "samples": self.samples}

    def times(self) -> str:
        """When local shards were written."""
        return self._files()[1]

    def _files(self) -> tuple[str, str]:
        files = Listing()
        for shard in self.shards:
            files.add([os.path.basename(shard)], [Path(shard)])  # an address is no file
        return files.digests()

    def describe(self) -> dict[str, Any]:
        """Provenance."""
        return {"name": self.path if is_remote(self.path) else os.path.abspath(self.path), "shards": len(self.shards)}


def _expanded(path: str, timeout_s: float) -> list[str]:
    """Every tar that a path stands for."""
    try:
        names = list(braceexpand(path))
    except ValueError as error:
        raise UserError(f"path={path}: {error}") from None
    if len(names) > 1 or path.endswith(".tar"):
        return names
    if is_remote(path):
        return listed(path, timeout_s=timeout_s)
    folder = Path(path).expanduser()
    if folder.is_file():
        return [str(folder)]
    if not folder.is_dir():
        raise UserError(f"path={path}: no such folder or .tar")
    return [str(tar) for tar in sorted([*tars_in(folder), *tars_in(folder, compressed=True)])]


def _successes(shard: Path) -> int | None:
    try:
        return int(loads(shard.with_name(f"{shard.stem}_stats.json").read_bytes())["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
