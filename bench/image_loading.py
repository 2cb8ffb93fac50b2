"""Loading images for the autoencoder: ours against plain webdataset with the same decoder and loader processes.

Ours keeps an exact order and resumes at any position; webdataset shuffles in a buffer and does neither.
"""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from _compare import Comparison, main
from PIL import Image
from torch.utils.data import default_collate

from conf.schema import ImageConfig, ImageFormat, StreamConfig
from data.image_dataset import ImageDataset
from data.images import cut_of, encode_image, open_image, to_pixels, to_tensor
from data.loader import batches
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter

IMAGES, SHARD, BATCH = 1024, 128, 32
SIDE, STORED = 256, (384, 320)  # pixels: of the crop, and of the stored images


def write_images(folder: Path) -> None:
    """JPEGs of smooth noise with some grain, which cost what photographs cost."""
    with ShardWriter(folder, SHARD) as writer:
        for i in range(IMAGES):
            random = np.random.default_rng(i)
            coarse = random.integers(256, size=(20, 24, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(STORED, Image.Resampling.BICUBIC))
            grain = random.integers(-8, 9, size=smooth.shape)
            image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            jpg = encode_image(image, ImageFormat.jpg, 90)
            writer.add(f"{i:06d}", {"jpg": jpg, "txt": b"a caption"})
    Manifest(kind="images", shards=writer.finished).save(folder)


def decode(content: bytes) -> torch.Tensor:
    """Our decoder, for both."""
    image = open_image(content, ImageConfig().max_pixels)
    return to_tensor(to_pixels(image, SIDE, SIDE, cut_of(*image.size)))


def ours(folder: Path, workers: int) -> Iterator[Any]:
    """Our stream of batches, which never ends."""
    dataset = ImageDataset(folder, ImageConfig(resolution=SIDE), 0, StreamConfig())
    return batches(dataset, BATCH, BATCH, rank=0, world=1, start=0, workers=workers)


def web_dataset(folder: Path, workers: int) -> Iterator[Any]:
    """Theirs, on the same shards."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = webdataset.WebDataset(
        urls, shardshuffle=len(urls), workersplitter=webdataset.split_by_worker, empty_check=False
    )
    pipeline = pipeline.shuffle(512).to_tuple("jpg", "txt", "__key__").map_tuple(decode, bytes.decode)
    pipeline = pipeline.batched(BATCH, collation_fn=default_collate).repeat()
    return iter(webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers))


def rate(stream: Iterator[Any]) -> float:
    """Images per second of the stream's next epoch."""
    started = time.perf_counter()
    count = sum(1 for _ in islice(stream, IMAGES // BATCH))
    assert count == IMAGES // BATCH
    return IMAGES / (time.perf_counter() - started)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """In the training process, and in a loader process beside it."""
    for workers in (0, 1):
        yield Comparison(
            name=f"images_with_{workers}_loader_processes",
            ours=partial(rate, ours(folder, workers)),
            peer=partial(rate, web_dataset(folder, workers)),
            unit="images/s",
            bar=1.0,
        )


def run() -> None:
    """Write, then compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        main(comparisons(Path(folder)))


if __name__ == "__main__":
    run()
