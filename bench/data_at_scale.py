"""Data that does not fit anywhere: memory and start of a billion samples, and what each machine fetches of a server.

The billion is one shard of 10,000 records under 100,000 names. The server answers after 20 ms and sends 40 MB/s on each
connection, as an object store does, and counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from _compare import Comparison, main

from conf.schema import CacheDtype, StreamConfig
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.loader import batches
from data.shards.cache import ShardCache
from data.shards.manifest import Manifest
from data.shards.shard import ShardInfo, ShardReader
from data.shards.tar_index import find_index

BILLION, SHARD = 100_000, 10_000  # shards, and samples of each
DELAY_S, RATE = 0.02, 40e6  # of the server: before an answer, and bytes/s of a connection
LANES, BATCH = 8, 64
READER = """
import json, os, sys, time, warnings
from itertools import islice
import torch
from conf.schema import StreamConfig
from data.latent_dataset import LatentDataset
from data.loader import batches
folder, workers, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
warnings.filterwarnings("ignore")  # of more loaders than this machine has cores
began = time.monotonic()
dataset = LatentDataset(folder, 0, StreamConfig(window=64, lanes=64), batch=256)
ready = time.monotonic() - began
stream = batches(dataset, 256, 32, 0, 8, dataset.samples // 256 * 256 // 3 // 256 * 256, workers)
next(stream)
first = time.monotonic() - began
for batch in islice(stream, count):
    pass
print(json.dumps([ready, first]), flush=True)
sys.stdin.readline()
os.killpg(0, 9)
"""


def write_billion(folder: Path) -> tuple[dict[str, Path], str]:
    """Two folders of shards, with a billion samples and with a million; and the digest of all shards."""
    with LatentWriter(folder / "one", SHARD, CacheDtype.fp16) as writer:
        for i in range(SHARD):
            writer.add(f"{i:09d}", np.zeros((1, 8, 4, 4), np.float32), np.arange(77), "a caption", {"width": 64})
    (info,) = writer.close()
    sizes = {"1e9": BILLION, "1e6": BILLION // 1000}
    for name, shards in sizes.items():
        (folder / name).mkdir()
        for number in range(shards):
            for suffix in (".tar", ".idx"):
                os.symlink(folder / "one" / f"00000{suffix}", folder / name / f"{number:05d}{suffix}")
        infos = [
            ShardInfo(name=f"{n:05d}.tar", samples=SHARD, bytes=info.bytes, sha256=info.sha256, index=info.index)
            for n in range(shards)
        ]
        Manifest(kind="latents", shards=infos).save(folder / name)
    return {name: folder / name for name in sizes}, info.sha256


def memory_of(process: int) -> int:
    """Bytes of a process and of its children that are theirs alone: shared pages count in part, files not."""
    total = 0
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            total += int(line.split()[1]) * 1024
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return total + sum(memory_of(int(child)) for child in children)


def read(folder: Path, processes: int, workers: int, count: int = 20) -> tuple[float, float, float]:
    """Seconds until a training could begin, and until its first batch from within the stream; bytes of all processes.

    The slowest process counts.
    """
    command = [sys.executable, "-c", READER, str(folder), str(workers), str(count)]
    there = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(processes)
    ]
    told = [json.loads(process.stdout.readline()) for process in there if process.stdout]
    size = sum(memory_of(process.pid) for process in there)
    for process in there:
        process.communicate("end\n")
    ready, first = (max(column) for column in zip(*told, strict=True))
    return ready, first, float(size)


def waited(folder: Path, place: int) -> float:
    """Seconds of one process: 0 for its start, 1 for its first batch."""
    return read(folder, 1, 0, 0)[place]


def index_bytes(folder: Path, load: Callable[[Path], Any]) -> float:
    """Bytes of a process's own memory per sample, of the indices of 20 shards."""

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before = own()
    kept = [load(folder / f"{number:05d}.tar") for number in range(20)]
    return (own() - before) / (SHARD * len(kept))


class Handler(BaseHTTPRequestHandler):
    """An object store: every connection is as slow as any other, and bytes are counted."""

    protocol_version = "HTTP/1.1"
    folder: Path
    sent: ClassVar[Counter[str]] = Counter()  # by the first part of the path

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle(self) -> None:
        """Answer; who goes away in between is no fault."""
        with suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        """A whole file, at the pace of the connection."""
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self.send_error(404)
            return
        time.sleep(DELAY_S)
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        began, part = time.monotonic(), 1 << 20
        for start in range(0, len(content), part):
            self.wfile.write(content[start : start + part])
            time.sleep(max(0.0, began + min(start + part, len(content)) / RATE - time.monotonic()))
        if path.suffix == ".tar":
            Handler.sent[self.path.split("/")[1]] += len(content)


def served(folder: Path) -> str:
    """Start the server, and give its address."""
    Handler.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def write_shards(folder: Path, shards: int, samples: int, side: int) -> Manifest:
    """Latents to be served."""
    with LatentWriter(folder, samples, CacheDtype.fp16) as writer:
        for i in range(shards * samples):
            writer.add(f"{i:09d}", np.zeros((1, 8, side, side), np.float32), np.arange(77), "a caption", {})
    manifest = Manifest(kind="latents", shards=writer.close())
    manifest.save(folder)
    return manifest


def most_read(url: str, manifest: Manifest, scratch: Path, nodes: int) -> float:
    """Bytes that the machines fetch in an epoch, the one with the most, relative to an equal share."""
    Handler.sent.clear()
    read = []
    for node in range(nodes):
        # What is fetched ahead goes on for a moment in the folder that is removed, and is not counted.
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as cache:
            stream = StreamConfig(window=2, lanes=LANES, cache_dir=cache)
            dataset = LatentDataset(f"{url}/{node}", 0, stream, batch=BATCH)
            steps = manifest.samples // BATCH
            for _ in islice(batches(dataset, BATCH, BATCH // nodes, node, nodes, 0, 0), steps):
                pass
            read.append(Handler.sent[str(node)])
    return max(read) * nodes / manifest.bytes


def throughput(url: str, manifest: Manifest, scratch: Path, transfers: int) -> float:
    """Bytes per second that a machine fetches ahead."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        cache = ShardCache(f"{url}/x", StreamConfig(cache_dir=folder, transfers=transfers))
        began = time.monotonic()
        while len(list(cache.folder.glob("*.tar"))) < len(manifest.shards):
            cache.prefetch(manifest.shards)
            time.sleep(0.01)
        return manifest.bytes / (time.monotonic() - began)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Memory and start first, then machines and transfers."""
    there, digest = write_billion(folder)
    yield Comparison(
        name="memory_of_indices_per_sample_against_walked_headers",
        ours=partial(index_bytes, there["1e6"], lambda path: find_index(path, digest, None)),
        peer=partial(index_bytes, there["1e6"], lambda path: ShardReader(path).index),
        unit="bytes",
        bar=0.02,
        lower_is_better=True,
        pairs=1,
    )
    for name, place, bar in (("start", 0, 5.0), ("first_batch_after_a_resume", 1, 6.0)):
        yield Comparison(
            name=f"{name}_of_1e9_samples_against_{bar:g}_s",
            ours=partial(waited, there["1e9"], place),
            peer=partial(float, bar),
            unit="s",
            bar=1.0,
            lower_is_better=True,
            pairs=3,
        )
    yield Comparison(
        name="memory_of_1e9_samples_against_1e6_in_8_processes_with_5_loaders",
        ours=lambda: read(there["1e9"], 8, 5)[2] / 1e6,
        peer=lambda: read(there["1e6"], 8, 5)[2] / 1e6,
        unit="MB",
        bar=1.25,
        lower_is_better=True,
        pairs=1,
    )
    manifest = write_shards(folder / "lanes", 512, 16, 4)
    url = served(folder / "lanes")
    for nodes in (2, 4, 8):
        yield Comparison(
            name=f"bytes_of_one_of_{nodes}_machines_against_its_share",
            ours=partial(most_read, url, manifest, folder, nodes),
            peer=lambda: 1.0,
            unit="of samples / machines",
            bar=1.1,
            lower_is_better=True,
            pairs=1,
        )
    manifest = write_shards(folder / "transfers", 48, 64, 64)
    url = served(folder / "transfers")
    for transfers in (4, 16):
        yield Comparison(
            name=f"{transfers}_transfers_against_1",
            ours=partial(throughput, url, manifest, folder, transfers),
            peer=partial(throughput, url, manifest, folder, 1),
            unit="bytes/s",
            bar=0.5 * transfers,
            pairs=1,
        )


def run() -> None:
    """Write, then compare."""
    with tempfile.TemporaryDirectory() as folder:
        main(comparisons(Path(folder)))


if __name__ == "__main__":
    run()
