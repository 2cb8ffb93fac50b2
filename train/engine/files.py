"""Folders that are whole or not there."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from data.shards.shard import sync
from models.formats.tensor_stream import Fingerprint
from train.engine.runtime import Runtime

MARKER = "COMPLETE"  # {"files": {name: [bytes, sha256]}}, written last
TEMPORARY = ".tmp-"


@contextmanager
def filled(target: Path) -> Iterator[Path]:
    """A new folder for this process to fill, which becomes `target` afterwards, or nothing after an exception."""
    staging = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def staged(target: Path, runtime: Runtime) -> Iterator[Path]:
    """Likewise for all processes to fill together; collective."""
    with filled(target) if runtime.is_main else nullcontext(target) as staging:
        runtime.barrier()
        yield staging
        runtime.barrier()
    runtime.barrier()


def _publish(staging: Path, target: Path) -> None:
    for folder in {staging, *(path.parent for path in staging.rglob("*"))}:
        sync(folder)
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(path: Path) -> Fingerprint:
    """Bytes and sha256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(folder: Path, share: slice = slice(None), needed: str | None = None) -> str | None:
    """What is wrong with the files that the marker lists, None for nothing.

    Args:
        share: of the files, by name, that are read.
        needed: a file without which the marker itself is broken.

    """
    try:
        files = json.loads((folder / MARKER).read_bytes())["files"]
        if needed is not None and needed not in files:
            return f"its {MARKER} does not list {needed}"
        for name in sorted(files)[share]:
            if list(fingerprint(folder / name)) != files[name]:
                return f"{name} is not what was written (size or sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    return None
