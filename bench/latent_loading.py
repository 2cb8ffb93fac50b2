"""Loading cached latents in one process, with one thread: webdataset, mosaicml-streaming, litdata, os.read and ours."""

import io
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from _compare import Comparison, main
from _peers import PEERS, Peer

from conf.schema import CacheDtype
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.loader import batches
from data.order import FullOrder
from data.shards.manifest import Manifest

RECORDS, SHARD, BATCH = 2048, 256, 64
SHAPE, LENGTH = (1, 8, 64, 64), 77  # moments of a 512-pixel image at f8, tokens of CLIP


def write_records(folder: Path) -> None:
    """Equal records as our shards and, for the peers, as arrays."""
    random = np.random.default_rng(0)
    moments = random.standard_normal((RECORDS, *SHAPE), dtype=np.float32).astype(np.float16)
    tokens = random.integers(49408, size=(RECORDS, LENGTH), dtype=np.int32)
    with LatentWriter(folder / "shards", SHARD, CacheDtype.fp16) as writer:
        for i in range(RECORDS):
            writer.add(f"{i:09d}", moments[i].astype(np.float32), tokens[i], "a caption", {})
    Manifest(kind="latents", shards=writer.close()).save(folder / "shards")
    np.savez(folder / "records.npz", moments=moments, tokens=tokens)


def ours(folder: Path, cast: bool = True) -> Callable[[], float]:
    """Our loader; its moments are in the cache's dtype, `cast` like those of the peers or left as they are."""
    stream = batches(LatentDataset(folder / "shards", seed=0), BATCH, BATCH, 0, 1, 0, workers=0)

    def epoch() -> float:
        started = time.perf_counter()
        for _ in range(RECORDS // BATCH):
            batch = next(stream)
            if cast:
                batch["moments"].float()
        return RECORDS / (time.perf_counter() - started)

    return epoch


def web_dataset(folder: Path) -> Callable[[], float]:
    """Plain webdataset on the same shards."""
    urls = sorted(str(path) for path in (folder / "shards").glob("*.tar"))

    def load(content: bytes) -> np.ndarray:
        return np.load(io.BytesIO(content), allow_pickle=False)

    def epoch() -> float:
        pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(512)
        pipeline = pipeline.to_tuple("moments.npy", "tokens.npy").map_tuple(load, load).batched(BATCH)
        started, count = time.perf_counter(), 0
        for moments, tokens in pipeline:
            torch.from_numpy(moments).float(), torch.from_numpy(tokens).long()
            count += len(moments)
        assert count == RECORDS
        return count / (time.perf_counter() - started)

    return epoch


def plain_reads(folder: Path) -> Callable[[], float]:
    """The limit: the same bytes in the same order, from the page cache into memory, one record at a time."""
    places = []
    for path in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        firsts = [member.offset for member in members if member.name.endswith(".moments.npy")]
        ends = [*firsts[1:], path.stat().st_size]
        places += [(path, first, end - first) for first, end in zip(firsts, ends, strict=True)]
    order = [places[index] for index in FullOrder(0, RECORDS).many(range(RECORDS))]

    def epoch() -> float:
        files = {path: os.open(path, os.O_RDONLY) for path, _, _ in places}
        started = time.perf_counter()
        for path, offset, size in order:
            os.pread(files[path], size, offset)
        seconds = time.perf_counter() - started
        for file in files.values():
            os.close(file)
        return RECORDS / seconds

    return epoch


def growth(folder: Path) -> float:
    """Memory after three epochs relative to that after one."""
    epoch = ours(folder)
    epoch()
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    epoch(), epoch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / first


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Ours against each."""
    yield Comparison(
        name="memory_of_three_epochs_against_one",
        ours=lambda: growth(folder),
        peer=lambda: 1.0,
        unit="of the peak",
        bar=1.02,
        lower_is_better=True,
        pairs=1,
    )
    fast = ours(folder)
    rates: dict[str, Callable[[], float]] = {"webdataset": web_dataset(folder)}
    rates |= {library: Peer("_latent_peers.py", folder / "records.npz", folder / library, library) for library in PEERS}
    for name, peer in rates.items():
        yield Comparison(name=f"latents_against_{name}", ours=fast, peer=peer, unit="samples/s", bar=3.0)
    bare = ours(folder, cast=False)
    yield Comparison(name="latents_against_os_read", ours=bare, peer=plain_reads(folder), unit="samples/s", bar=0.5)


def run() -> Any:
    """Write, then compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder))
        main(comparisons(Path(folder)))


if __name__ == "__main__":
    run()
