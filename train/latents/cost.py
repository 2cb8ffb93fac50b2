"""What a latent cache will cost, measured on one batch before the first byte is written."""

import shutil
import tempfile
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path

from conf.schema import PrecomputeRun
from train.engine.metric_log import say
from train.latents.encoder import LatentEncoder
from train.latents.shard import LatentSplit, LatentWriters, decoded_batches, known_batches, part_of

PROCESSES = (1, 8, 64)


def print_plan(cfg: PrecomputeRun, encoder: LatentEncoder, splits: list[LatentSplit]) -> None:
    """Say samples, storage and time of what is not encoded yet."""
    missing = [
        (split, index)
        for split in splits
        if split.finished is None
        for index in range(split.shards)
        if part_of(split, index) is None
    ]
    samples = sum(len(split.samples_of(index)) for split, index in missing)
    if not samples:
        say("latents", f"{cfg.output_dir}: everything is encoded")
        return
    record_bytes, seconds = cost_per_sample(cfg, encoder, splits[0])
    free = shutil.disk_usage(_existing(Path(cfg.output_dir))).free
    say("latents", f"{samples:,} samples in {len(missing):,} shards to encode")
    say("latents", f"{samples * record_bytes / 1e9:,.2f} GB to write, {free / 1e9:,.2f} GB free at {cfg.output_dir}")
    for processes in PROCESSES:
        took = timedelta(seconds=round(samples * seconds / processes))
        say("latents", f"{took} on {processes} process{'es' if processes > 1 else ''} like this one")


def cost_per_sample(cfg: PrecomputeRun, encoder: LatentEncoder, split: LatentSplit) -> tuple[float, float]:
    """Bytes on disk and seconds of one process, without the first batch: that one warms up."""
    indices = range(min(split.images.samples, 2 * cfg.batch_size))
    known = islice(known_batches(split, 0, cfg, []), 2) if split.known is not None else None
    samples, seconds = list[int](), list[float]()
    with tempfile.TemporaryDirectory() as folder, LatentWriters(cfg, Path(folder), 0, len(indices)) as write:
        for batch in known or decoded_batches(split.images, indices, cfg, []):
            began = time.perf_counter()
            encoded = encoder(batch)
            for row in range(len(batch["key"])):
                write(encoded, row, batch)
            samples.append(len(batch["key"]))
            seconds.append(time.perf_counter() - began)
        size = sum(info.bytes for info in write.close())
    warm = slice(1 if len(samples) > 1 else 0, None)
    return size / sum(samples), sum(seconds[warm]) / sum(samples[warm])


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
