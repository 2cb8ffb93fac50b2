"""Files and folders that are whole or not there, on the disk before they have their names; and their digests.

Everything is written under a temporary name, flushed, and renamed: a rename is the one change that a reader, or a
machine that loses its power, sees entirely or not at all.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # begins the name of a folder that is being filled; a kill leaves it behind


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` on success and is removed on failure.

    `OSError` (disk full, no permission) passes through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id: those of two machines may be the same.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write a whole file, or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_create(path: Path, content: bytes) -> bool:
    """Write a whole file that is not there yet; returns whether it was not, to one of several processes alone."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    try:
        os.link(draft, path)  # unlike a rename, refuses a name that is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without links: processes that start at once are then the user's care
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return True


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` afterwards, in place of what was there; nothing on an exception.

    Whoever fills it flushes its files; the folders are flushed here.
    """
    staging = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        publish_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is complete its name."""
    sync(temporary)  # else the name could reach the disk before the content does
    os.replace(temporary, path)
    sync(path.parent)


def publish_folder(staging: Path, target: Path) -> None:
    """Give a folder that is complete its name, in place of one that had it."""
    for folder in {staging, *(path.parent for path in staging.rglob("*"))}:
        sync(folder)
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    if target.exists():  # no system replaces a folder that is not empty: it makes way first
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(*files: Path) -> str:
    """Digest of files end to end, in hex."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with this one
    return digest.hexdigest()
