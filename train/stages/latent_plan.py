"""What a latent cache will cost, measured on one batch before the first byte is written."""

import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from conf.schema import PrecomputeRun
from data.latents import LatentWriter
from train.engine.journal import say
from train.stages.encoding import Encoder
from train.stages.latent_shards import Split, decoded, part_of

PROCESSES = (1, 8, 64)


def plan(cfg: PrecomputeRun, encoder: Encoder, splits: list[Split]) -> None:
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


def cost_per_sample(cfg: PrecomputeRun, encoder: Encoder, split: Split) -> tuple[float, float]:
    """Bytes on disk and seconds of one process, of a second batch: the first one warms up."""
    indices = range(min(split.images.samples, 2 * cfg.batch_size))
    batches = decoded(split.images, indices, cfg, [])
    with tempfile.TemporaryDirectory() as folder, LatentWriter(folder, len(indices), cfg.dtype) as writer:
        for batch in batches:
            began = time.perf_counter()
            encoded = encoder(batch)
            count = len(batch["key"])
            for row, key in enumerate(batch["key"]):
                text = None if encoded.text is None else encoded.text[row]
                moments, meta = encoded.moments[row], batch["meta"][row]
                writer.add(key, moments, encoded.tokens[row], batch["caption"][row], meta, text)
            seconds = (time.perf_counter() - began) / count
        (info,) = writer.close()
    return info.bytes / info.samples, seconds


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
