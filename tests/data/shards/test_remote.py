"""Data sets behind HTTP and S3: the same stream as from the disk, in a bounded cache, and no server can hang us."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import CacheDtype, StreamConfig
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.loader import batches
from data.shards import cache as shard_cache
from data.shards import remote
from data.shards.manifest import Manifest
from data.shards.remote import RemoteError, fetch, listed, read_remote

REPOSITORY = Path(__file__).resolve().parents[3]
SHARDS, SHARD = 8, 5
SAMPLES = SHARDS * SHARD


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


def write(folder: Path) -> Manifest:
    with LatentWriter(folder, SHARD, CacheDtype.fp16) as writer:
        for i in range(SAMPLES):
            writer.add(f"{i:04d}", np.full((1, 8, 4, 4), i, np.float32), np.arange(3), "noise", {})
    manifest = Manifest(kind="latents", shards=writer.close())
    manifest.save(folder)
    return manifest


def stream_of(folder: str | Path, count: int, workers: int = 0, **stream: Any) -> list[Any]:
    dataset = LatentDataset(folder, 0, StreamConfig(**stream))
    return list(itertools.islice(batches(dataset, 8, 8, 0, 1, 0, workers), count))


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*.tar"))


def bytes_of(paths: list[Path]) -> int:
    """Together; one may have been thrown out since it was listed."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_the_stream_over_http_is_that_of_the_disk(http: Any, tmp_path: Path, window: int, workers: int) -> None:
    write(tmp_path / "served" / "train")
    url, cache = f"{http.url}/train", str(tmp_path / "cache")
    ours = stream_of(url, 10, workers, window=window, cache_dir=cache)
    for batch, expected in zip(ours, stream_of(tmp_path / "served" / "train", 10, window=window), strict=True):
        assert batch["key"] == expected["key"] and torch.equal(batch["moments"], expected["moments"])
    assert len(cached(tmp_path)) == SHARDS
    assert all(http.requests[f"{i:05d}.tar"] == 1 for i in range(SHARDS)), "each shard is fetched once"
    stream_of(url, 10, window=window, cache_dir=cache)
    assert all(http.requests[f"{i:05d}.tar"] == 1 for i in range(SHARDS)), "and a second run finds it there"


def test_the_cache_stays_within_its_bound_and_the_epochs_stay_whole(http: Any, tmp_path: Path) -> None:
    size = write(tmp_path / "served" / "train").shards[0].bytes
    limit = {"window": 1, "cache_dir": str(tmp_path / "cache"), "cache_gb": 3.5 * size / 1e9}
    dataset = LatentDataset(f"{http.url}/train", 0, StreamConfig(**limit))
    keys = list[str]()
    for batch in itertools.islice(batches(dataset, 8, 8, 0, 1, 0, 0), 3 * SAMPLES // 8):
        keys += batch["key"]
        assert bytes_of(cached(tmp_path)) <= 4 * size  # one may be on its way
    for epoch in range(3):
        assert len(set(keys[epoch * SAMPLES : (epoch + 1) * SAMPLES])) == SAMPLES


def test_the_next_window_is_fetched_ahead(http: Any, tmp_path: Path) -> None:
    write(tmp_path / "served" / "train")
    stream = StreamConfig(window=2, cache_dir=str(tmp_path / "cache"))
    dataset = LatentDataset(f"{http.url}/train", 0, stream)
    dataset.batch([0])
    deadline = time.monotonic() + 20
    while len(cached(tmp_path)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cache_that_would_fetch_again_and_again_is_refused_with_the_window_to_set(http: Any, tmp_path: Path) -> None:
    size = write(tmp_path / "served" / "train").shards[0].bytes
    limit = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 4.5 * size / 1e9}
    for window in (0, 3):
        with pytest.raises(UserError, match=r"stream\.cache_gb=.* set stream\.window=2 \(shards\)"):
            stream_of(f"{http.url}/train", 1, window=window, **limit)


def rest_of(batch: Any, lost: int) -> bool:
    return len(batch["key"]) == 8 - len(batch["skipped"]) and all(f"{lost:05d}.tar" in s for s in batch["skipped"])


REASONS = {
    "500": "500 Internal Server Error",
    "stall": r"silent or stuck for 0\.5 s \(timeout_s\)",
    "drip": r"silent or stuck for 0\.5 s \(timeout_s\)",
    "cut": ".",
    "damaged": r"not the one that its manifest describes \(size or sha256\)",
    "missing": "not found",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_shard_that_cannot_be_had_is_named_or_skipped_and_nothing_hangs(
    http: Any, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "served" / "train"
    write(folder)
    if fault == "missing":
        (folder / "00003.tar").unlink()
    elif fault == "damaged":
        content = bytearray((folder / "00003.tar").read_bytes())
        content[800] ^= 1
        (folder / "00003.tar").write_bytes(content)
    http.faults["00003.tar"] = fault
    stream = {"cache_dir": str(tmp_path / "cache"), "timeout_s": 0.5}
    with pytest.raises(RemoteError, match=rf"00003\.tar.*{REASONS[fault]}"):
        stream_of(f"{http.url}/train", 5, **stream)
    found = stream_of(f"{http.url}/train", 5, skip_broken=True, **stream)
    assert all(rest_of(batch, 3) for batch in found)
    keys = {key for batch in found for key in batch["key"]}
    assert keys == {f"{i:04d}" for i in range(SAMPLES) if i // SHARD != 3}
    assert len(cached(tmp_path)) == SHARDS - 1 and not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_server_that_fails_once_is_asked_again(http: Any, tmp_path: Path) -> None:
    (tmp_path / "served" / "file").write_bytes(b"content")
    http.faults["file"] = "500 once"
    fetch(f"{http.url}/file", tmp_path / "target", 5.0)
    assert (tmp_path / "target").read_bytes() == b"content" and http.requests["file"] == 2
    assert read_remote(f"{http.url}/file") == b"content"
    with pytest.raises(FileNotFoundError):
        read_remote(f"{http.url}/nothing")


def test_a_cache_disk_that_fills_gives_back_what_it_holds_and_then_says_which_option(
    http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "served" / "train")
    original, room = shard_cache.fetch, [1]

    def full(url: str, target: Path, timeout_s: float) -> None:
        original(url, target, timeout_s)
        if len(cached(tmp_path)) >= room[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_cache, "fetch", full)
    stream = {"cache_dir": str(tmp_path / "cache")}
    keys = [key for batch in stream_of(f"{http.url}/train", 5, **stream) for key in batch["key"]]
    assert len(set(keys)) == SAMPLES and len(cached(tmp_path)) == 1
    room[0] = 0
    with pytest.raises(UserError, match=r"No space left on device\): set stream\.cache_dir .* stream\.cache_gb"):
        stream_of(f"{http.url}/train", 5, **stream)


DOWNLOADER = """
import sys
from conf.schema import StreamConfig
from data.latent_dataset import LatentDataset
dataset = LatentDataset(sys.argv[1], 0, StreamConfig(cache_dir=sys.argv[2]))
print(len(dataset.batch(range(40))["key"]))
"""


def test_processes_share_the_cache_and_a_killed_one_leaves_nothing_that_blocks(http: Any, tmp_path: Path) -> None:
    write(tmp_path / "served" / "train")
    command = [sys.executable, "-c", DOWNLOADER, f"{http.url}/train", str(tmp_path / "cache")]
    http.faults["00002.tar"] = "stall"
    killed = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not http.requests["00002.tar"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    http.faults.clear()
    others = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [other.communicate(timeout=60)[0].strip() for other in others] == ["40", "40"]
    assert all(http.requests[f"{i:05d}.tar"] <= 1 + (i == 2) for i in range(SHARDS))


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[[str], Any]]:
    """Makes a bucket on an S3 server and gives its file system."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    given = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    given["AWS_DEFAULT_REGION"] = "us-east-1"
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)

    def bucket(name: str) -> Any:
        import s3fs

        files = s3fs.S3FileSystem(endpoint_url=given["AWS_ENDPOINT_URL"])
        files.mkdir(name)
        return files

    yield bucket
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_the_stream_from_s3_is_that_of_the_disk(s3: Callable[[str], Any], tmp_path: Path) -> None:
    write(tmp_path / "train")
    s3("lab").put(str(tmp_path / "train") + "/", "lab/set/train/", recursive=True)
    assert listed("s3://lab/set/train") == [f"s3://lab/set/train/{i:05d}.tar" for i in range(SHARDS)]
    ours = stream_of("s3://lab/set/train", 5, cache_dir=str(tmp_path / "cache"))
    for batch, expected in zip(ours, stream_of(tmp_path / "train", 5), strict=True):
        assert batch["key"] == expected["key"] and torch.equal(batch["moments"], expected["moments"])
    with pytest.raises(UserError, match=r"no manifest\.json at 's3://lab/elsewhere'"):
        stream_of("s3://lab/elsewhere", 1)


def test_a_protocol_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"http:// cannot be read .*: pip install 'latentline\[remote\]'"):
        read_remote("http://127.0.0.1:9/nothing")
