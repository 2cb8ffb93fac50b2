"""Loading images for the autoencoder and CLIP: ours against webdataset and mosaicml-streaming, a loader process each.

All decode the same JPEGs, scale them with the bicubic filter and cut out the middle; theirs by Pillow and torchvision,
as their users do. Ours keeps an exact order and resumes at any position; theirs shuffle in a buffer or a block.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from _compare import Comparison, main
from _peers import Peer
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from conf.schema import ImageConfig, ImageFormat, ResizeFilter, StreamConfig
from data.image_dataset import ImageDataset
from data.images import encode_image
from data.loader import batches
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter

IMAGES, SHARD, BATCH, WORKERS = 512, 64, 32, 1
SIDES = {256: (640, 480), 512: (1024, 768)}  # pixels: of the square, and of the stored images


def write_images(folder: Path, size: tuple[int, int]) -> None:
    """JPEGs of smooth noise with some grain, which cost what photographs cost."""
    with ShardWriter(folder, SHARD) as writer:
        for i in range(IMAGES):
            random = np.random.default_rng(i)
            coarse = random.integers(256, size=(20, 24, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
            grain = random.integers(-8, 9, size=smooth.shape)
            image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            jpg = encode_image(image, ImageFormat.jpg, 90)
            writer.add(f"{i:06d}", {"jpg": jpg, "txt": b"a caption"})
    Manifest(kind="images", shards=writer.finished).save(folder)


def ours(folder: Path, side: int) -> Iterator[Any]:
    """Our stream of batches, which never ends."""
    images = ImageConfig(resolution=side, filter=ResizeFilter.bicubic)
    dataset = ImageDataset(folder, images, 0, StreamConfig())
    return batches(dataset, BATCH, BATCH, rank=0, world=1, start=0, workers=WORKERS)


def web_dataset(folder: Path, side: int) -> Iterator[Any]:
    """Theirs, on the same shards."""
    scale = transforms.Resize(side, InterpolationMode.BICUBIC, antialias=True)
    prepare = transforms.Compose([scale, transforms.CenterCrop(side), transforms.ToTensor()])

    def decode(content: bytes) -> torch.Tensor:
        pixels: torch.Tensor = prepare(Image.open(io.BytesIO(content)).convert("RGB"))
        return pixels

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = webdataset.WebDataset(
        urls, shardshuffle=len(urls), workersplitter=webdataset.split_by_worker, empty_check=False
    )
    pipeline = pipeline.shuffle(512).to_tuple("jpg", "txt", "__key__").map_tuple(decode, bytes.decode)
    pipeline = pipeline.batched(BATCH, collation_fn=default_collate).repeat()
    return iter(webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS))


def rate(stream: Iterator[Any]) -> float:
    """Images per second of the stream's next epoch."""
    started = time.perf_counter()
    count = sum(1 for _ in islice(stream, IMAGES // BATCH))
    assert count == IMAGES // BATCH
    return IMAGES / (time.perf_counter() - started)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """At the resolutions of Stable Diffusion's two first trainings."""
    for side, size in SIDES.items():
        shards = folder / f"{side}"
        write_images(shards, size)
        peers: dict[str, Callable[[], float]] = {
            "webdataset": partial(rate, web_dataset(shards, side)),
            "mosaicml-streaming": Peer("_image_peers.py", shards, folder / f"mds{side}", str(side), str(WORKERS)),
        }
        for name, peer in peers.items():
            yield Comparison(
                name=f"images_of_{side}_pixels_against_{name}",
                ours=partial(rate, ours(shards, side)),
                peer=peer,
                unit="images/s",
                bar=1.5,
            )


def run() -> None:
    """Write, then compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(comparisons(Path(folder)))


if __name__ == "__main__":
    run()
