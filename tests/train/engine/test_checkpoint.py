"""Checkpoints are whole or not there, and belong to the run that continues from them."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from safetensors.torch import load_file

from conf.errors import UserError
from conf.schema import LoopConfig, Precision
from train.engine import checkpoint as checkpoint_module
from train.engine import contents as contents_module
from train.engine.backend.layout import Members, Piece, cut_over, whole
from train.engine.checkpoint import Checkpoints
from train.engine.contents import Contents, TensorFile, read_into, write_part
from train.engine.runtime import Runtime
from train.engine.state import State, architecture_of, read_done, require_same_run, write_done

ALONE = Runtime(0, 1, 0, torch.device("cpu"), Precision.fp32, None)  # type: ignore[arg-type]


class Number:
    """The smallest trainable: one value, of one or of several processes."""

    def __init__(self, value: int = 0, processes: int = 1, rank: int = 0) -> None:
        self.value = torch.full((100,), float(value))
        self.members, self.made = Members(processes, rank), 0  # files whose bytes were asked for to the end

    def file(self, names: Iterable[str] = ("all", "one")) -> TensorFile:
        tensors = {name: self.value if name == "all" else self.value[:1] for name in names}
        file = TensorFile(whole(tensors, ALONE.device, self.members), list(tensors.values()), {})
        made = file.made

        def counted() -> Iterator[Any]:
            yield from made()
            self.made += 1

        file.made = counted  # type: ignore[method-assign]
        return file

    def contents(self) -> Contents:
        return Contents({"number/weights": self.file()}, {"number/about.json": {}})

    def load(self, folder: Path) -> None:
        self.value = load_file(folder / "number" / "weights")["all"]


def keeping(keep: int = 10, **options: Any) -> LoopConfig:
    return LoopConfig(keep_checkpoints=keep, **options)


def save(folder: Path, *samples: int, keep: int = 10) -> None:
    for seen in samples:
        number: Any = {"number": Number(seen // 10)}
        Checkpoints(folder, ALONE, keeping(keep)).save(number, State(samples_seen=seen))


def resume(folder: Path, fresh: State | None = None) -> tuple[int, int]:
    number = Number()
    state = Checkpoints(folder, ALONE, keeping()).resume({"number": number}, fresh or State())  # type: ignore[dict-item]
    return state.samples_seen, int(number.value[0])


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
        lambda c: (c / "number" / "weights").write_bytes((c / "number" / "weights").read_bytes()[:-1]),
        lambda c: (c / "number" / "weights").write_bytes((c / "number" / "weights").read_bytes()[:-1] + b"!"),
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
    checkpoints = Checkpoints(tmp_path, ALONE, keeping(2))
    checkpoints.resume(number, State())
    checkpoints.save(number, State(samples_seen=35))
    assert names(tmp_path) == ["000000000020", "000000000035"]


def test_copies_of_power_function_averages_outlive_their_checkpoints(tmp_path: Path) -> None:
    class Averaged(Number):
        def contents(self) -> Contents:
            return Contents({f"number/{name}": self.file(["all"]) for name in ("weights", "posthoc-0.1")}, {})

    def copies() -> list[str]:
        return sorted(path.name for path in (tmp_path / "averages").iterdir())

    checkpoints = Checkpoints(tmp_path, ALONE, keeping(1))
    for seen in (10, 20, 30):
        checkpoints.save({"number": Averaged(seen)}, State(samples_seen=seen))  # type: ignore[dict-item]
    assert names(tmp_path) == ["000000000030"]
    assert copies() == ["000000000010", "000000000020", "000000000030"]
    kept = tmp_path / "averages" / "000000000010" / "number"
    assert [path.name for path in kept.iterdir()] == ["posthoc-0.1"]
    assert load_file(kept / "posthoc-0.1")["all"][0] == 10
    save(tmp_path, 40)
    (tmp_path / "averages" / "000000000050").mkdir()  # of a checkpoint that a kill prevented
    assert resume(tmp_path) == (40, 4)
    assert copies() == ["000000000010", "000000000020", "000000000030"]


def full_disk(path: Path, size: int, part: Any, pieces: Iterator[Any]) -> Any:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    next(pieces)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("wait", [True, False], ids=["at once", "in the background"])
def test_full_disk_leaves_the_previous_checkpoint_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    save(tmp_path, 10, keep=1)
    monkeypatch.setattr(contents_module, "write_part", full_disk)
    with (
        Checkpoints(tmp_path, ALONE, keeping(1)) as checkpoints,
        pytest.raises(OSError, match="No space left") as caught,
    ):
        checkpoints.save({"number": Number(2)}, State(samples_seen=20), wait)  # type: ignore[dict-item]
        wait_for(lambda: checkpoints.failed)
        checkpoints.save({"number": Number(3)}, State(samples_seen=30), wait)  # type: ignore[dict-item]
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert not checkpoints.failed  # it was told once
    assert names(tmp_path) == ["000000000010"]
    assert resume(tmp_path) == (10, 1)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held back; what happens to the weights meanwhile does not reach the checkpoint."""
    go_on, number = threading.Event(), Number(1)

    def slowly(*args: Any) -> Any:
        assert go_on.wait(60)
        return write_part(*args)

    monkeypatch.setattr(contents_module, "write_part", slowly)
    state = State(samples_seen=10)
    with Checkpoints(tmp_path, ALONE, keeping(2)) as checkpoints:
        checkpoints.save({"number": number}, state, wait=False)  # type: ignore[dict-item]
        number.value.fill_(5)
        state.samples_seen = 50
        wait_for((tmp_path / "checkpoints" / ".tmp-000000000010").is_dir)
        assert names(tmp_path) == [".tmp-000000000010"] and checkpoints.writing
        go_on.set()
        checkpoints.wait()
        assert names(tmp_path) == ["000000000010"]
        number.value.fill_(2)
        checkpoints.save({"number": number}, State(samples_seen=20), wait=False)  # type: ignore[dict-item]
        number.value.fill_(3)
        checkpoints.save({"number": number}, State(samples_seen=30), wait=True)  # type: ignore[dict-item]
        assert names(tmp_path) == ["000000000020", "000000000030"]
        checkpoints.save({"number": Number(4)}, State(samples_seen=40), wait=False)  # type: ignore[dict-item]
    assert names(tmp_path) == ["000000000030", "000000000040"]  # leaving it waits, too
    assert resume(tmp_path) == (40, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "000000000040")
    assert resume(tmp_path) == (30, 3)


def killed_in(folder: Path, moment: str) -> None:
    """Save two checkpoints in the background, the second of which never gets past `moment`."""

    def kill(path: Path, *rest: Any) -> Any:
        if moment == "write_part":
            path.parent.mkdir()
        if moment != "publish_folder":
            path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with Checkpoints(folder, ALONE, keeping(1)) as checkpoints:
        checkpoints.save({"number": Number(1)}, State(samples_seen=10), wait=False)  # type: ignore[dict-item]
        checkpoints.wait()
        setattr(contents_module if moment == "write_part" else checkpoint_module, moment, kill)
        checkpoints.save({"number": Number(2)}, State(samples_seen=20), wait=False)  # type: ignore[dict-item]


@pytest.mark.parametrize("moment", ["write_part", "write_bytes", "publish_folder"])
def test_kill_during_the_write_leaves_the_previous_checkpoint(tmp_path: Path, moment: str) -> None:
    process = get_context("fork").Process(target=killed_in, args=(tmp_path, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / ".tmp-000000000020").exists()
    assert resume(tmp_path) == (10, 1)
    assert names(tmp_path) == ["000000000010"]


def test_what_a_kill_left_is_cleared_by_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / ".tmp-000000000020").mkdir()
    assert resume(tmp_path) == (10, 1)
    assert names(tmp_path) == ["000000000010"]


@pytest.mark.parametrize("wait", [True, False], ids=["at once", "in the background"])
def test_failure_of_one_process_is_the_failure_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """Two processes, played by threads: one cannot write, and both hear of it."""
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

    def write(path: Path, size: int, part: tuple[int, int], pieces: Iterator[Any]) -> Any:
        return (full_disk if part[0] > 0 else write_part)(path, size, part, pieces)

    def work(rank: int, number: Number) -> None:
        with Checkpoints(tmp_path, Rank(rank), keeping(2)) as checkpoints:  # type: ignore[arg-type]
            checkpoints.resume({}, State())
            try:
                checkpoints.save({"number": number}, State(samples_seen=20), wait)  # type: ignore[dict-item]
                checkpoints.wait()
            except OSError as error:
                failures[rank] = error.errno

    monkeypatch.setattr(contents_module, "ALIGNMENT", 64)  # or one of them would have all
    monkeypatch.setattr(contents_module, "ROUND", 64)
    for expected in ({}, {0: errno.ENOSPC, 1: errno.ENOSPC}):
        if expected:
            monkeypatch.setattr(contents_module, "write_part", write)
        numbers = [Number(1 + len(expected), 2, rank) for rank in range(2)]
        threads = [threading.Thread(target=work, args=(rank, number)) for rank, number in enumerate(numbers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == expected
        assert [number.made for number in numbers] == [1, 1]  # or one would wait for the other
        assert names(tmp_path) == ["000000000020"]
    assert resume(tmp_path) == (20, 1)


class Shared(Number):
    """A value that several processes have a piece of each."""

    def __init__(self, value: int, processes: int, rank: int) -> None:
        super().__init__(value)
        rows = -(-100 // processes)
        begin = rows * rank
        self.value = torch.full((min(rows, 100 - begin),), float(value))
        piece = {"all": Piece(0, 0, begin, len(self.value))}
        members = Members(processes, rank)
        self.layout = cut_over(members, Members(), {"all": torch.Size([100])}, piece, ALONE.device)

    def contents(self) -> Contents:
        return Contents({"number/weights": TensorFile(self.layout, [self.value], {})}, {"number/about.json": {}})

    def load(self, folder: Path) -> None:
        read_into(folder / "number" / "weights", self.layout, [self.value], {})


def one_of_several(folder: Path, processes: int, rank: int, killed: int | None, wait: bool) -> None:
    """Saves, and saves again, which one of the processes does not live to see; without such a one resumes."""
    # The parent may be in a group already, whose threads a fork does not have: it is left alone.
    inherited = c10d._world
    c10d._world, c10d.GroupMember.WORLD = c10d._World(), None
    store = dist.FileStore(str(folder.with_name(f"store-{processes}")), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    assert c10d._world is not inherited
    runtime = Runtime(rank, processes, 0, ALONE.device, Precision.fp32, None)  # type: ignore[arg-type]
    number: Any = {"number": Shared(0 if killed is None else 1, processes, rank)}
    with Checkpoints(folder, runtime, keeping()) as checkpoints:
        if killed is None:
            assert checkpoints.resume(number, State()).samples_seen == 10
            assert number["number"].value.eq(1).all()
            checkpoints.save(number, State(samples_seen=30))
            return
        checkpoints.save(number, State(samples_seen=10))
        number["number"].value.fill_(2)
        if rank == killed:
            contents_module.write_part = lambda path, *rest: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(number, State(samples_seen=20), wait)
        checkpoints.wait()


def ended(folder: Path, processes: int, killed: int | None, wait: bool) -> list[int | None]:
    """Exit codes of several processes; those that outlive one of them end too, as their launcher would have them."""
    arguments = [(folder, processes, rank, killed, wait) for rank in range(processes)]
    running = [get_context("fork").Process(target=one_of_several, args=each) for each in arguments]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode is not None
    return [process.exitcode for process in running]


@pytest.mark.parametrize("wait", [True, False], ids=["at once", "in the background"])
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_kill_of_any_process_in_its_part_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, wait: bool
) -> None:
    monkeypatch.setattr(contents_module, "ALIGNMENT", 64)  # or one of them would have all
    monkeypatch.setattr(contents_module, "ROUND", 64)
    folder = tmp_path / "run"
    codes = ended(folder, 3, killed, wait)
    assert codes[killed] == -signal.SIGKILL and 0 not in codes
    assert set(names(folder)) <= {"000000000010", ".tmp-000000000020"}
    assert ended(folder, 2, None, wait) == [0, 0]  # in another layout
    assert names(folder) == ["000000000010", "000000000030"]
    parts = json.loads((folder / "checkpoints" / "000000000030" / "COMPLETE").read_text())["files"]["number/weights"]
    assert len(parts[1]) == 2, "one of them has written all"
    assert load_file(folder / "checkpoints" / "000000000030" / "number" / "weights")["all"].eq(1).all()


def test_other_architecture_or_data_is_refused_in_one_line(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": {"widths": (32, 64), "groups": 8}, "process": {"prediction": "eps"}, "seed": 0}
    began = State(samples_seen=10, architecture=architecture_of(config, {}), data="a" * 64)
    Checkpoints(tmp_path, ALONE, keeping(1)).save({}, began)
    same = State(architecture=architecture_of(json.loads(json.dumps({**config, "seed": 1})), {}), data="a" * 64)
    assert Checkpoints(tmp_path, ALONE, keeping(1)).resume({}, same).samples_seen == 10

    wider = {**config, "model": {"widths": (64, 64), "groups": 8}}
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path, ALONE, keeping(1)).resume(
            {}, State(architecture=architecture_of(wider, {}), data="a" * 64)
        )
    message = str(caught.value)
    assert f"output_dir='{tmp_path}'" in message
    assert "model.widths was [32, 64], is [64, 64]" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="data set was aaaaaaaaaaaa, is bbbbbbbbbbbb"):
        Checkpoints(tmp_path, ALONE, keeping(1)).resume({}, State(architecture=began.architecture, data="b" * 64))


def test_done_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(samples_seen=100, seconds=2.5, architecture={"model.widths": [1]}, data="a")
    assert read_done(tmp_path, 100) is None
    write_done(tmp_path, state, {"eval/psnr": 24.0, "eval/other": float("nan")})
    done = read_done(tmp_path, 100)
    assert done is not None
    assert done["metrics"] == {"eval/psnr": 24.0, "eval/other": pytest.approx(float("nan"), nan_ok=True)}
    assert (done["samples_seen"], done["seconds"]) == (100, 2.5)
    require_same_run(done, state, tmp_path)
    assert read_done(tmp_path, 101) is None  # loop.samples grew
    (tmp_path / "DONE").write_text("{")
    assert read_done(tmp_path, 100) is None
