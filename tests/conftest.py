"""What tests of several folders share."""

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tests compare bits, and the last ones of a sum depend on how many threads make it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BLOCK = 32768  # bytes of a block in LevelDB's log format


def records(path: Path) -> Iterator[Any]:
    """Protobuf records of a .wandb file: 7 bytes of header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # no header fits into the rest of the block
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        chunk = content[position + 7 : position + 7 + size]
        position += 7 + size
        if position > len(content):
            return  # cut off, or still being written
        parts = chunk if kind in (1, 2) else parts + chunk  # 1: whole, 2: first, 3: middle, 4: last part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def whole_log(output_dir: Path) -> list[Any]:
    """All records of the newest offline W&B run of a stage folder."""
    newest = next((output_dir / "wandb" / "latest-run").resolve().glob("*.wandb"))
    deadline = time.monotonic() + 30
    written = list(records(newest))
    while written == [] or written[-1].WhichOneof("record_type") != "exit":  # its service writes on after finish()
        assert time.monotonic() < deadline, f"{newest} has no end"
        time.sleep(0.05)
        written = list(records(newest))
    return written


def history(output_dir: Path) -> list[dict[str, Any]]:
    """Rows of that run, nested keys joined by '/'."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in whole_log(output_dir)
        if record.WhichOneof("record_type") == "history"
    ]


def description(output_dir: Path) -> dict[str, Any]:
    """Its names and its configuration."""
    runs = [record.run for record in whole_log(output_dir) if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    names = {"name": runs[0].display_name, "group": runs[0].run_group, "job_type": runs[0].job_type}
    return {**names, "project": runs[0].project, "config": config}


@pytest.fixture
def wandb_history() -> Any:
    """`wandb_history(output_dir)`: what an offline W&B run that ended really wrote."""
    return history


@pytest.fixture
def wandb_run() -> Any:
    """`wandb_run(output_dir)`: likewise, under which names and with which configuration."""
    return description
