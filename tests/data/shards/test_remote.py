"""Data sets behind HTTP and S3: the same stream as from the disk, in a bounded cache, and no server can hang us."""

import itertools
import os
import subprocess
import sys
import threading
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
from data.shards import remote, store
from data.shards.cache import ShardCache
from data.shards.manifest import Manifest
from data.shards.remote import RemoteError, fetch, listed, read_remote
from data.shards.shard import ShardInfo
from data.streams import latent_stream

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
        assert len(dataset.records.readers) <= 4  # what has made room is not kept by a map
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
    with pytest.raises(UserError, match=r"cache_gb=.* set stream\.window=2 \(shards\), or stream\.window=0 to fetch"):
        stream_of(f"{http.url}/train", 1, window=3, **limit)
    for window in (0, 3):  # nobody can fetch single samples and know that they are right
        with pytest.raises(UserError, match=r"stream\.cache_gb=.* set stream\.window=2 \(shards\), or more"):
            stream_of(f"{http.url}/train", 1, window=window, verify=True, **limit)
    with pytest.raises(UserError, match=r"set stream\.window=1 \(shards\)"):  # of each of two lanes
        stream_of(f"{http.url}/train", 1, window=2, lanes=2, **limit)


def test_what_a_process_opens_makes_room_for_no_other_one(
    http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its name and its map, another process asks for all the room that there is."""
    write(tmp_path / "served" / "train")
    stream = StreamConfig(cache_dir=str(tmp_path / "cache"))
    original = store.size_of

    def beside_another(path: Path) -> int:
        other = ShardCache(f"{http.url}/another", stream)
        other.folder.mkdir(exist_ok=True)
        other._reserve(other.folder / f"{'0' * 16}-00000.tar", other.limit)
        return original(path)

    monkeypatch.setattr(store, "size_of", beside_another)
    keys = [key for batch in stream_of(f"{http.url}/train", 5, cache_dir=stream.cache_dir) for key in batch["key"]]
    assert len(set(keys)) == SAMPLES and len(cached(tmp_path)) == 1


def test_nothing_but_our_own_makes_room(http: Any, tmp_path: Path) -> None:
    size = write(tmp_path / "served" / "train").shards[0].bytes
    own = [tmp_path / "cache" / name for name in ("mine/a.tar", "mine/a.idx", f"{'a' * 16}/a.tar", "b.tar")]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    stream_of(f"{http.url}/train", 10, window=1, cache_dir=str(tmp_path / "cache"), cache_gb=3.5 * size / 1e9)
    assert all(path.exists() for path in own)


def test_what_all_buckets_and_all_data_sets_of_a_mix_read_at_a_time_must_fit(http: Any, tmp_path: Path) -> None:
    shards = [
        ShardInfo(name=f"{i:05d}-{shape}.tar", samples=1, bytes=10) for shape in ("64x64", "96x32") for i in range(9)
    ]
    manifest = Manifest(kind="latents", shards=shards)
    assert [store.read_at_a_time(manifest, StreamConfig(window=window)) for window in (1, 3, 0)] == [40, 120, 180]
    size = write(tmp_path / "served" / "train").shards[0].bytes
    write(tmp_path / "served" / "second" / "train")
    mix = {f"{http.url}/second": 1.0}
    limit = {"cache_dir": str(tmp_path / "cache"), "window": 2, "mix": mix}
    latent_stream(http.url, 0, StreamConfig(cache_gb=8.5 * size / 1e9, **limit), 8)
    with pytest.raises(UserError, match=r"stream\.cache_gb=.* of the data sets of stream\.mix are read at a time"):
        latent_stream(http.url, 0, StreamConfig(cache_gb=7.5 * size / 1e9, **limit), 8)


# --- single samples


def small(tmp_path: Path, shard: int) -> dict[str, Any]:
    """A cache that holds one shard and a half."""
    return {"cache_dir": str(tmp_path / "cache"), "cache_gb": 1.5 * shard / 1e9}


@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_data_set_that_no_disk_holds_samples_are_fetched_one_by_one(
    http: Any, tmp_path: Path, workers: int
) -> None:
    manifest = write(tmp_path / "served" / "train")
    options = small(tmp_path, manifest.shards[0].bytes)
    ours = stream_of(f"{http.url}/train", 10, workers, **options)
    for batch, expected in zip(ours, stream_of(tmp_path / "served" / "train", 10), strict=True):
        assert batch["key"] == expected["key"] and torch.equal(batch["moments"], expected["moments"])
    assert not cached(tmp_path)
    tars, indices = (sum(n for name, n in http.sent.items() if name.endswith(end)) for end in (".tar", ".idx"))
    if workers == 0:  # a worker loads further than is asked for
        assert tars <= 2.1 * manifest.bytes and all(http.requests[f"{i:05d}.idx"] == 1 for i in range(SHARDS))
    assert 0 < indices < manifest.bytes


def test_more_shards_than_may_be_open_are_each_asked_once(
    http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path / "served" / "train")
    monkeypatch.setattr(store, "OPEN_SHARDS", 2)
    http.faults["00003.tar"] = "500 once"
    dataset = LatentDataset(f"{http.url}/train", 0, StreamConfig(**small(tmp_path, manifest.shards[0].bytes)))
    http.requests.clear()
    for batch in itertools.islice(batches(dataset, 40, 40, 0, 1, 0, 0), 1):
        assert len(set(batch["key"])) == SAMPLES
    assert [http.requests[f"{i:05d}.tar"] for i in range(SHARDS)] == [SHARD + (i == 3) for i in range(SHARDS)]


@pytest.mark.parametrize("fault", ["no ranges", "shifted", "500", "missing index", "wrong index", "index of another"])
def test_a_server_that_sends_something_else_than_a_sample_is_found_out(http: Any, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "served" / "train"
    manifest = write(folder)
    if fault == "missing index":
        (folder / "00003.idx").unlink()
    elif fault == "wrong index":
        (folder / "00003.idx").write_bytes((folder / "00003.idx").read_bytes() + b" ")
    elif fault == "index of another":
        (folder / "00003.idx").write_bytes((folder / "00004.idx").read_bytes())
    else:
        http.faults["00003.tar"] = fault
    options = small(tmp_path, manifest.shards[0].bytes)
    with pytest.raises(
        RemoteError, match=r"00003\.(tar|idx).*(for a range of|other bytes|500|not found|not the index)"
    ):
        stream_of(f"{http.url}/train", 5, **options)
    found = stream_of(f"{http.url}/train", 5, skip_broken=True, **options)
    assert {key for batch in found for key in batch["key"]} == {f"{i:04d}" for i in range(SAMPLES) if i // SHARD != 3}


# --- several transfers


def fetched_ahead(cache: ShardCache, manifest: Manifest, timeout_s: float = 20.0) -> float:
    """Seconds until all shards are on the disk."""
    began = time.monotonic()
    while len(list(cache.folder.glob("*.tar"))) < len(manifest.shards):
        assert time.monotonic() < began + timeout_s
        cache.prefetch(manifest.shards)
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("transfers", [1, 4])
def test_several_shards_are_fetched_at_a_time_and_no_more_than_allowed(
    http: Any, tmp_path: Path, transfers: int
) -> None:
    manifest = write(tmp_path / "served" / "train")
    http.delay_s = 0.1
    stream = StreamConfig(cache_dir=str(tmp_path / "cache"), transfers=transfers)
    caches = [ShardCache(f"{http.url}/train", stream) for _ in range(3)]  # as of three processes
    threads = [threading.Thread(target=fetched_ahead, args=(cache, manifest)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert http.most_busy == transfers
    assert all(http.requests[f"{i:05d}.tar"] == 1 for i in range(SHARDS))


def test_who_needs_a_shard_does_not_wait_for_what_is_fetched_ahead(http: Any, tmp_path: Path) -> None:
    manifest = write(tmp_path / "served" / "train")
    http.faults |= {f"{i:05d}.tar": "stall" for i in range(4)}
    stream = StreamConfig(cache_dir=str(tmp_path / "cache"), transfers=4)
    cache = ShardCache(f"{http.url}/train", stream)
    cache.prefetch(manifest.shards[:4])
    while http.busy < 4:
        time.sleep(0.01)
    with cache.path_of(manifest.shards[7]) as path:
        assert path.stat().st_size == manifest.shards[7].bytes


def test_what_is_on_its_way_counts_and_what_a_killed_process_left_makes_room(http: Any, tmp_path: Path) -> None:
    manifest = write(tmp_path / "served" / "train")
    size = manifest.shards[0].bytes + (tmp_path / "served" / "train" / "00000.idx").stat().st_size
    http.delay_s = 0.02
    stream = StreamConfig(cache_dir=str(tmp_path / "cache"), transfers=4, cache_gb=3.2 * size / 1e9)
    caches = [ShardCache(f"{http.url}/train", stream) for _ in range(4)]
    left = caches[0].folder / f".{manifest.shards[0].sha256[:16]}-00000.tar.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(3 * size))
    ended = threading.Event()
    most = 0

    def fetch_all(cache: ShardCache) -> None:
        for info in (*manifest.shards, *manifest.shards):
            with suppress(UserError), cache.path_of(info):
                pass
        ended.set()

    threads = [threading.Thread(target=fetch_all, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    while not ended.is_set():
        most = max(most, bytes_of([*caches[0].folder.glob("*.tar"), *caches[0].folder.glob(".*.part")]))
    for thread in threads:
        thread.join()
    assert 0 < most <= 4.2 * size and not left.exists()  # one may be counted on its way and under its name


def test_a_server_that_sends_without_end_is_not_listened_to(http: Any, tmp_path: Path) -> None:
    manifest = write(tmp_path / "served" / "train")
    http.faults["00003.tar"] = "long"
    cache = ShardCache(f"{http.url}/train", StreamConfig(cache_dir=str(tmp_path / "cache")))
    with (
        pytest.raises(RemoteError, match="not the one that its manifest describes"),
        cache.path_of(manifest.shards[3]),
    ):
        pass


def test_the_index_comes_with_its_shard_and_is_made_where_it_does_not(http: Any, tmp_path: Path) -> None:
    manifest = write(tmp_path / "served" / "train")
    (tmp_path / "served" / "train" / "00001.idx").unlink()
    cache = ShardCache(f"{http.url}/train", StreamConfig(cache_dir=str(tmp_path / "cache")))
    paths = list[Path]()
    for info in manifest.shards[:2]:
        with cache.path_of(info) as path:
            paths.append(path)
    assert [path.with_suffix(".idx").exists() for path in paths] == [True, False]
    keys = [
        key for batch in stream_of(f"{http.url}/train", 5, cache_dir=str(tmp_path / "cache")) for key in batch["key"]
    ]
    assert len(set(keys)) == SAMPLES and paths[1].with_suffix(".idx").exists()


# --- lanes


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_in_lanes_each_machine_fetches_its_share_alone(http: Any, tmp_path: Path, nodes: int) -> None:
    with LatentWriter(tmp_path / "served" / "train", SHARD, CacheDtype.fp16) as writer:
        for i in range(64 * SHARD):
            writer.add(f"{i:04d}", np.zeros((1, 8, 4, 4), np.float32), np.arange(3), "noise", {})
    manifest = Manifest(kind="latents", shards=writer.close())
    manifest.save(tmp_path / "served" / "train")
    keys, read = list[str](), list[int]()
    for node in range(nodes):
        http.sent.clear()
        stream = StreamConfig(window=2, lanes=8, cache_dir=str(tmp_path / f"cache{node}"))
        dataset = LatentDataset(f"{http.url}/train", 0, stream, batch=16)
        steps = manifest.samples // 16
        for batch in itertools.islice(batches(dataset, 16, 16 // nodes, node, nodes, 0, 0), steps):
            keys += batch["key"]
        read.append(sum(count for name, count in http.sent.items() if name.endswith(".tar")))
    assert sorted(keys) == [f"{i:04d}" for i in range(64 * SHARD)]
    # An eighth of 64 shards is eight: what it begins and ends in counts for much more here than in a large data set,
    # as do the first shard, of which each checks the layout, and the first window of the next epoch.
    assert sum(read) / manifest.bytes < 1 + nodes * (1 + 2 + 2 * 8 / nodes) / 64


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
    assert len(cached(tmp_path)) == SHARDS - 1 and not list((tmp_path / "cache").rglob("*.part"))


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

    def full(url: str, target: Path, *others: Any) -> None:
        original(url, target, *others)
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
