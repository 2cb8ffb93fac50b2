"""One image shard to its latent shard, or one for each shape: decoding, encoding and writing side by side."""

import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from conf.errors import UserError
from conf.process import cores, tell
from conf.schema import PrecomputeRun, StreamConfig
from data.buckets import bucket_shapes, suffix_of
from data.image_dataset import Batch, ImageDataset, collate
from data.latent_record import ChannelStats, LatentRecord, LatentWriter, as_float32, read_latent
from data.shards.manifest import REMEDY, Manifest, ShardInfo
from data.shards.remote import joined
from data.shards.shard import without_dots
from data.shards.store import RecordStore
from train.engine.runtime import Threads
from train.latents.encoder import Encoded, LatentEncoder

PARTS = ".parts"
AHEAD = 2  # batches that are decoded before the encoder asks for them
AT_ONCE = {"cpu": 1, "cuda": 2}  # batches that are being encoded


class KnownMoments:
    """One side of a finished cache (`moments`) whose moments are taken over; where it is not whole, the run ends.

    Args:
        manifest: of that side.
    """

    def __init__(self, cache: str, side: str, manifest: Manifest) -> None:
        self.cache, self.numbers = cache, {shard.name: number for number, shard in enumerate(manifest.shards)}
        try:
            self.records = RecordStore(joined(cache, side), manifest, [("moments.npy",)], StreamConfig(window=1))
        except UserError as error:
            raise broken_moments(cache, error) from None

    def rows(self, index: int) -> dict[str, int]:
        """The records of the samples of an image shard, by key; none where its manifest lists no such shard."""
        number = self.numbers.get(f"{index:05d}.tar")
        if number is None:  # every sample was rejected
            return {}
        records = self.records
        try:
            return {records.key(row): row for row in range(records.first(number), records.first(number + 1))}
        except UserError as error:
            raise broken_moments(self.cache, error) from None

    def __getitem__(self, row: int) -> LatentRecord:
        try:
            return read_latent(self.records[row])
        except UserError as error:
            raise broken_moments(self.cache, f"{self.records.name(row)}: {error}") from None


def broken_moments(cache: str, problem: object) -> UserError:
    """What is wrong with a cache that is taken over, with the remedy of this option."""
    remedy = "copy the cache whole, or leave moments out to encode all anew"
    others = re.escape(REMEDY["latents"]) + "|rebuild it.*"
    return UserError(f"moments={cache}: {re.sub(others, remedy, str(problem))}")


@dataclass(slots=True)
class LatentSplit:
    """One side of the data set: its images, where its latents go, and their provenance."""

    name: str
    images: ImageDataset
    folder: Path
    provenance: dict[str, Any]
    finished: Manifest | None  # of an earlier run with this provenance
    known: KnownMoments | None = None

    @property
    def shards(self) -> int:
        """Image shards that are encoded, and so latent shards."""
        return min(len(self.images.manifest.shards), self.provenance["train_shards"] or sys.maxsize)

    def samples_of(self, index: int) -> range:
        """Numbers of the samples of an image shard."""
        first = self.images.records.first
        return range(first(index), first(index + 1))


def part_of(split: LatentSplit, index: int) -> dict[str, Any] | None:
    """The record of a shard that is complete and of this provenance; None: it is still to be encoded."""
    try:
        part: dict[str, Any] = json.loads((split.folder / PARTS / f"{index:05d}.json").read_text())
        whole = all((split.folder / info["name"]).stat().st_size == info["bytes"] for info in part["shards"])
    except FileNotFoundError:
        return None
    return part if whole and part["provenance"] == split.provenance else None


class LatentWriters:
    """Writes the records of one image shard: into one latent shard, or into one for each bucket that occurs."""

    def __init__(self, cfg: PrecomputeRun, folder: Path, index: int, samples: int) -> None:
        self.cfg, self.folder, self.index, self.samples = cfg, folder, index, samples
        self.stack = ExitStack()
        self.writers: dict[str, LatentWriter] = {}

    def __call__(self, encoded: Encoded, row: int, batch: Batch) -> None:
        """Append sample `row` of a batch, with what micro-conditioning needs: the image's size and the cuts."""
        found: dict[str, Any] = {}  # of what a cache has, its metadata say so already
        if "cuts" in batch:
            cuts, (width, height) = batch["cuts"][row], batch["size"][row]
            found = {"width": width, "height": height, "cuts": [asdict(cut) for cut in cuts]}
        text = None if encoded.text is None else encoded.text[row]
        tokens = None if encoded.tokens is None else encoded.tokens[row]
        self._writer(batch).add(
            batch["key"][row],
            encoded.moments[row],
            tokens,
            batch["captions"][row][0],
            batch["meta"][row] | found,
            text,
            {name: array[row] for name, array in encoded.arrays.items()},
        )

    def _writer(self, batch: Batch) -> LatentWriter:
        suffix = ""
        if self.cfg.buckets.max_aspect > 1:
            height, width = batch["pixels"].shape[-2:]
            suffix = suffix_of((width, height))
        if suffix not in self.writers:
            writer = LatentWriter(self.folder, self.samples, self.cfg.dtype, self.index, suffix)
            self.writers[suffix] = self.stack.enter_context(writer)
        return self.writers[suffix]

    def close(self) -> list[ShardInfo]:
        """Finish the shards, and tell of them in the order of their names."""
        infos = [info for writer in self.writers.values() for info in writer.close()]
        return sorted(infos, key=lambda info: info.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)


def encode_shard(
    cfg: PrecomputeRun, encoder: LatentEncoder, split: LatentSplit, index: int, threads: Threads
) -> dict[str, Any]:
    """Encode one shard; decoding, encoding and writing overlap. Returns what the manifest will need of it."""
    samples, stats = split.samples_of(index), ChannelStats(split.provenance["latent_channels"])
    encoded_samples = samples.start  # of this side, if this process is the only one
    rejects: list[dict[str, str]] = []
    encoder.forget()

    def write(batch: Batch, encoded: Encoded) -> None:
        for row, key in enumerate(batch["key"]):
            if encoded.sound(row):
                stats.add(encoded.moments[row])
                writers(encoded, row, batch)
            else:
                rejects.append({"key": key, "reason": "the encoder's output is not finite, in fp32 neither"})

    with LatentWriters(cfg, split.folder, index, len(samples)) as writers, ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        known = known_batches(split, index, cfg, rejects) if split.known is not None else None
        batches = known or decoded_batches(split.images, samples, cfg, rejects)
        for batch, encoded in encoded_batches(encoder, batches, threads):
            encoded_samples += len(batch["key"])
            tell("encoding", encoded_samples, split.images.samples)
            if written is not None:  # one batch is written at a time, in order; its error ends this shard
                written.result()
            written = background.submit(write, batch, encoded)
        if written is not None:
            written.result()
        shards = writers.close()
    return {
        "shards": [asdict(info) for info in shards],  # none: every sample was rejected
        "provenance": split.provenance,
        "stats": stats.state(),
        "rejects": rejects,
        "captions_cut": [encoder.cuts.count, encoder.cuts.lost],
    }


def encoded_batches(
    encoder: LatentEncoder, batches: Iterator[Batch], threads: Threads
) -> Iterator[tuple[Batch, Encoded]]:
    """Batches and what was made of them; on a GPU the next one is on its way while the results of one are awaited."""
    at_once = AT_ONCE[encoder.device.type]
    if at_once == 1:
        for batch in batches:
            threads.adjust()
            yield batch, encoder(batch)
        return
    pending = deque[tuple[Batch, Future[Any]]]()
    with ThreadPoolExecutor(at_once) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(encoder.of_images, batch)))
            if len(pending) == at_once:
                batch, made = pending.popleft()
                yield batch, encoder.with_texts(batch, *made.result())
        for batch, made in pending:
            yield batch, encoder.with_texts(batch, *made.result())


def known_batches(split: LatentSplit, index: int, cfg: PrecomputeRun, rejects: list[dict[str, str]]) -> Iterator[Batch]:
    """Batches of the samples of a shard that another cache has, with their captions; no image is decoded."""
    assert split.known is not None
    known, images, rows = split.known, split.images, split.known.rows(index)

    def load(number: int) -> Batch:
        key = images.records.key(number)
        row = rows.get(without_dots(key))
        if row is None:
            return {"key": key, "reason": f"{known.cache} has no latents of it"}
        try:
            captions = images.captions_at(number)
        except UserError as error:
            return {"key": key, "reason": str(error)}
        record = known[row]
        moments = torch.from_numpy(as_float32(record.moments))
        return {"key": key, "captions": captions, "meta": record.meta, "moments": moments, "arrays": record.arrays}

    return batches_of(load, split.samples_of(index), cfg, rejects)


def decoded_batches(
    images: ImageDataset, samples: Sequence[int], cfg: PrecomputeRun, rejects: list[dict[str, str]]
) -> Iterator[Batch]:
    """Batches of samples whose images are decoded."""
    shapes = bucket_shapes(cfg.images.resolution, cfg.buckets.max_aspect, cfg.buckets.step)

    def load(index: int) -> Batch:
        try:
            return images.variants(index, cfg.variants, shapes)
        except UserError as error:
            return {"key": images.records.key(index), "reason": str(error)}

    return batches_of(load, samples, cfg, rejects)


def batches_of(
    load: Callable[[int], Batch], samples: Sequence[int], cfg: PrecomputeRun, rejects: list[dict[str, str]]
) -> Iterator[Batch]:
    """Batches of samples of one shape each, loaded by threads ahead of time; those with a "reason" go to `rejects`."""
    waiting: dict[torch.Size, list[Batch]] = {}
    pending: deque[Future[Batch]] = deque()
    upcoming = iter(samples)
    with ThreadPoolExecutor(cfg.threads or cores()) as pool:
        pending.extend(pool.submit(load, index) for index in islice(upcoming, AHEAD * cfg.batch_size))
        while pending:
            item = pending.popleft().result()
            pending.extend(pool.submit(load, index) for index in islice(upcoming, 1))
            if "reason" in item:
                rejects.append(item)
                continue
            shape = item["moments" if "moments" in item else "pixels"].shape
            group = waiting.setdefault(shape, [])
            group.append(item)
            if len(group) == cfg.batch_size:
                yield collate(waiting.pop(shape))
    yield from map(collate, waiting.values())
