"""What a training sees: one data set, or several with their shares of one stream."""

import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from braceexpand import braceexpand

from conf.errors import UserError
from conf.schema import ImageConfig, StreamConfig
from data.image_dataset import Batch, ImageDataset, collate, decoded, require_some
from data.images import cut_of, to_pixels, to_tensor
from data.latent_dataset import LatentDataset, Layout
from data.order import Mix, rng
from data.samples import Captions
from data.shards.manifest import REMEDY, Manifest
from data.shards.store import read_at_a_time

Dataset = TypeVar("Dataset", ImageDataset, LatentDataset)
UNREADABLE = 1000  # samples in a row after which a stream is given up
SEED_STRIDE = 1_000_003  # between the seeds of the data sets of a mix


class Mixed:
    """Several data sets as one stream, each with its share of it and its own order.

    Args:
        weights: of the data sets; only their ratios count.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float], seed: int) -> None:
        self.datasets, self.mix = datasets, Mix(seed, weights)
        self.layout = getattr(datasets[0], "layout", {})  # of latents; that of all
        self.samples = sum(dataset.samples for dataset in datasets)
        members = "/".join(f"{d.digest}*{w}" for d, w in zip(datasets, weights, strict=True))
        self.digest = hashlib.sha256(members.encode()).hexdigest()

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the common stream."""
        places = [self.mix(position) for position in positions]
        parts = []
        for number, dataset in enumerate(self.datasets):
            mine = [row for row, (stream, _) in enumerate(places) if stream == number]
            if mine:
                part = dataset.batch([places[row][1] for row in mine])
                back = {places[row][1]: positions[row] for row in mine}
                part["position"] = torch.tensor([back[int(p)] for p in part["position"]])  # draws belong to it
                parts.append(part)
        rows = np.argsort(np.concatenate([part["position"] for part in parts])).tolist()
        skipped = [text for part in parts for text in part.pop("skipped", ())]
        batch = {name: _joined([part[name] for part in parts], rows) for name in parts[0]}
        return {**batch, "skipped": skipped} if self.datasets[0].skip else batch


class WebStream:
    """Images and captions that webdataset's own pipeline reads: tars at any address that it knows, also `pipe:`.

    Nobody knows which sample stands at a position before it is read. So none is promised to come once in an epoch, a
    training that goes on reads the shards in another order, and another number of processes sees others. All that is
    drawn for a sample is still of its position. Each reader (a process, or a loader of it) has its share of the shards;
    where there are fewer shards than readers each reads all of them, in an order of its own, and a batch may hold a
    sample more than once.
    """

    samples = sys.maxsize

    def __init__(
        self, urls: str, images: ImageConfig, seed: int, stream: StreamConfig, captions: Captions | None = None
    ) -> None:
        self.urls, self.images, self.seed = list(braceexpand(urls)), images, seed
        self.skip, self.buffer = stream.skip_broken, stream.buffer
        self.captions = captions or Captions.of(stream.captions)
        self.digest = hashlib.sha256(urls.encode()).hexdigest()
        if os.environ.get("RANK", "0") == "0":
            lost = "that each comes once, and that a run which goes on sees what it would have seen"
            print(f"stream.webdataset: {len(self.urls)} shards in no exact order; lost is {lost}", file=sys.stderr)

    def read(self, parts: Iterable[list[int]], start: int, reader: int, readers: int) -> Iterator[Batch]:
        """A batch for each list of positions; of so many readers this one begins with so many samples seen."""
        import webdataset

        order = random.Random(f"{self.seed}/{start}/{reader}")
        shuffle = webdataset.shuffle(self.buffer, initial=min(self.buffer, 100), rng=order)
        records = shuffle(self._records(start, reader, readers))
        for positions in parts:
            items, skipped = list[Batch](), list[str]()
            while len(items) < len(positions):
                record = next(records)
                try:
                    items.append(self._item(record, positions[len(items)]))
                except UserError as error:
                    skipped.append(str(error))
                    if not self.skip:
                        raise
                    if not items and len(skipped) == UNREADABLE:
                        require_some(items, skipped)
            yield {**collate(items), "skipped": skipped} if self.skip else collate(items)

    def _records(self, start: int, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """Samples of a reader's shards without end, which come in a new order in each epoch.

        Raises:
            UserError: an address that cannot be read, or an epoch of all shards in which no sample came.
        """
        import webdataset

        handler = webdataset.warn_and_continue if self.skip else webdataset.reraise_exception
        samples_of, few = webdataset.tarfile_to_samples(handler=handler), len(self.urls) < readers
        own = f"/{reader}" if few else ""  # in one order all would read the same samples at a time
        found = True
        for epoch in count():
            urls = list(self.urls)
            random.Random(f"{self.seed}/{start}/{epoch}{own}").shuffle(urls)
            share = urls[reader::readers] if found and not few else urls  # one without a sample proves nothing of all
            found = False
            try:
                for record in samples_of({"url": url} for url in share):
                    found = True
                    yield record
            except Exception as error:  # each protocol has errors of its own
                raise UserError(f"stream.webdataset: {' '.join(str(error).split())[:300]}") from None
            if not found and len(share) == len(urls):
                raise UserError(
                    f"stream.webdataset: none of {len(urls)} shards has a sample that can be read, {urls[0]} first: "
                    "check the addresses"
                )

    def _item(self, record: dict[str, Any], position: int) -> Batch:
        try:
            image, facts = decoded(record, self.images, self.captions)
        except UserError as error:
            raise UserError(f"{record.get('__url__')}: sample '{record['__key__']}': {error}") from None
        facts["caption"] = facts.pop("captions")[self.captions.draw(self.seed, position)]
        cut = cut_of(*image.size, self.images.crop, self.images.flip, rng(self.seed, position, "crop"))
        side = self.images.resolution
        pixels = to_tensor(to_pixels(image, side, side, cut, self.images.filter))
        return {"pixels": pixels, **facts, "position": position}


def image_stream(
    folder: str,
    images: ImageConfig,
    seed: int,
    stream: StreamConfig,
    global_batch: int,
    captions: Captions | None = None,
) -> ImageDataset | Mixed | WebStream:
    """Images and captions for a training: FOLDER/train, and its share of each data set of the mix; or what is named.

    Args:
        captions: which an image has; None: those of the stream.
    """
    if stream.webdataset is not None:
        return WebStream(stream.webdataset, images, seed, stream, captions)
    batch = _shared_by_lanes(stream, global_batch)

    def opened(train: str, own_seed: int) -> ImageDataset:
        return ImageDataset(train, images, own_seed, stream, batch=batch, captions=captions)

    members = _members(folder, seed, stream, opened)
    return members[0] if len(members) == 1 else Mixed(members, [1.0, *stream.mix.values()], seed)


def latent_stream(
    folder: str, seed: int, stream: StreamConfig, global_batch: int
) -> tuple[LatentDataset | Mixed, list[Manifest]]:
    """Cached latents for a training, and of each data set of the mix; with the manifests, which must fit the run."""
    run, batch = stream.bucket_run or global_batch, _shared_by_lanes(stream, global_batch)
    members = _members(folder, seed, stream, lambda train, own_seed: LatentDataset(train, own_seed, stream, run, batch))
    for option, member in zip([f"latents={folder}", *(f"stream.mix: '{n}'" for n in stream.mix)], members, strict=True):
        if part := member.manifest.provenance.get("train_shards"):
            raise UserError(
                f"{option}: has latents of a part of the images (data/precompute_latents.py train_shards={part}), for "
                "train_unet.py encode=true: set that, or precompute all of them into another folder"
            )
    if len(members) > 1 and any(len(member.layouts) > 1 for member in members):
        raise UserError("stream.mix: caches with aspect buckets cannot be mixed; precompute with buckets.max_aspect=1")
    for name, member in zip(stream.mix, members[1:], strict=True):
        if member.layout != members[0].layout:
            raise UserError(
                f"stream.mix: latents in '{name}' have other arrays ({_described(member.layout)}) than those in "
                f"'{folder}' ({_described(members[0].layout)}): precompute both with the same options"
            )
    mixed = members[0] if len(members) == 1 else Mixed(members, [1.0, *stream.mix.values()], seed)
    return mixed, [member.manifest for member in members]


def _shared_by_lanes(stream: StreamConfig, global_batch: int) -> int:
    """Consecutive positions of the stream of which each lane has its part."""
    batch = stream.lane_batch or global_batch
    if batch % max(1, stream.lanes):
        name = f"stream.lane_batch={batch}" if stream.lane_batch else f"batch.global_batch_size={batch}"
        raise UserError(f"stream.lanes={stream.lanes}: must divide {name}")
    if stream.lanes > 1 and stream.mix:
        raise UserError("stream.lanes: a mix is not read in lanes; leave stream.mix out, or set stream.lanes=0")
    return batch


def _described(layout: Layout) -> str:
    return ", ".join(f"{name} {array}" for name, array in layout.items())


def _members(folder: str, seed: int, stream: StreamConfig, read: Callable[[str, int], Dataset]) -> list[Dataset]:
    """Each data set, by its folder and its seed: were the seeds equal, equal positions would be cropped alike."""
    members = [read(f"{folder}/train", seed)]
    for number, name in enumerate(stream.mix, start=1):
        try:
            members.append(read(f"{name}/train", seed + number * SEED_STRIDE))
        except UserError as error:
            line = str(error)
            for remedy in REMEDY.values():  # names another option
                line = line.replace(remedy, "name a folder that holds train/, or leave it out")
            raise UserError(f"stream.mix: {line}") from None
    stores = [member.records for member in members]
    needed = sum(read_at_a_time(s.manifest, stream) for s in stores if s.cache is not None and not s.ranges)
    if stream.mix and needed > stream.cache_gb * 1e9:  # each alone would fit into the cache that all share
        raise UserError(
            f"stream.cache_gb={stream.cache_gb:g}: {needed / 1e9:.3g} GB of the data sets of stream.mix are read at a "
            "time and would be fetched again and again: set a lower stream.window (0 is the largest), or more cache_gb"
        )
    return members


def _joined(values: list[Any], rows: list[int]) -> Any:
    """Tensors [B_i, ...] or lists end to end, then in the order of `rows`."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)[rows]
    joined = [value for part in values for value in part]
    return [joined[row] for row in rows]
