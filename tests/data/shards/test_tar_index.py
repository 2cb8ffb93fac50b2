"""Indices of shards: what a writer notes is what headers say, one process makes each, a wrong one is not trusted."""

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from conf.errors import UserError
from conf.schema import StreamConfig
from data.shards import tar_index
from data.shards.manifest import Manifest, find_shards
from data.shards.shard import ShardReader, ShardWriter, sha256_of
from data.shards.store import RecordStore
from data.shards.tar_index import ShardIndex, cache_top, find_index, identity, index_of, map_file

REQUIRED = [("txt",)]


def content(index: ShardIndex) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """All that an index says of its samples."""
    return [(index.key(i), list(index.members(i))) for i in range(len(index)) if i not in index.broken]


def latents(folder: Path, samples: int = 50) -> Path:
    """A shard whose records differ in their texts alone."""
    with ShardWriter(folder, samples) as writer:
        for i in range(samples):
            writer.add(f"{i:09d}", {"moments.npy": bytes(3000), "txt": b"a" * (i + 1), "json": b"{}"})
    return folder / "00000.tar"


def uneven(folder: Path) -> Path:
    """A shard of samples with other members each."""
    with ShardWriter(folder, 99) as writer:
        writer.add("a", {"jpg": bytes(700), "txt": b"1"})
        writer.add("ключ", {"png": bytes(7), "txt": b"1", "json": b"{}"})
        writer.add("k" * 187, {"jpg": b"", "txt": b"1"})
        writer.add("a", {"seg.png": b"1"})  # joins the first
    return folder / "00000.tar"


def foreign(path: Path, samples: int = 3) -> Path:
    """A tar that another program has written."""
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = 5
                tar.addfile(info, BytesIO(b"12345"))
    return path


@pytest.mark.parametrize("shard", [latents, uneven])
def test_what_the_writer_notes_is_what_the_headers_say(tmp_path: Path, shard: "type[Path]") -> None:
    path = shard(tmp_path)
    written = ShardIndex.loads(map_file(path.with_suffix(".idx")), identity(path, sha256_of(path)))
    assert written is not None and content(written) == content(index_of(map_file(path), path))
    assert len(content(written)) > 2 and written.patterns == index_of(map_file(path), path).patterns
    with safe_open(path.with_suffix(".idx"), "np") as file:  # and safetensors alone reads it
        assert sum(file.get_tensor("sizes").tolist()) == sum(
            size for _, found in content(written) for *_, size in found
        )


def test_records_that_lie_alike_have_one_stride(tmp_path: Path) -> None:
    path = latents(tmp_path)
    index = find_index(path, sha256_of(path), None)
    assert len(index.offsets) == 3 and index.stride == 512 * 3 + 3072 + 512 * 2
    assert not index.first and not index.pattern and path.with_suffix(".idx").stat().st_size < 50 * 30 + 600


def test_equal_shards_have_equal_indices(tmp_path: Path) -> None:
    for name in ("a", "b"):
        uneven(tmp_path / name)
    assert (tmp_path / "a" / "00000.idx").read_bytes() == (tmp_path / "b" / "00000.idx").read_bytes()


def test_the_manifest_names_it_and_an_older_one_is_the_same_data_set(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 9) as writer:
        writer.add("a", {"txt": b"1"})
    manifest = Manifest(kind="images", shards=writer.finished)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path).shards[0].index == sha256_of(tmp_path / "00000.idx")
    older = json.loads((tmp_path / "manifest.json").read_text())
    del older["shards"][0]["index"]
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    assert Manifest.load(tmp_path).shards[0].index == "" and Manifest.load(tmp_path).digest() == manifest.digest()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "cut by one", "of another tar", "a later schema"])
@pytest.mark.parametrize("hashed", [False, True])
def test_without_a_sound_index_the_headers_are_walked_and_it_is_made_anew(
    tmp_path: Path, damage: str, hashed: bool
) -> None:
    path, other = latents(tmp_path / "a"), latents(tmp_path / "b", 7)
    digest, index = sha256_of(path), path.with_suffix(".idx")
    whole = index.read_bytes()
    broken = {
        "empty": b"",
        "cut": whole[:100],
        "cut by one": whole[:-1],
        "of another tar": other.with_suffix(".idx").read_bytes(),
        "a later schema": whole.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'),
    }
    index.unlink()
    if damage != "missing":
        index.write_bytes(broken[damage])
    assert content(find_index(path, digest, None, hashed)) == content(index_of(map_file(path), path))
    assert ShardIndex.loads(map_file(index), identity(path, digest if hashed else "")) is not None
    assert not hashed or index.read_bytes() == whole


def alternating(folder: Path) -> Path:
    """A shard of samples with one of two kinds of members."""
    with ShardWriter(folder, 99) as writer:
        for i in range(6):
            writer.add(f"{i}", {"jpg": bytes(700 + i), "txt": b"1", **({"json": b"{}"} if i % 2 else {})})
    return folder / "00000.tar"


@pytest.mark.parametrize("make", [latents, alternating])
def test_a_bit_that_flips_in_an_index_gives_no_other_sample(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    digest, index, sound = sha256_of(path), path.with_suffix(".idx"), ShardReader(path)
    whole, found = index.read_bytes(), 0
    last = len(sound) - 1
    for place in range(len(whole)):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        for i in (0, last):
            with suppress(UserError):  # one line
                reader = ShardReader(path, index=find_index(path, digest, str(tmp_path)))
                # Its key may be wrong, and a letter in the other case, of an extension that readers then do not know.
                parts = {name.lower(): part for name, part in reader[i].items()}
                assert parts | {"__key__": sound.key(i)} == sound[i]
                found += 1
    assert found > len(whole)  # of two for each


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts, header: facts.update(stride="3072"),
        lambda facts, header: facts.update(stride=10**9),
        lambda facts, header: facts.update(stride=-5632),
        lambda facts, header: facts.update(patterns=[]),
        lambda facts, header: facts.update(patterns=[["txt"]]),
        lambda facts, header: facts.update(patterns=[[1, 2, 3]]),
        lambda facts, header: facts.update(patterns=[["a", "b", "c"], ["d"]]),
        lambda facts, header: facts.update(others=None),
        lambda facts, header: facts.update(broken=["twice"]),
        lambda facts, header: header.pop("sizes"),
        lambda facts, header: header.update(sizes=header["key_ends"]),
        lambda facts, header: header.update(sizes="sizes"),
        lambda facts, header: header["keys"]["data_offsets"].reverse(),
        lambda facts, header: header["offsets"].update(data_offsets=header["first"]["data_offsets"]),
    ],
)
def test_an_index_whose_parts_do_not_fit_is_made_anew(tmp_path: Path, damage: Callable[[Any, Any], Any]) -> None:
    path = latents(tmp_path)
    whole = path.with_suffix(".idx").read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["index"])
    damage(facts, header)
    header["__metadata__"]["index"] = json.dumps(facts)
    beginning = json.dumps(header, separators=(",", ":")).encode()
    path.with_suffix(".idx").write_bytes(struct.pack("<Q", len(beginning)) + beginning + whole[8 + length :])
    index = find_index(path, sha256_of(path), None)
    assert content(index) == content(index_of(map_file(path), path)) and len(index) == 50


@pytest.mark.parametrize(
    "foreign_index",
    [b"v1.2 6\nimage/jpeg 512 5 0.jpg\n", b"\3" + bytes(7) + b'"x"', b"\1" + bytes(7) + b"5", bytes(range(256))],
)
def test_an_index_of_another_program_stays_as_it_is(tmp_path: Path, foreign_index: bytes) -> None:
    (tmp_path / "data").mkdir()
    path, cache = foreign(tmp_path / "data" / "a.tar"), tmp_path / "cache"
    path.with_suffix(".idx").write_bytes(foreign_index)  # such as of NVIDIA DALI's wds2idx
    assert find_shards(path.parent, stream=StreamConfig(cache_dir=str(cache))).samples == 3
    assert path.with_suffix(".idx").read_bytes() == foreign_index
    (kept,) = cache.rglob("a.idx")
    assert ShardIndex.loads(map_file(kept), identity(path, "")) is not None


def two_of_equal_size(folder: Path) -> tuple[Path, Path]:
    """A tar and another one of equal size whose members lie elsewhere."""
    for name, files in {"a": {"jpg": bytes(600), "txt": b"1"}, "b": {"txt": b"2", "jpg": bytes(600)}}.items():
        with ShardWriter(folder / name, 9) as writer:
            for i in range(3):
                writer.add(f"{i}", files)
    return folder / "a" / "00000.tar", folder / "b" / "00000.tar"


def test_an_index_made_of_a_tar_that_nobody_hashed_is_not_that_of_the_right_one(tmp_path: Path) -> None:
    path, other = two_of_equal_size(tmp_path)
    right, digest = path.read_bytes(), sha256_of(path)
    path.with_suffix(".idx").unlink()
    path.write_bytes(other.read_bytes())
    assert content(find_index(path, digest, None))[0][1][0][0] == "txt" and path.with_suffix(".idx").exists()
    path.write_bytes(right)
    os.utime(path, ns=(1, 1))
    assert content(find_index(path, digest, None)) == content(index_of(map_file(path), path))


def test_the_index_of_a_tar_that_was_hashed_holds_whenever_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = latents(tmp_path)
    digest = sha256_of(path)
    path.with_suffix(".idx").unlink()
    find_index(path, digest, None, hashed=True)
    os.utime(path, ns=(1, 1))  # as the cache notes which shard was used last
    monkeypatch.setattr(tar_index, "index_of", None)  # nobody walks its headers again
    assert len(find_index(path, digest, None, hashed=True)) == 50


@pytest.mark.parametrize("names", [("0", "1"), ("7", "8")])
def test_a_wrong_tar_of_equal_size_is_one_line(tmp_path: Path, names: tuple[str, str]) -> None:
    path, other = two_of_equal_size(tmp_path)
    if names[0] == "7":  # members lie alike, and only their names tell
        with ShardWriter(other.parent, 9) as writer:
            for i in range(7, 10):
                writer.add(f"{i}", {"jpg": bytes(600), "txt": b"1"})
    digest = sha256_of(path)
    assert other.stat().st_size == path.stat().st_size
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"00000\.tar differs from the sha256 of its manifest: rebuild it") as error:
        find_index(path, digest, None)
    assert "\n" not in str(error.value)


def test_an_index_that_does_not_fit_the_tar_of_the_manifest_is_made_anew(tmp_path: Path) -> None:
    path, other = two_of_equal_size(tmp_path)
    wrong = index_of(map_file(other), other)
    path.with_suffix(".idx").write_bytes(wrong.dumps(identity(path, sha256_of(path))))
    assert content(find_index(path, sha256_of(path), None)) == content(index_of(map_file(path), path))
    assert ShardIndex.loads(map_file(path.with_suffix(".idx")), identity(path, sha256_of(path))) is not None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_the_first_header_does_not_hold_is_no_other_tar(
    tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["f" * 90 + "/" + "k" * 90 + ".JPG", "ключ.jpg"] + ["k" * 150 + ".jpg"] * (form != tarfile.USTAR_FORMAT)
    for number, name in enumerate(names):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo(name))
        find_index(tmp_path / f"{number}.tar", "", None)
    monkeypatch.setattr(tar_index, "index_of", None)  # nobody walks their headers again
    assert all(len(find_index(tmp_path / f"{number}.tar", "", None)) == 1 for number in range(len(names)))


def test_the_folder_below_tmpdir_is_of_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    path = foreign(tmp_path / "data" / "a.tar")
    path.with_suffix(".idx").write_bytes(b"of another program")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(find_index(path, "", None)) == 3
    top = cache_top(None)
    assert top.parent == tmp_path and top.stat().st_mode & 0o777 == 0o700 and list(top.rglob("a.idx"))
    top.chmod(0o777)
    assert cache_top(None).stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(os, "getuid", lambda: 12345)
    other = tmp_path / "latentline-12345"
    for link in (False, True):
        if link:
            other.rmdir()
            other.symlink_to(tmp_path / "elsewhere")
        else:
            other.mkdir()
        with pytest.raises(UserError, match=r"latentline-12345 belongs to another user: set stream\.cache_dir"):
            cache_top(None)
        assert len(find_index(path, "", None)) == 3
        assert not (tmp_path / "elsewhere").exists() and not list(other.glob("*"))
    assert cache_top("elsewhere") == Path("elsewhere")


def test_a_foreign_shard_that_was_written_again_is_indexed_again(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.tar")
    assert len(find_index(path, "", None)) == 3 and path.with_suffix(".idx").is_file()
    foreign(path, samples=5)
    assert len(find_index(path, "", None)) == 5
    os.utime(path, ns=(1, 1))  # written within one tick, and as large as before
    foreign(path, samples=5)
    assert find_shards(tmp_path).samples == 5


def test_where_nothing_may_be_written_indices_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    path, cache = foreign(tmp_path / "data" / "a.tar"), tmp_path / "cache"
    write = tar_index.atomic_write

    def read_only(target: Path, content: bytes) -> None:  # permissions do not bind root
        if target.parent == path.parent:
            raise PermissionError(13, "Permission denied")
        write(target, content)

    monkeypatch.setattr(tar_index, "atomic_write", read_only)
    stream = StreamConfig(cache_dir=str(cache))
    assert find_shards(tmp_path / "data", stream=stream).samples == 3
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["a.tar"]
    (kept,) = cache.rglob("*.idx")
    assert kept.name == "a.idx"
    monkeypatch.setattr(tar_index, "index_of", None)  # nobody walks its headers again
    assert len(find_index(path, "", str(cache))) == 3
    monkeypatch.undo()
    monkeypatch.setattr(tar_index, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    kept.unlink()
    assert len(find_index(path, "", str(cache))) == 3 and not list(cache.rglob("*.idx"))  # and a full disk is no end


def _index_all(folder: Path, counter: "multiprocessing.sharedctypes.Synchronized[int]") -> None:  # type: ignore[name-defined]
    walk = tar_index.index_of

    def counted(*args: object) -> ShardIndex:
        with counter.get_lock():
            counter.value += 1
        return walk(*args)  # type: ignore[arg-type]

    tar_index.index_of = counted  # type: ignore[assignment]
    assert find_shards(folder).samples == 20 * 300


def test_processes_that_start_together_share_the_indices_out(tmp_path: Path) -> None:
    for number in range(20):
        foreign(tmp_path / f"{number:02d}.tar", samples=300)
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=_index_all, args=(tmp_path, counter)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert counter.value == 20  # each by one of them


def test_each_index_of_a_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        foreign(tmp_path / f"{number}.tar", samples=3 * (number > 0))
    find_shards(tmp_path)
    read = list[str]()
    monkeypatch.setattr(tar_index, "map_file", lambda path: read.append(path.name) or map_file(path))
    assert find_shards(tmp_path).samples == 4 * 3
    assert sorted(read) == [f"{number}.idx" for number in range(5)]


def test_a_process_keeps_a_bounded_number_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.store.OPEN_SHARDS", 3)
    with ShardWriter(tmp_path, 2) as writer:
        for i in range(20):
            writer.add(f"{i}", {"txt": b"%d" % i})
    manifest = Manifest(kind="images", shards=writer.finished)
    manifest.save(tmp_path)
    store = RecordStore(tmp_path, manifest, REQUIRED, StreamConfig())
    descriptors = len(os.listdir("/proc/self/fd"))
    kept = store[0]
    for turn in range(3):
        assert [bytes(store[i]["txt"]) for i in range(20)] == [b"%d" % i for i in range(20)], turn
        assert len(store.readers) == 3 and len(os.listdir("/proc/self/fd")) <= descriptors + 6
    assert bytes(kept["txt"]) == b"0"  # a record in use outlives the map that the store holds


def test_what_a_sample_lacks_is_found_by_the_index(tmp_path: Path) -> None:
    index = index_of(map_file(uneven(tmp_path)), tmp_path / "00000.tar")
    assert index.lacking([("txt",)]) is None and index.lacking([("jpg", "png"), ("txt",)]) is None
    assert index.lacking([("json",)]) == 0 and index.lacking([("txt",), ("jpg",)]) == 1
    plain = index_of(map_file(latents(tmp_path / "b")), tmp_path)
    assert plain.lacking([("moments.npy",)]) is None and plain.lacking([("jpg",)]) == 0


def test_verify_trusts_no_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 9) as writer:
        writer.add("a", {"jpg": b"1", "txt": b"1"})
    manifest = Manifest(kind="images", shards=writer.finished)
    manifest.save(tmp_path)
    path = tmp_path / "00000.tar"
    wrong = index_of(map_file(path), path)
    wrong.sizes = [1, 0]
    (tmp_path / "00000.idx").write_bytes(wrong.dumps(identity(path, sha256_of(path))))
    with pytest.raises(UserError, match=r"sample 'a': the index of shard \S+ is damaged, .*: delete \S+00000\.idx"):
        RecordStore(tmp_path, manifest, REQUIRED, StreamConfig())
    assert bytes(RecordStore(tmp_path, manifest, REQUIRED, StreamConfig(verify=True))[0]["txt"]) == b"1"


def test_a_missing_tar_is_told_whatever_its_index_says(tmp_path: Path) -> None:
    path = latents(tmp_path)
    digest = sha256_of(path)
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.tar is missing"):
        find_index(path, digest, None)
    with pytest.raises(UserError, match=r"00000\.tar is missing"):
        ShardReader(path)


def resident(path: Path) -> int:
    """Bytes of a file that the kernel holds in memory."""
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore of util-linux tells what is in memory")
@pytest.mark.parametrize("apart", [False, True])
def test_of_a_shard_the_samples_that_are_read_come_into_memory_and_nothing_around_them(
    tmp_path: Path, apart: bool
) -> None:
    samples, size = 200, 100_000
    if apart:  # all images, then all texts
        with tarfile.open(tmp_path / "00000.tar", "w") as tar:
            for extension, length in (("jpg", size), ("txt", 5)):
                for i in range(samples):
                    info = tarfile.TarInfo(f"{i:03d}.{extension}")
                    info.size = length
                    tar.addfile(info, BytesIO(os.urandom(length)))
    else:
        with ShardWriter(tmp_path, samples) as writer:
            for i in range(samples):
                writer.add(f"{i:03d}", {"jpg": os.urandom(size), "txt": b"12345"})
    path = tmp_path / "00000.tar"
    index = find_index(path, "", None)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > size:
        pytest.skip("this file system keeps its files in memory")
    before, reader = resident(path), ShardReader(path, index=index)
    for i in (3, 77, 150):
        assert len(bytes(reader[i]["jpg"])) == size
    assert 3 * size <= resident(path) - before <= 3 * (size + 8 * 4096)
