"""Shards: what we write others read, what others write we read, and nothing is ever there by half."""

import errno
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from conf.errors import UserError
from data.shards import ShardReader, ShardWriter, atomic_path, atomic_write

SAMPLES = {
    f"{i:09d}": {"png": bytes([i]) * (500 + i), "txt": f"caption {i} é".encode(), "json": b"{}"} for i in range(7)
}


def write(folder: Path, shard_samples: int = 3) -> list[str]:
    with ShardWriter(folder, shard_samples) as writer:
        for key, files in SAMPLES.items():
            writer.add(key, files)
    return [info.name for info in writer.finished]


def read(path: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(path)
    records = [reader[i] for i in range(len(reader))]
    return {r["__key__"]: {name: bytes(v) for name, v in r.items() if name != "__key__"} for r in records}


def test_round_trip_and_names(tmp_path: Path) -> None:
    names = write(tmp_path)
    assert names == ["00000.tar", "00001.tar", "00002.tar"] == sorted(os.listdir(tmp_path))
    assert {k: v for name in names for k, v in read(tmp_path / name).items()} == SAMPLES


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the last file to the collector
def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in write(tmp_path)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    seen = {s["__key__"]: {e: s[e] for e in ("png", "txt", "json")} for s in dataset}
    assert seen == SAMPLES
    del dataset
    gc.collect()


def test_tarfile_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path, shard_samples=100)
    with tarfile.open(tmp_path / "00000.tar", "r:") as tar:
        seen = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert seen == {f"{key}.{e}": content for key, files in SAMPLES.items() for e, content in files.items()}


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as sink:
        for key, files in SAMPLES.items():
            sink.write({"__key__": key, **files})
    assert read(tmp_path / "a.tar") == SAMPLES


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_names(tmp_path: Path, form: int) -> None:
    names = [f"{'d' * 90}/{'k' * 60}{i}.TXT" for i in range(2)]
    if form != tarfile.USTAR_FORMAT:
        names += ["k" * 150 + ".txt", "ключ.txt"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("d.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 3, 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(b"abc"))
    assert read(tmp_path / "a.tar") == {name.rpartition(".")[0]: {"txt": b"abc"} for name in names}


def test_equal_samples_make_equal_shards(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path / "a", 9)
    second = ShardWriter(tmp_path / "b", 9)
    for writer in (first, second):
        writer.add("0", {"txt": b"same"})
    assert first.close() == second.close()
    assert len(ShardReader(tmp_path / "a" / "00000.tar")) == 1


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024, 4096, 10_240, -512, -1024])
def test_truncated_shard_is_refused(tmp_path: Path, cut: int) -> None:
    write(tmp_path, shard_samples=100)
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:cut])
    if cut == -512:  # one end block is enough
        assert read(tmp_path / "cut.tar") == SAMPLES
        return
    for _ in range(2):  # the second try must not see what the first one indexed
        reader = ShardReader(tmp_path / "cut.tar")
        with pytest.raises(UserError, match=r"cut\.tar is not a readable tar \(truncated\?\)"):
            len(reader)
        with pytest.raises(UserError, match="truncated"):
            reader[0]


def test_damaged_header_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    content[3] ^= 1  # in the first name: the checksum tells
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match="not a readable tar"):
        read(tmp_path / "00000.tar")


def test_not_a_tar_and_missing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match="not a readable tar"):
        read(tmp_path / "a.tar")
    with pytest.raises(UserError, match="missing"):
        read(tmp_path / "b.tar")


def test_reader_survives_pickle_and_release(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path / "00000.tar")
    before = bytes(reader[1]["png"])
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy.is_open and bytes(copy[1]["png"]) == before
    reader.release()
    assert not reader.is_open and bytes(reader[1]["png"]) == before


def test_failed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 3) as writer:
        for key, files in list(SAMPLES.items())[:5]:
            writer.add(key, files)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["00000.tar"]


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(tmp_path, 3)
    writer.add("0", SAMPLES["000000000"])
    with pytest.raises(OSError, match="No space"):
        writer.close()
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "file", b"content")
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_no_half_shard(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from data.shards import ShardWriter\n"
        "writer = ShardWriter(sys.argv[1], 3)\n"
        "for i in range(5):\n"
        "    writer.add(str(i), {'txt': bytes(3_000_000)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["00000.tar"]
    with ShardWriter(tmp_path, 3, first_shard=1) as writer:  # the next run clears the leftover away
        writer.add("3", {"txt": b"x"})
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar"]


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    atomic_write(tmp_path / "sub" / "file", b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "sub" / "file") as temporary:
        temporary.write_bytes(b"new, but not all of it")
        raise RuntimeError
    assert (tmp_path / "sub" / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path / "sub") == ["file"]


@pytest.mark.parametrize("key", ["", "a.b", "last"])
def test_ambiguous_keys_are_refused(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path, 3)
    writer.add("last", {"txt": b""})
    with pytest.raises(ValueError, match="key"):
        writer.add(key, {"txt": b""})
    writer.abort()


def test_a_member_twice_in_a_sample_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(UserError, match="twice"):
        read(tmp_path / "a.tar")
