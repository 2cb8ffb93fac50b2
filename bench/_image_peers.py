"""mosaicml-streaming on the JPEGs of shards, in an environment of its own; see `_peers.Peer`."""

import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

BATCH = 32


def write(source: str, folder: str, *_: str) -> None:
    """The JPEGs of a folder of shards, as they are."""
    with MDSWriter(out=folder, columns={"jpg": "jpeg", "txt": "str"}, size_limit=2**26) as writer:
        for path in sorted(Path(source).glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".jpg"):
                        file = tar.extractfile(member)
                        assert file is not None
                        writer.write({"jpg": file.read(), "txt": "a caption"})


class Images(StreamingDataset):
    """Decoded, scaled and cut out as torchvision does it."""

    def __init__(self, folder: str, side: int) -> None:
        super().__init__(local=folder, shuffle=True, batch_size=BATCH)
        scale = transforms.Resize(side, InterpolationMode.BICUBIC, antialias=True)
        self.prepare = transforms.Compose([scale, transforms.CenterCrop(side), transforms.ToTensor()])

    def __getitem__(self, at: int) -> Any:
        record = super().__getitem__(at)
        return self.prepare(record["jpg"].convert("RGB")), record["txt"]


def main(folder: str, side: str, workers: str) -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    loader: DataLoader[Any] = DataLoader(
        Images(folder, int(side)), BATCH, num_workers=int(workers), persistent_workers=workers != "0"
    )
    for _ in sys.stdin:
        started = time.perf_counter()
        count = sum(len(images) for images, _ in loader)
        print(count, time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        main(*sys.argv[2:])
