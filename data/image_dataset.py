"""Images and captions: which sample stands at a position of the stream, and what it holds as tensors.

positions -> sample indices -> records of memory-mapped shards -> tensors. All that is random about a sample is drawn
from (seed, position).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig, StreamConfig
from data.buckets import Shape, nearest_shape
from data.images import EXTENSIONS, Cut, cut_of, in_range, open_image, to_pixels, to_tensor
from data.labels import MAP, Labels, Vocabulary, cut_labels, read_labels
from data.order import FullOrder, Order, WindowedOrder, rng
from data.samples import Captions, caption_of, fields_of, image_of
from data.shards.manifest import Manifest, find_shards
from data.shards.store import RecordStore
from data.shards.tar_index import TEXTS

Batch = dict[str, Any]
REBUILD = "rebuild the shards with data/build_shards.py, which leaves broken samples out"


class ImageDataset:
    """Images and captions. An item: {"image" [3, H, W] float32 in [-1, 1], "caption", "key", "meta", "position"}.

    Of a training's stream it has "pixels", uint8, in place of the image: a quarter of the way to the device.

    With `labels` also "labels", a `data.labels.Labels` of what the image shows, cut and mirrored as it is.
    """

    def __init__(
        self,
        folder: str | Path,
        images: ImageConfig,
        seed: int,
        stream: StreamConfig | None = None,
        labels: bool = False,
        batch: int = 1,
        captions: Captions | None = None,
    ) -> None:
        """Args:
        batch: consecutive positions of the training stream that lanes share, if there are any.
        captions: which an image has; None: those of the stream.
        """
        stream = stream or StreamConfig()
        self.manifest = find_shards(folder, "images", stream)
        self.samples, self.digest = self.manifest.samples, digest_of(self.manifest, stream, batch)
        self.images, self.seed, self.labels = images, seed, labels
        self.vocabulary = Vocabulary.of(self.manifest.provenance.get("labels", {}))
        self.order = order_of(seed, [shard.samples for shard in self.manifest.shards], stream, batch)
        self.skip = stream.skip_broken
        self.captions = captions or Captions.of(stream.captions)
        self.records = RecordStore(folder, self.manifest, [EXTENSIONS, TEXTS], stream)

    def item(self, position: int) -> Batch:
        """The sample at a position of the training stream, with its own crop and flip."""
        return self._item(position, self.order(position))

    def _item(self, position: int, index: int) -> Batch:
        image, facts = self._open(index)
        facts["caption"] = facts.pop("captions")[self.captions.draw(self.seed, position)]
        cut = cut_of(*image.size, self.images.crop, self.images.flip, rng(self.seed, position, "crop"))
        return {**self._cut(image, facts, cut), "position": position}

    def at(self, index: int) -> Batch:
        """Sample `index` of the manifest, centre crop, never mirrored; its position is its index."""
        image, facts = self._open(index)
        facts["caption"] = facts.pop("captions")[0]
        item = self._cut(image, facts, cut_of(*image.size))
        return {"image": in_range(item.pop("pixels")), **item, "position": index}

    def variants(self, index: int, count: int, shapes: Sequence[Shape] = ()) -> Batch:
        """Sample `index` several times, "pixels" [V, 3, H, W] and "cuts" out of an image of "size"; its "captions".

        The first is the centre, the others have a crop and a flip of their own, pure functions of (seed, index). They
        are squares, or have that one of the `shapes` which is nearest to the image's.
        """
        image, facts = self._open(index)
        shape = nearest_shape(*image.size, shapes) if shapes else (self.images.resolution, self.images.resolution)
        aspect = shape[0] / shape[1]
        cuts = [cut_of(*image.size, aspect=aspect)]
        for variant in range(1, count):
            generator = rng(self.seed, index, f"variant {variant}")
            cuts.append(cut_of(*image.size, self.images.crop, self.images.flip, generator, aspect))
        pixels = torch.stack([to_tensor(to_pixels(image, *shape, cut, self.images.filter)) for cut in cuts])
        if self.labels:
            facts["labels"] = [cut_labels(facts["labels"], cut, *shape, image.size) for cut in cuts]
        return {"pixels": pixels, "cuts": cuts, "size": image.size, "index": index, **facts}

    def captions_at(self, index: int) -> list[str]:
        """The captions of sample `index`; no image is decoded."""
        record = self.records[index]
        try:
            return self.captions.read(record)
        except UserError as error:
            raise _broken(self.records, index, error) from None

    def batch(self, positions: Sequence[int]) -> Batch:
        """Collated items; broken ones are left out and named in "skipped" where the stream says so."""
        self.records.prefetch(self.order.upcoming(positions))
        indices = self.order.many(positions)
        self.records.load(indices)
        items, skipped = [], []
        for position, index in zip(positions, indices, strict=True):
            try:
                items.append(self._item(position, index))
            except UserError as error:
                if not self.skip:
                    raise
                skipped.append(str(error))
        require_some(items, skipped)
        return {**self.collate(items), "skipped": skipped} if self.skip else self.collate(items)

    def batch_at(self, indices: Sequence[int]) -> Batch:
        """Collated samples of the manifest."""
        self.records.load(indices)
        return self.collate([self.at(index) for index in indices])

    @staticmethod
    def collate(items: Sequence[Batch]) -> Batch:
        """Stack images and positions; captions, keys and meta become lists."""
        return collate(items)

    def _open(self, index: int) -> tuple[Image.Image, Batch]:
        """The decoded image of a sample, and what else is known of it."""
        record = self.records[index]
        try:
            image, facts = decoded(record, self.images, self.captions)
            labels = {"labels": self._labels(record, facts["meta"], image.size)} if self.labels else {}
        except UserError as error:
            raise _broken(self.records, index, error) from None
        return image, facts | labels

    def _labels(self, record: dict[str, Any], meta: dict[str, Any], size: tuple[int, int]) -> Labels:
        labels = read_labels(meta, bytes(record[MAP]) if MAP in record else None, size)
        if self.manifest.provenance.get("labels"):  # foreign shards do not say what their numbers mean
            self.vocabulary.check(labels.uses())
        return labels

    def _cut(self, image: Image.Image, facts: Batch, cut: Cut) -> Batch:
        """A square of an image as a tensor, with all that is known of it."""
        side = self.images.resolution
        item = {"pixels": to_tensor(to_pixels(image, side, side, cut, self.images.filter)), **facts}
        if self.labels:
            item["labels"] = cut_labels(facts["labels"], cut, side, side, image.size)
        return item


def decoded(record: Mapping[str, Any], images: ImageConfig, captions: Captions) -> tuple[Image.Image, Batch]:
    """The image of a record, and its "captions", "key" and "meta"; raises UserError."""
    image = open_image(image_of(record), images.max_pixels)
    texts, meta = captions.read(record), fields_of(record)
    return image, {"captions": texts, "key": record["__key__"], "meta": meta}


def captions_of(folder: str | Path, samples: int = 0) -> list[str]:
    """Captions of the first `samples` (0: all) of a folder of image shards; no image is decoded."""
    manifest = find_shards(folder, "images")
    records = RecordStore(folder, manifest, [TEXTS], StreamConfig(window=1))  # of remote shards one at a time
    captions = list[str]()
    for index in range(min(samples or manifest.samples, manifest.samples)):
        try:
            captions.append(caption_of(records[index]))
        except UserError as error:
            raise _broken(records, index, error) from None
    return captions


def _broken(records: RecordStore, index: int, error: UserError) -> UserError:
    """What is wrong with a sample, with its name and the remedy."""
    return UserError(f"{records.name(index)}: {error}: {REBUILD}")


def order_of(seed: int, sizes: Sequence[int], stream: StreamConfig, batch: int = 1) -> Order:
    """The order of samples in shards of these sizes; `batch`: positions that lanes take turns in."""
    if stream.lanes > 1:
        return WindowedOrder(seed, sizes, stream.window, stream.lanes, batch)
    if 0 < stream.window < len(sizes):
        return WindowedOrder(seed, sizes, stream.window)
    return FullOrder(seed, sum(sizes))


def digest_of(manifest: Manifest, stream: StreamConfig, batch: int, run: int = 0) -> str:
    """Identity of a data set, and of what decides the order of its samples beside the seed and the window."""
    lanes = f"/{stream.lanes} lanes of {batch}" if stream.lanes > 1 else ""
    order = (f"/{run}" if run else "") + lanes
    return hashlib.sha256((manifest.digest() + order).encode()).hexdigest() if order else manifest.digest()


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
