"""Other loaders of the same latents, in an environment of their own; see `_peers.Peer`.

An epoch: batches of float32 moments and int64 tokens in a shuffled order, in one process with one thread.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

BATCH = 64


def write(source: str, folder: str, library: str) -> None:
    """The records of an .npz file in the library's own format."""
    arrays = np.load(source)
    records = [{"moments": m, "tokens": t} for m, t in zip(arrays["moments"], arrays["tokens"], strict=True)]
    if library == "mosaicml-streaming":
        from streaming import MDSWriter

        shapes = {name: ",".join(map(str, records[0][name].shape)) for name in records[0]}
        columns = {"moments": f"ndarray:float16:{shapes['moments']}", "tokens": f"ndarray:int32:{shapes['tokens']}"}
        with MDSWriter(out=folder, columns=columns, size_limit=2**26) as writer:
            for record in records:
                writer.write(record)
    else:
        from litdata.streaming.writer import BinaryWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(folder, chunk_bytes=2**26)
        for index, record in enumerate(records):
            writer.add_item(index, record)
        writer.done()
        writer.merge()


def batches(folder: str, library: str) -> Iterable[dict[str, torch.Tensor]]:
    """An epoch of the library's own loader."""
    if library == "mosaicml-streaming":
        from streaming import StreamingDataset
        from torch.utils.data import DataLoader

        data = StreamingDataset(local=folder, shuffle=True, batch_size=BATCH)
        return DataLoader(data, batch_size=BATCH, num_workers=0)
    from litdata import StreamingDataLoader
    from litdata import StreamingDataset as LitDataset

    return StreamingDataLoader(LitDataset(folder, shuffle=True), batch_size=BATCH, num_workers=0)


def main(folder: str, library: str) -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    loader = batches(folder, library)
    for _ in sys.stdin:
        started = time.perf_counter()
        count = sum(len(convert(batch)) for batch in loader)
        print(count, time.perf_counter() - started, flush=True)


def convert(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a training wants."""
    batch["tokens"].long()
    return batch["moments"].float()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        main(*sys.argv[2:])
