"""One image shard to one latent shard: decoding, encoding and writing side by side."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import PrecomputeRun
from data.datasets import Batch, ImageDataset, collate
from data.latents import ChannelStats, LatentWriter
from data.manifest import Manifest
from train.stages.encoding import Encoded, Encoder

PARTS = ".parts"
AHEAD = 2  # batches that are decoded before the encoder asks for them


@dataclass(slots=True)
class Split:
    """One side of the data set: its images, where its latents go, and their provenance."""

    name: str
    images: ImageDataset
    folder: Path
    provenance: dict[str, Any]
    finished: Manifest | None  # of an earlier run with this provenance

    @property
    def shards(self) -> int:
        """Image shards, and so latent shards."""
        return len(self.images.manifest.shards)

    def samples_of(self, index: int) -> range:
        """The samples of an image shard."""
        ends = [0, *accumulate(shard.samples for shard in self.images.manifest.shards)]
        return range(ends[index], ends[index + 1])


def part_of(split: Split, index: int) -> dict[str, Any] | None:
    """What was recorded of a shard that is complete and of this provenance."""
    try:
        part: dict[str, Any] = json.loads((split.folder / PARTS / f"{index:05d}.json").read_text())
        whole = part["shard"] is None or (
            (split.folder / part["shard"]["name"]).stat().st_size == part["shard"]["bytes"]
        )
    except FileNotFoundError:
        return None
    return part if whole and part["provenance"] == split.provenance else None


def encode_shard(cfg: PrecomputeRun, encoder: Encoder, split: Split, index: int) -> dict[str, Any]:
    """Encode one shard; decoding, encoding and writing overlap. Returns what the manifest will need of it."""
    samples, stats = split.samples_of(index), ChannelStats(split.provenance["latent_channels"])
    rejects: list[dict[str, str]] = []
    encoder.forget()

    def write(batch: Batch, encoded: Encoded) -> None:
        for row, key in enumerate(batch["key"]):
            if not encoded.sound(row):
                rejects.append({"key": key, "reason": "the encoder's output is not finite, in fp32 neither"})
                continue
            stats.add(encoded.moments[row])
            text = None if encoded.text is None else encoded.text[row]
            cuts = [asdict(cut) for cut in batch["cuts"][row]]
            meta = batch["meta"][row] | ({"cuts": cuts} if cfg.variants > 1 else {})
            writer.add(key, encoded.moments[row], encoded.tokens[row], batch["caption"][row], meta, text)

    with LatentWriter(split.folder, len(samples), cfg.dtype, index) as writer, ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        for batch in decoded(split.images, samples, cfg, rejects):
            encoded = encoder(batch)
            if written is not None:
                written.result()
            written = background.submit(write, batch, encoded)
        if written is not None:
            written.result()
    return {
        "shard": next((asdict(info) for info in writer.close()), None),  # None: every sample was rejected
        "provenance": split.provenance,
        "stats": stats.state(),
        "rejects": rejects,
    }


def decoded(
    images: ImageDataset, samples: Sequence[int], cfg: PrecomputeRun, rejects: list[dict[str, str]]
) -> Iterator[Batch]:
    """Batches of samples in order, decoded by threads ahead of time; broken ones go to `rejects`."""

    def load(index: int) -> Batch:
        try:
            return images.variants(index, cfg.variants)
        except UserError as error:
            return {"key": images.records[index]["__key__"], "reason": str(error)}

    starts = list(range(0, len(samples), cfg.batch_size))
    pending: list[list[Future[Batch]]] = []
    with ThreadPoolExecutor(cfg.threads) as pool:
        for start in [*starts, *[len(samples)] * AHEAD]:
            pending.append([pool.submit(load, index) for index in samples[start : start + cfg.batch_size]])
            if len(pending) <= AHEAD:
                continue
            loaded = [future.result() for future in pending.pop(0)]
            rejects += [item for item in loaded if "reason" in item]
            if items := [item for item in loaded if "reason" not in item]:
                yield collate(items)
