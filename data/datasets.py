"""Data sets of shards: which sample stands at a position of the stream, and what it holds as tensors.

positions -> sample indices -> records of memory-mapped shards -> tensors. All that is random about a sample is drawn
from (seed, position).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig, StreamConfig
from data.images import Cut, cut_of, open_image, to_square, to_tensor
from data.latents import decode_npy, read_latent
from data.manifest import Manifest, find_shards
from data.order import Mix, WindowedOrder, rng, sample_at
from data.record_store import RecordStore

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
SEED_STRIDE = 1_000_003  # between the seeds of the data sets of a mix
Batch = dict[str, Any]


class ImageDataset:
    """Images and captions. An item: {"image" [3, H, W] float32 in [-1, 1], "caption", "key", "meta", "position"}."""

    def __init__(self, folder: str | Path, images: ImageConfig, seed: int, stream: StreamConfig | None = None) -> None:
        self.manifest = find_shards(folder, "images")
        self.samples, self.digest = self.manifest.samples, self.manifest.digest()
        self.images, self.seed = images, seed
        self.order, self.skip = order_of(seed, self.manifest, stream), stream is not None and stream.skip_broken
        self.records = RecordStore(folder, self.manifest, [IMAGE_EXTENSIONS, ("txt",)])

    def item(self, position: int) -> Batch:
        """The sample at a position of the training stream, with its own crop and flip."""
        image, facts = self._open(self.order(position))
        cut = cut_of(*image.size, self.images.crop, self.images.flip, rng(self.seed, position, "crop"))
        return {"image": self._tensor(image, cut), **facts, "position": position}

    def at(self, index: int) -> Batch:
        """Sample `index` of the manifest, centre crop, never mirrored; its position is its index."""
        image, facts = self._open(index)
        return {"image": self._tensor(image, cut_of(*image.size)), **facts, "position": index}

    def variants(self, index: int, count: int) -> Batch:
        """Sample `index` as several squares, "image" [V, 3, H, W] and their "cuts".

        The first is that of `at`, the others have a crop and a flip of their own, pure functions of (seed, index).
        """
        image, facts = self._open(index)
        cuts = [cut_of(*image.size)]
        for variant in range(1, count):
            generator = rng(self.seed, index, f"variant {variant}")
            cuts.append(cut_of(*image.size, self.images.crop, self.images.flip, generator))
        return {"image": torch.stack([self._tensor(image, cut) for cut in cuts]), "cuts": cuts, **facts}

    def batch(self, positions: Sequence[int]) -> Batch:
        """Collated items; broken ones are left out and named in "skipped" where the stream says so."""
        if not self.skip:
            return self.collate([self.item(position) for position in positions])
        items, skipped = [], []
        for position in positions:
            try:
                items.append(self.item(position))
            except UserError as error:
                skipped.append(str(error))
        require_some(items, skipped)
        return {**self.collate(items), "skipped": skipped}

    def batch_at(self, indices: Sequence[int]) -> Batch:
        """Collated samples of the manifest."""
        return self.collate([self.at(index) for index in indices])

    @staticmethod
    def collate(items: Sequence[Batch]) -> Batch:
        """Stack images and positions; captions, keys and meta become lists."""
        return collate(items)

    def _open(self, index: int) -> tuple[Image.Image, Batch]:
        """The decoded picture of a sample, and what else is known of it."""
        record = self.records[index]
        content = bytes(next(record[name] for name in IMAGE_EXTENSIONS if name in record))
        try:
            image = open_image(content, self.images.max_pixels)
            meta = json.loads(bytes(record.get("json", b"{}")))
        except (UserError, ValueError) as error:
            remedy = "rebuild the shards with data/build_shards.py, which leaves broken samples out"
            raise UserError(f"{self.records.name(index)}: {error}: {remedy}") from None
        caption = bytes(record["txt"]).decode("utf-8", "replace").strip()
        return image, {"caption": caption, "key": record["__key__"], "meta": meta}

    def _tensor(self, image: Image.Image, cut: Cut) -> torch.Tensor:
        return to_tensor(to_square(image, self.images.resolution, cut))


class LatentDataset:
    """Cached latents. An item: {"moments" [2·C, h, w], "tokens" [L] int64, "text" [L, D] when it is cached, "caption",
    "key", "position"}; moments and text in the cache's dtype, which costs half the way to the device.
    """

    def __init__(self, folder: str | Path, seed: int, stream: StreamConfig | None = None) -> None:
        self.manifest = find_shards(folder, "latents")
        self.samples, self.digest = self.manifest.samples, self.manifest.digest()
        self.seed = seed
        self.order, self.skip = order_of(seed, self.manifest, stream), stream is not None and stream.skip_broken
        self.records = RecordStore(folder, self.manifest, [("moments.npy",), ("tokens.npy",), ("txt",)])
        first = read_latent(self.records[0])
        arrays = {"moments": first.moments, "tokens": first.tokens, "text": first.text}
        self.layout = {name: (a.dtype, a.shape) for name, a in arrays.items() if a is not None}  # of every record

    def item(self, position: int) -> Batch:
        """The sample at a position of the training stream; of several variants, the one drawn for the position."""
        return _only(self.batch([position]))

    def at(self, index: int) -> Batch:
        """Sample `index` of the manifest, its first variant; its position is its index."""
        return _only(self.batch_at([index]))

    def batch(self, positions: Sequence[int]) -> Batch:
        """Items at these positions, gathered straight into batch tensors."""
        variants = self.layout["moments"][1][0]
        chosen = [int(rng(self.seed, p, "variant").integers(variants)) if variants > 1 else 0 for p in positions]
        return self._gather([self.order(p) for p in positions], chosen, positions, self.skip)

    def batch_at(self, indices: Sequence[int]) -> Batch:
        """Collated samples of the manifest."""
        return self._gather(indices, [0] * len(indices), indices)

    @staticmethod
    def collate(items: Sequence[Batch]) -> Batch:
        """Stack tensors and positions; captions and keys become lists."""
        return collate(items)

    def _gather(
        self, indices: Sequence[int], variants: Sequence[int], positions: Sequence[int], skip: bool = False
    ) -> Batch:
        arrays = {
            name: np.empty((len(indices), *shape[name == "moments" :]), dtype)
            for name, (dtype, shape) in self.layout.items()
        }
        keys, captions, kept, skipped = list[str](), list[str](), list[int](), list[str]()
        for index, variant, position in zip(indices, variants, positions, strict=True):
            try:
                record = self.records[index]
                for name, out in arrays.items():
                    values = self._values(record, name, index)
                    out[len(kept)] = values[variant] if name == "moments" else values
            except UserError as error:
                if not skip:
                    raise
                skipped.append(str(error))
                continue
            keys.append(record["__key__"])
            captions.append(str(record["txt"], "utf-8"))
            kept.append(position)
        require_some(kept, skipped)
        batch: Batch = {name: _tensor(values[: len(kept)]) for name, values in arrays.items() if name != "tokens"}
        batch["tokens"] = torch.from_numpy(arrays["tokens"][: len(kept)]).long()
        batch |= {"caption": captions, "key": keys, "position": torch.tensor(kept)}
        return {**batch, "skipped": skipped} if skip else batch

    def _values(self, record: dict[str, Any], name: str, index: int) -> np.ndarray:
        member = record.get(f"{name}.npy")
        values = decode_npy(member) if member is not None else None
        if values is None or (values.dtype, values.shape) != self.layout[name]:
            found = "missing" if values is None else f"{values.dtype} {list(values.shape)}"
            dtype, shape = self.layout[name]
            raise UserError(
                f"{self.records.name(index)}: {name}.npy is {found}, not {dtype} {list(shape)} as in the first record: "
                "run data/precompute_latents.py again"
            )
        return values


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


def image_stream(folder: str, images: ImageConfig, seed: int, stream: StreamConfig) -> ImageDataset | Mixed:
    """What a training on images and captions sees: FOLDER/train, and its share of each data set of the mix."""
    members = [ImageDataset(f"{f}/train", images, s, stream) for f, s in _members(folder, seed, stream)]
    return members[0] if len(members) == 1 else Mixed(members, [1.0, *stream.mix.values()], seed)


def latent_stream(folder: str, seed: int, stream: StreamConfig) -> tuple[LatentDataset | Mixed, list[Manifest]]:
    """Likewise for cached latents; with the manifests, which must fit the run."""
    members = [LatentDataset(f"{f}/train", s, stream) for f, s in _members(folder, seed, stream)]
    for name, member in zip(stream.mix, members[1:], strict=True):
        if member.layout != members[0].layout:
            raise UserError(
                f"stream.mix: latents in '{name}' have other arrays ({_described(member.layout)}) than those in "
                f"'{folder}' ({_described(members[0].layout)}): precompute both with the same options"
            )
    mixed = members[0] if len(members) == 1 else Mixed(members, [1.0, *stream.mix.values()], seed)
    return mixed, [member.manifest for member in members]


def _described(layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in layout.items())


def _members(folder: str, seed: int, stream: StreamConfig) -> list[tuple[str, int]]:
    """Folder and seed of each data set: were the seeds equal, equal positions would be cropped alike."""
    return [(name, seed + number * SEED_STRIDE) for number, name in enumerate([folder, *stream.mix])]


def order_of(seed: int, manifest: Manifest, stream: StreamConfig | None) -> Callable[[int], int]:
    """The order of a data set: position in the stream to index in the manifest."""
    sizes = [shard.samples for shard in manifest.shards]
    if stream is not None and 0 < stream.window < len(sizes):
        return WindowedOrder(seed, sizes, stream.window)
    return partial(sample_at, seed, samples=sum(sizes))


def require_some(kept: Sequence[Any], skipped: list[str]) -> None:
    """Refuse a micro-batch of which nothing is left."""
    if not kept:
        raise UserError(f"none of the {len(skipped)} samples of a micro-batch can be read; the first: {skipped[0]}")


def collate(items: Sequence[Batch]) -> Batch:
    """Stack tensors [...] to [B, ...], positions to int64 [B]; everything else becomes a list."""
    batch: Batch = {name: [item[name] for item in items] for name in items[0]}
    if "position" in batch:
        batch["position"] = torch.tensor(batch["position"])
    return {n: torch.stack(v) if isinstance(v, list) and torch.is_tensor(v[0]) else v for n, v in batch.items()}


def _tensor(values: np.ndarray) -> torch.Tensor:
    if values.dtype == np.uint16:  # bits of bfloat16
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _joined(values: list[Any], rows: list[int]) -> Any:
    """Tensors [B_i, ...] or lists end to end, then in the order of `rows`."""
    if torch.is_tensor(values[0]):
        return torch.cat(values)[rows]
    joined = [value for part in values for value in part]
    return [joined[row] for row in rows]


def _only(batch: Batch) -> Batch:
    """The item of a batch of one."""
    return {name: int(v[0]) if name == "position" else v[0] for name, v in batch.items()}
