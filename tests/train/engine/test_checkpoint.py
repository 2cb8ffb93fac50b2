"""Checkpoints are whole or not there, and belong to the run that continues from them."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from conf.schema import Precision
from train.engine.checkpoint import Checkpoints
from train.engine.runtime import Runtime
from train.engine.state import State, architecture_of, read_done, require_same_run, write_done

ALONE = Runtime(0, 1, 0, torch.device("cpu"), Precision.fp32, None)  # type: ignore[arg-type]


class Number:
    """The smallest trainable: one value."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.error: Exception | None = None

    def save(self, folder: Path) -> None:
        (folder / "number").mkdir(exist_ok=True)
        (folder / "number" / "weights").write_text(str(self.value) * 100)
        if self.error is not None:
            raise self.error

    def load(self, folder: Path) -> None:
        self.value = int((folder / "number" / "weights").read_text()[0])


def save(folder: Path, *samples: int, keep: int = 10) -> None:
    for seen in samples:
        Checkpoints(folder, ALONE, keep).save({"number": Number(seen // 10)}, State(samples_seen=seen))  # type: ignore[dict-item]


def resume(folder: Path, fresh: State | None = None) -> tuple[int, int]:
    number = Number()
    state = Checkpoints(folder, ALONE, 10).resume({"number": number}, fresh or State())  # type: ignore[dict-item]
    return state.samples_seen, number.value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_newest_is_resumed_and_none_means_a_fresh_start(tmp_path: Path) -> None:
    assert resume(tmp_path) == (0, 0)
    save(tmp_path, 10, 20)
    assert resume(tmp_path) == (20, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: (c / "COMPLETE").unlink(),
        lambda c: (c / "COMPLETE").write_text('{"files": {'),
        lambda c: (c / "COMPLETE").write_text("[]"),
        lambda c: (c / "number" / "weights").unlink(),
        lambda c: (c / "number" / "weights").write_text("3" * 99),
        lambda c: (c / "number" / "weights").write_text("3" * 50 + "4" + "3" * 49),
        lambda c: (c / "state.json").write_text((c / "state.json").read_text().replace("30", "31")),
        lambda c: shutil.rmtree(c / "number"),
    ],
    ids=["no marker", "torn marker", "odd marker", "file gone", "shorter", "one byte", "state", "folder gone"],
)
def test_broken_newest_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "checkpoints" / "000000000030")
    assert resume(tmp_path) == (20, 2)
    warning = capsys.readouterr().err
    assert "000000000030" in warning
    assert warning.count("\n") == 1


def test_broken_one_is_replaced_when_the_run_gets_there_again(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "000000000020" / "COMPLETE").unlink()
    save(tmp_path, 20)
    assert resume(tmp_path) == (20, 2)


def test_only_broken_ones_are_not_taken_for_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "000000000010" / "COMPLETE").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is readable"):
        resume(tmp_path)


def test_retention_keeps_the_newest_and_never_counts_a_broken_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep=2)
    assert names(tmp_path) == ["000000000020", "000000000030"]
    (tmp_path / "checkpoints" / "000000000030" / "COMPLETE").unlink()
    number: Any = {"number": Number()}
    checkpoints = Checkpoints(tmp_path, ALONE, 2)
    checkpoints.resume(number, State())
    checkpoints.save(number, State(samples_seen=35))
    assert names(tmp_path) == ["000000000020", "000000000035"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors' way
    ],
)
def test_full_disk_leaves_the_previous_checkpoint_and_no_rest(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 10, keep=1)
    number = Number(2)
    number.error = error
    with pytest.raises(OSError, match="No space left") as caught:
        Checkpoints(tmp_path, ALONE, 1).save({"number": number}, State(samples_seen=20))  # type: ignore[dict-item]
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["000000000010"]
    assert resume(tmp_path) == (10, 1)


def test_what_a_kill_left_is_cleared_by_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / ".tmp-000000000020").mkdir()
    assert resume(tmp_path) == (10, 1)
    assert names(tmp_path) == ["000000000010"]


def test_failure_of_one_process_is_the_failure_of_all(tmp_path: Path) -> None:
    """Two processes, played by threads: the second cannot write, and the first does not wait for it."""
    barrier, slots = threading.Barrier(2, timeout=10), [None, None]

    class Rank:
        world, device = 2, torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.rank, self.is_main = rank, rank == 0

        def barrier(self) -> None:
            barrier.wait()

        def gather_objects(self, value: Any) -> list[Any]:
            slots[self.rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

    failures: dict[int, int | None] = {}

    def work(rank: int, number: Number) -> None:
        checkpoints = Checkpoints(tmp_path, Rank(rank), 2)  # type: ignore[arg-type]
        checkpoints.resume({}, State())
        try:
            checkpoints.save({"number": number}, State(samples_seen=20))  # type: ignore[dict-item]
        except OSError as error:
            failures[rank] = error.errno

    for number, expected in ((Number(1), {}), (Number(2), {0: errno.ENOSPC, 1: errno.ENOSPC})):
        broken = Number(number.value)
        broken.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if expected else None
        threads = [threading.Thread(target=work, args=(r, n)) for r, n in ((0, number), (1, broken))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == expected
        assert names(tmp_path) == ["000000000020"]
    assert resume(tmp_path) == (20, 1)


def test_other_architecture_or_data_is_refused_in_one_line(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": {"widths": (32, 64), "groups": 8}, "process": {"prediction": "eps"}, "seed": 0}
    began = State(samples_seen=10, architecture=architecture_of(config, {}), data="a" * 64)
    Checkpoints(tmp_path, ALONE, 1).save({}, began)
    same = State(architecture=architecture_of(json.loads(json.dumps({**config, "seed": 1})), {}), data="a" * 64)
    assert Checkpoints(tmp_path, ALONE, 1).resume({}, same).samples_seen == 10

    wider = {**config, "model": {"widths": (64, 64), "groups": 8}}
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path, ALONE, 1).resume({}, State(architecture=architecture_of(wider, {}), data="a" * 64))
    message = str(caught.value)
    assert f"output_dir='{tmp_path}'" in message
    assert "model.widths was [32, 64], is [64, 64]" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="data set was aaaaaaaaaaaa, is bbbbbbbbbbbb"):
        Checkpoints(tmp_path, ALONE, 1).resume({}, State(architecture=began.architecture, data="b" * 64))


def test_done_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(samples_seen=100, seconds=2.5, architecture={"model.widths": [1]}, data="a")
    assert read_done(tmp_path, 100) is None
    write_done(tmp_path, state, {"eval/psnr": 24.0, "eval/other": float("nan")})
    done = read_done(tmp_path, 100)
    assert done is not None
    assert done["metrics"] == {"eval/psnr": 24.0, "eval/other": None}
    assert (done["samples_seen"], done["seconds"]) == (100, 2.5)
    require_same_run(done, state, tmp_path)
    assert read_done(tmp_path, 101) is None  # loop.samples grew
    (tmp_path / "DONE").write_text("{")
    assert read_done(tmp_path, 100) is None
