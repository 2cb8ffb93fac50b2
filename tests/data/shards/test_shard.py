"""Shards: what we write others read, what others write we read, and nothing is ever there by half."""

import errno
import gc
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from conf.errors import UserError
from data.shards.shard import ShardReader, ShardWriter

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
    assert names == ["00000.tar", "00001.tar", "00002.tar"] == sorted(path.name for path in tmp_path.glob("*.tar"))
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
    with pytest.raises(UserError, match=r"cut\.tar is not a readable tar \(truncated\?\)"):
        ShardReader(tmp_path / "cut.tar")


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
    with pytest.raises(UserError, match="missing: check its path"):  # and no file is named that is not there
        read(tmp_path / "b.tar")


def test_a_folder_in_place_of_a_shard_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(UserError, match=r"a\.tar cannot be read: Is a directory$"):
        read(tmp_path / "a.tar")


def test_failed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 3) as writer:
        for key, files in list(SAMPLES.items())[:5]:
            writer.add(key, files)
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["00000.idx", "00000.tar"]


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(tmp_path, 3)
    writer.add("0", SAMPLES["000000000"])
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_no_half_shard(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from data.shards.shard import ShardWriter\n"
        "writer = ShardWriter(sys.argv[1], 3)\n"
        "for i in range(5):\n"
        "    writer.add(str(i), {'txt': bytes(3_000_000)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["00000.idx", "00000.tar"]
    with ShardWriter(tmp_path, 3, first_shard=1) as writer:  # the next run clears the leftover away
        writer.add("3", {"txt": b"x"})
    assert sorted(os.listdir(tmp_path)) == ["00000.idx", "00000.tar", "00001.idx", "00001.tar"]


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


# --- shards of others


def pack(path: Path, *names: str, form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of files whose content is their number; of names that end in "@" links."""
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info, content = tarfile.TarInfo(name.rstrip("@")), str(number).encode()
            if name.endswith("@"):
                info.type, info.linkname, content = tarfile.SYMTYPE, "l" * 150, b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def numbers(path: Path) -> dict[str, dict[str, int]]:
    return {key: {name: int(value) for name, value in files.items()} for key, files in read(path).items()}


def test_members_of_a_sample_may_lie_anywhere(tmp_path: Path) -> None:
    wanted = {"a": {"jpg": 0, "txt": 3}, "b": {"jpg": 1, "txt": 4}, "c": {"jpg": 2, "txt": 5, "json": 6}}
    assert numbers(pack(tmp_path / "a.tar", "a.jpg", "b.jpg", "c.jpg", "a.txt", "b.txt", "c.txt", "c.json")) == wanted
    wanted = {"a": {"jpg": 0, "txt": 2}, "b": {"jpg": 1, "txt": 3}, "c": {"jpg": 4, "txt": 5}}
    assert numbers(pack(tmp_path / "b.tar", "a.jpg", "b.jpg", "a.txt", "b.txt", "c.jpg", "c.txt")) == wanted


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", "a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt", "c.txt", "a.jpg")
    assert numbers(path) == {
        "a": {"jpg": 0, "txt": 1},
        "b": {"jpg": 2, "txt": 3},
        "a~2": {"jpg": 4, "txt": 5},
        "c": {"txt": 6},
        "a~3": {"jpg": 7},
    }


def test_dots_part_samples_that_would_be_lost_in_one(tmp_path: Path) -> None:
    names = ["v1.0/22.05.png", "v1.0/22.05.txt", "v1.0/22.06.PNG", "v1.0/22.06.json", "1.0.jpg", "1.jpg", "1.0.txt"]
    assert numbers(pack(tmp_path / "a.tar", *names, "1.txt", "1.0.seg.png")) == {
        "v1.0/22.05": {"png": 0, "txt": 1},
        "v1.0/22.06": {"png": 2, "json": 3},
        "1.0": {"jpg": 4, "txt": 6, "seg.png": 8},
        "1": {"jpg": 5, "txt": 7},
    }


def test_further_files_of_one_sample_stay_with_it(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "a.seg.png", "a.depth.png", "a.depth.json", "b.left.jpg", "b.right.jpg", "b.txt"]
    assert numbers(pack(tmp_path / "a.tar", *names)) == {
        "a": {"jpg": 0, "txt": 1, "seg.png": 2, "depth.png": 3, "depth.json": 4},
        "b": {"left.jpg": 5, "right.jpg": 6, "txt": 7},
    }


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_sample_with_a_link_or_a_member_twice_is_broken_alone(tmp_path: Path, form: int) -> None:
    path = pack(tmp_path / "a.tar", "a.jpg", "a.txt@", "b.jpg", "b.jpg", "b.txt", "c.jpg", "c.txt", "README", form=form)
    reader = ShardReader(path)
    assert [reader.key(i) for i in range(len(reader))] == ["a", "b", "c"] and reader.index.others == ["README"]
    for row, reason in ((0, r"its \.txt is a link"), (1, r"its \.jpg is there twice")):
        with pytest.raises(UserError, match=reason):
            reader[row]
    assert bytes(reader[2]["txt"]) == b"6"


@pytest.mark.parametrize("unsorted", [False, True])
def test_of_a_shard_that_breaks_off_the_last_sample_is_left_out(tmp_path: Path, unsorted: bool) -> None:
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt"] if unsorted else ["a.jpg", "a.txt", "b.jpg", "b.txt"]
    whole = pack(tmp_path / "a.tar", *names).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 3 * 1024])  # three members of four
    reader = ShardReader(tmp_path / "a.tar", tolerant=True)
    assert [reader.key(i) for i in range(len(reader))] == (["b"] if unsorted else ["a"])
    assert "truncated" in reader.index.problem


def test_tars_that_were_joined_are_read_to_their_end(tmp_path: Path) -> None:
    first, second = (pack(tmp_path / name, f"{name}.txt").read_bytes() for name in ("a", "b"))
    (tmp_path / "both.tar").write_bytes(first + second)
    assert numbers(tmp_path / "both.tar") == {"a": {"txt": 0}, "b": {"txt": 0}}
    (tmp_path / "both.tar").write_bytes(first + b"something else" * 100)
    with pytest.raises(UserError, match="not a readable tar"):
        read(tmp_path / "both.tar")


@pytest.mark.parametrize("mode, name", [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_a_compressed_tar_is_named_as_such(tmp_path: Path, mode: str, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(UserError, match=rf"a\.tar is compressed \({name}\): unpack it"):
        read(tmp_path / "a.tar")


def test_many_dotted_keys_are_no_trouble(tmp_path: Path) -> None:
    names = [f"x.{number}.{extension}" for number in range(2_000) for extension in ("jpg", "txt")]
    found = read(pack(tmp_path / "a.tar", *names))
    assert list(found) == [f"x.{number}" for number in range(2_000)] and found["x.7"] == {"jpg": b"14", "txt": b"15"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the last file to the collector
@pytest.mark.parametrize("key", ["k" * 187, "k" * 300, "ключ" * 60, f"{'d' * 200}/{'k' * 120}", "/" + "k" * 150])
def test_keys_of_any_length_are_written_so_that_others_read_them(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, 9) as writer:
        writer.add(key, {"moments.npy": b"1" * 600, "txt": b"2"})
        writer.add("next", {"txt": b"3"})
    assert read(tmp_path / "00000.tar") == {key: {"moments.npy": b"1" * 600, "txt": b"2"}, "next": {"txt": b"3"}}
    dataset = webdataset.WebDataset([str(tmp_path / "00000.tar")], shardshuffle=False)
    assert [sample["__key__"] for sample in dataset] == [key, "next"]
    del dataset
    gc.collect()


def test_names_in_no_encoding_can_be_printed(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (key,) = read(pack(tmp_path / "a.tar", "caf\udce9.txt", form=form))
        assert key.encode()
