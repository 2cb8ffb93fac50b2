"""Cached latents as a data set: positions -> sample indices -> records of memory-mapped shards -> batch tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from conf.errors import UserError
from conf.schema import StreamConfig
from data.buckets import BucketedOrder, bucket_of
from data.captions import decode_text
from data.image_dataset import Batch, collate, digest_of, order_of, require_some
from data.latent_record import decode_npy
from data.order import Order, rng
from data.samples import Captions
from data.shards.manifest import find_shards
from data.shards.store import RecordStore


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Form of an array that every record has."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header: bytes  # of its .npy file
    file_bytes: int  # all of it

    @classmethod
    def of(cls, member: memoryview) -> Self:
        """Layout of a .npy file; `UserError` when it is none."""
        values = decode_npy(member)
        return cls(values.dtype, values.shape, bytes(member[: len(member) - values.nbytes]), len(member))

    def data(self, member: memoryview) -> memoryview:
        """The bytes of all values of a .npy file; `UserError` when it is of another layout."""
        start = len(self.header)
        if len(member) == self.file_bytes and member[:start] == self.header:
            return member[start:]
        values = decode_npy(member)
        if (values.dtype, values.shape) != (self.dtype, self.shape):
            raise UserError(f"{values.dtype} {list(values.shape)}, not {self} as in the first record")
        return values.reshape(-1).view(np.uint8).data

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


SHARED = ("tokens", "text")  # by all variants of an image; of the other arrays each has its own
Layout = dict[str, ArrayLayout]  # by the name of the array


def layout_of(record: Mapping[str, Any]) -> Layout:
    """Layout of a record; `UserError` when its moments are not [variants, 2·C, h, w]."""
    arrays = sorted(name for name in record if name.endswith(".npy"))
    layout = {name.removesuffix(".npy"): ArrayLayout.of(record[name]) for name in arrays}
    shape = layout["moments"].shape
    if len(shape) != 4 or shape[1] % 2:
        raise UserError(f"moments.npy is {layout['moments']}, not [variants, 2·C, h, w]: run the precompute again")
    return layout


class LatentDataset:
    """Cached latents. An item: {"moments" [2·C, h, w], "caption", "key", "position"} and, where they are cached,
    "tokens" [L] int64, "text" [L, D] and the arrays of other conditions; moments and text in the cache's dtype, which
    costs half the way to the device.
    """

    def __init__(
        self, folder: str | Path, seed: int, stream: StreamConfig | None = None, run: int = 1, batch: int = 1
    ) -> None:
        """Args:
        run: consecutive positions of the training stream that have one shape, in a cache with buckets.
        batch: those that lanes share, if there are any.
        """
        stream = stream or StreamConfig()
        self.manifest = find_shards(folder, "latents", stream)
        self.samples = self.manifest.samples
        self.seed, self.skip = seed, stream.skip_broken
        captioned = "caption" in self.manifest.provenance.get("conditions", ["caption"])
        required = [("moments.npy",), *([("tokens.npy",)] if captioned else []), ("txt",)]
        cached: list[str] = self.manifest.provenance.get("captions", ["caption"])
        if unknown := stream.captions.keys() - cached:
            raise UserError(
                f"stream.captions: '{folder}' has {', '.join(cached)}, not {min(unknown)}: precompute with "
                f"captions=[{','.join([*cached, min(unknown)])}]"
            )
        self.captions = Captions.of(stream.captions, cached)
        self.records = RecordStore(folder, self.manifest, required, stream)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.buckets = [bucket_of(shard.name) for shard in self.manifest.shards]
        self.layouts = {name: self._layout(name) for name in sorted(set(self.buckets))}
        self.layout = self.layouts[self.buckets[0]]
        if bucketed := len(self.layouts) > 1:
            if stream.lanes > 1 and run % batch:
                raise UserError(
                    f"stream.bucket_run={run}: must be a multiple of the samples that lanes share ({batch}), so that "
                    "every lane has its part of each run"
                )
            order = partial(order_of, seed, stream=stream, batch=batch)
            self.order: Order = BucketedOrder(seed, sizes, self.buckets, order, run)
        else:
            self.order = order_of(seed, sizes, stream, batch)
        self.digest = digest_of(self.manifest, stream, batch, run if bucketed else 0)

    def _layout(self, bucket: str) -> Layout:
        """Layout of all records of a bucket: that of the first one that can be read."""
        problem: UserError | None = None
        for shard in (i for i, name in enumerate(self.buckets) if name == bucket):
            first = self.records.first(shard)
            for index in range(first, first + self.manifest.shards[shard].samples):
                try:
                    return layout_of(self.records[index])
                except UserError as error:
                    problem = problem or UserError(f"{self.records.name(index)}: {error}")
                if not self.skip:
                    raise problem
        raise problem or UserError("no shards")

    def item(self, position: int) -> Batch:
        """The sample at a position of the training stream; of several variants, the one drawn for the position."""
        return _only(self.batch([position]))

    def at(self, index: int) -> Batch:
        """Sample `index` of the manifest, its first variant; its position is its index."""
        return _only(self.batch_at([index]))

    def batch(self, positions: Sequence[int]) -> Batch:
        """Items at these positions, gathered straight into batch tensors; all must have one shape."""
        self.records.prefetch(self.order.upcoming(positions))
        variants = self.layout["moments"].shape[0]
        chosen = [int(rng(self.seed, p, "variant").integers(variants)) if variants > 1 else 0 for p in positions]
        spoken = [self.captions.draw(self.seed, p) for p in positions]
        return self._gather(self.order.many(positions), chosen, spoken, positions, self.skip)

    def batch_at(self, indices: Sequence[int]) -> Batch:
        """Collated samples of the manifest, of one shape."""
        return self._gather(indices, [0] * len(indices), [0] * len(indices), indices)

    def batches_at(self, indices: Sequence[int], size: int) -> Iterator[Batch]:
        """Collated samples of the manifest, at most `size` of one shape at a time."""
        for name in self.layouts:
            own = [index for index in indices if self.bucket(index) == name]
            yield from (self.batch_at(own[start : start + size]) for start in range(0, len(own), size))

    def bucket(self, index: int) -> str:
        """Name of the bucket that a sample belongs to."""
        return self.buckets[self.records.place(index)[0]]

    @staticmethod
    def collate(items: Sequence[Batch]) -> Batch:
        """Stack tensors and positions; captions and keys become lists."""
        return collate(items)

    def _gather(
        self,
        indices: Sequence[int],
        variants: Sequence[int],
        captions: Sequence[int],
        positions: Sequence[int],
        skip: bool = False,
    ) -> Batch:
        # Straight from the memory maps into the batch: a record that is decoded and stacked would be copied twice.
        layout = self._common_layout(indices)
        several = len(self.captions.names) > 1
        shapes = {name: array.shape[name not in SHARED or several :] for name, array in layout.items()}  # of one each
        rows = {name: np.empty((len(indices), *shapes[name]), array.dtype) for name, array in layout.items()}
        targets = [(name, out.reshape(-1).view(np.uint8).data, out[0].nbytes) for name, out in rows.items()]
        keys, texts, kept, skipped = list[str](), list[str](), list[int](), list[str]()
        self.records.load(indices)
        for index, variant, caption, position in zip(indices, variants, captions, positions, strict=True):
            row = len(kept)
            try:
                record = self.records[index]
                for name, target, size in targets:
                    data = self._data(record, name, index, layout)
                    first = size * (caption * several if name in SHARED else variant)
                    target[row * size : (row + 1) * size] = data[first : first + size]
                texts.append(self._caption(record, index, caption))
            except UserError as error:
                if not skip:
                    raise
                skipped.append(str(error))
                continue
            keys.append(record["__key__"])
            kept.append(position)
        require_some(kept, skipped)
        batch: Batch = {name: _tensor(out[: len(kept)]) for name, out in rows.items()}
        if "tokens" in batch:
            batch["tokens"] = batch["tokens"].long()
        batch |= {"caption": texts, "key": keys, "position": torch.tensor(kept)}
        return {**batch, "skipped": skipped} if skip else batch

    def _common_layout(self, indices: Sequence[int]) -> Layout:
        """The layout of all these samples; refuses those of several buckets."""
        if len(self.layouts) == 1:
            return self.layout
        first, *others = {self.bucket(index) for index in indices}
        if others:
            raise UserError(
                "a micro-batch would hold images of two shapes: set stream.bucket_run to a multiple of "
                "batch.micro_batch_size (0: the global batch) and keep it when a run is continued"
            )
        return self.layouts[first]

    def _caption(self, record: dict[str, Any], index: int, caption: int) -> str:
        try:
            return self.captions.read(record)[caption] if caption else decode_text(record["txt"])
        except UserError as error:
            problem = f"its .txt is {error}: run data/precompute_latents.py again"
            raise UserError(f"{self.records.name(index)}: {problem}") from None

    def _data(self, record: dict[str, Any], name: str, index: int, layout: Layout) -> memoryview:
        try:
            return layout[name].data(record[f"{name}.npy"])
        except (KeyError, UserError) as error:
            found = error if isinstance(error, UserError) else f"missing, not {layout[name]} as in the first record"
        raise UserError(f"{self.records.name(index)}: {name}.npy is {found}: run data/precompute_latents.py again")


def _tensor(values: np.ndarray) -> torch.Tensor:
    if values.dtype == np.uint16:  # bits of bfloat16
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _only(batch: Batch) -> Batch:
    """The item of a batch of one."""
    return {name: int(v[0]) if name == "position" else v[0] for name, v in batch.items()}
