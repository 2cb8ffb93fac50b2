"""Files and folders are whole or not there, and on the disk before they have their names."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from conf.files import atomic_create, atomic_folder, atomic_path, atomic_write, sha256


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "sub" / "file", b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "sub" / "file") as temporary:
        temporary.write_bytes(b"new, but not all of it")
        raise RuntimeError
    assert (tmp_path / "sub" / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path / "sub") == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "file", b"content")
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "folder") as staging:
        (staging / "file").write_bytes(b"content")
    assert os.listdir(tmp_path) == []


def test_a_folder_replaces_what_was_there_or_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(target) as staging:
            (staging / content).mkdir()
            assert content not in (os.listdir(target) if target.exists() else [])
        assert os.listdir(target) == [content]
    with pytest.raises(RuntimeError), atomic_folder(target) as staging:
        (staging / "third").mkdir()
        raise RuntimeError
    assert os.listdir(target) == ["second"] and os.listdir(tmp_path) == ["folder"]


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix()

    monkeypatch.setattr(os, "fsync", lambda d: (steps.append(f"flush {name(d)}"), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(f"name {Path(b).name}"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append(f"name {Path(b).name}"), rename(a, b)))
    atomic_write(tmp_path / "file", b"content")
    assert [step.partition(" ")[0] for step in steps] == ["flush", "name", "flush"] and steps[-1] == "flush ."
    steps.clear()
    with atomic_folder(tmp_path / "folder") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"content")
    flushed = {"flush .tmp-folder", "flush .tmp-folder/sub"}
    assert set(steps[:2]) == flushed and steps[2:] == ["name folder", "flush ."]


def test_only_the_first_creates_a_file(tmp_path: Path) -> None:
    assert atomic_create(tmp_path / "file", b"first")
    assert not atomic_create(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_a_digest_is_of_files_end_to_end(tmp_path: Path) -> None:
    parts = [b"first" * 100_000, b"", b"second"]
    files = [tmp_path / str(i) for i in range(3)]
    for path, part in zip(files, parts, strict=True):
        path.write_bytes(part)
    assert sha256(*files) == hashlib.sha256(b"".join(parts)).hexdigest()
    assert sha256(files[0]) == hashlib.sha256(parts[0]).hexdigest()
