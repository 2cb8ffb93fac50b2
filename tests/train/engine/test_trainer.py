"""One loop for all trainings: whatever interrupts it, the run that goes on is the run that was never interrupted."""

import errno
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import (
    BatchConfig,
    ClipRun,
    Device,
    EmaConfig,
    LoopConfig,
    OptimConfig,
    RuntimeConfig,
    WandbConfig,
    WandbMode,
)
from train.engine import contents, trainer
from train.engine.contents import Contents
from train.engine.metric_log import MetricLog
from train.engine.runtime import Runtime, Threads, start, stop
from train.engine.state import config_digest
from train.engine.trainable import Trainable
from waits import Waits

SIZE, SAMPLES = 8, 96  # 12 steps


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(RuntimeConfig(device=Device.cpu))
    stop()


class Killed(BaseException):
    """Ends the loop where a SIGKILL would; nothing in the product catches it."""


class Interruption:
    """Calls `act` when the stage gets to `moment` for the n-th time, once."""

    def __init__(self, moment: str, count: int, act: Any) -> None:
        self.moment, self.count, self.act = moment, count, act

    def reach(self, moment: str) -> None:
        if moment == self.moment:
            self.count -= 1
            if self.count == 0:
                self.act()


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Points:
    """Points of a line; a sample is a function of its position."""

    samples = 40

    def __init__(self, content: str = "points") -> None:
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        x = torch.stack([torch.from_numpy(np.random.default_rng(p % 40).standard_normal(3)) for p in positions]).float()
        return {"x": x, "position": torch.tensor(positions), "key": [f"point-{p % 40}" for p in positions]}


class LineStage:
    """A linear network, real optimiser and average included."""

    name, flops_per_sample = "line", 18.0
    extend = staticmethod(dict)

    def __init__(self, cfg: ClipRun, runtime: Runtime, interruption: Interruption | None = None) -> None:
        self.runtime, self.interruption, self.dataset = runtime, interruption, Points()
        torch.manual_seed(cfg.seed)
        ema = EmaConfig(half_life_samples=32)
        self.net = Trainable(runtime, nn.Linear(3, 1), cfg.optim, cfg.batch, SAMPLES, ema=ema, name="net")
        self.trainables = {"net": self.net}
        self.bound_to: dict[str, Any] = {}
        self.evaluations: list[int] = []
        self.poisoned: list[int] = []  # samples seen at which the loss is NaN
        self.heals = False  # the first of them by being met
        self.contents = self.net.contents
        self.net.contents = self.saved_contents  # type: ignore[method-assign]

    def reach(self, moment: str) -> None:
        if self.interruption is not None:
            self.interruption.reach(moment)

    def saved_contents(self) -> Contents:
        self.reach("save")
        return self.contents()

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        self.reach("step")
        x = batch["x"]  # [B, 3]
        loss = (self.net(x)[:, 0] - x.sum(1)).square().mean()
        if samples_seen in self.poisoned:
            loss = loss * float("nan")
            self.poisoned = self.poisoned[self.heals :]
        self.net.backward(loss, last)
        return {"train/loss": loss.detach()}

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        norm = self.net.step(samples_seen)
        return {"train/lr": self.net.lr, "train/grad_norm": norm}

    def evaluate(self, samples_seen: int, journal: MetricLog) -> dict[str, float]:
        self.evaluations.append(samples_seen)
        journal.image("dot", np.zeros((2, 2, 3), np.uint8), samples_seen)
        self.reach("evaluate")
        weights = self.net.weights(ema=True)
        return {"eval/sum": float(sum(w.sum() for w in weights.values()))}

    def export(self, folder: Path) -> None:
        torch.save(self.net.weights(ema=True), folder / "ema.pt")
        torch.save(self.net.weights(), folder / "weights.pt")
        self.reach("export")


def config(folder: Path, micro: int = 0, **loop_options: Any) -> ClipRun:
    options: dict[str, Any] = {
        "samples": SAMPLES,
        "log_every": 20,
        "evaluate_every": 32,
        "checkpoint_every": 24,
        **loop_options,
    }
    return ClipRun(
        run_dir=str(folder),
        name="line",
        output_dir=str(folder / "line"),
        shards="none",
        optim=OptimConfig(lr=0.05, warmup_samples=16),
        batch=BatchConfig(global_batch_size=SIZE, micro_batch_size=micro),
        loop=LoopConfig(**options | loop_options),
        wandb=WandbConfig(mode=WandbMode.disabled),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "line" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    export = folder / "line" / "export"
    return {f"{name}/{k}": v for name in ("ema", "weights") for k, v in torch.load(export / f"{name}.pt").items()}


def equal_to(undisturbed: Path, folder: Path) -> bool:
    expected, found = weights(undisturbed), weights(folder)
    same = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    return same and rows(folder) == rows(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    cfg = config(folder)
    assert trainer.fit(LineStage(cfg, runtime), cfg, runtime).finished
    return folder


def test_lines_stand_where_the_options_say(undisturbed: Path) -> None:
    written = rows(undisturbed)
    assert [r["samples_seen"] for r in written if "train/loss" in r] == [24, 40, 64, 80, 96]
    assert [r["samples_seen"] for r in written if "eval/sum" in r] == [32, 64, 96]
    assert {p.name for p in (undisturbed / "line" / "checkpoints").iterdir()} == {"000000000072", "000000000096"}
    assert len(list((undisturbed / "line" / "samples").iterdir())) == 3
    full = json.loads((undisturbed / "line" / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"images_per_s", "step_ms", "data_wait_share", "memory_gib", "eta_s", "device_hours", "threads"}
    expected |= {"tflops_per_device", "slowest_rank", "slowest_rank_lag", "step_ms_p50", "step_ms_p95", "step_ms_p100"}
    assert {k.removeprefix("perf/") for k in full if k.startswith("perf/")} == expected
    done = json.loads((undisturbed / "line" / "DONE").read_text())
    assert (done["samples_seen"], done["metrics"]) == (96, {"eval/sum": written[-1]["eval/sum"]})


def test_uneven_micro_batches_change_neither_curve_nor_weights(
    tmp_path: Path, undisturbed: Path, runtime: Runtime
) -> None:
    """Eight samples in micro-batches of two, three and three; the logged loss is the mean over the samples."""
    cfg = config(tmp_path, micro=3)
    cfg.batch.uneven = True
    assert trainer.fit(LineStage(cfg, runtime), cfg, runtime).finished
    for found, expected in zip(rows(tmp_path), rows(undisturbed), strict=True):
        timeless = expected.keys() - {"samples", "name"}
        assert {k: found[k] for k in timeless} == pytest.approx({k: expected[k] for k in timeless}, rel=1e-5)
    for name, weight in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, rtol=1e-5, atol=1e-6)


class Seconds:
    """A clock that goes on by so many seconds with each step of a stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: LineStage, per_step: float) -> None:
        step, self.now = stage.micro_step, 1000.0

        def later(*arguments: Any) -> dict[str, Tensor]:
            self.now += per_step
            return step(*arguments)

        monkeypatch.setattr(stage, "micro_step", later)
        monkeypatch.setattr(trainer.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("per_step", "lines", "evaluations", "checkpoints"),
    [
        (1.0, [8, 48, 80, 96], [64, 96], {72, 96}),  # each step one second, of floors of 3.5 and 5, known a step later
        (100.0, list(range(8, 97, 8)), [32, 64, 96], {88, 96}),  # slower than all floors
        (1e-6, [8, 96], [96], {96}),
    ],
)
def test_where_steps_are_fast_seconds_decide_and_the_weights_are_the_same(
    undisturbed: Path,
    tmp_path: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    per_step: float,
    lines: list[int],
    evaluations: list[int],
    checkpoints: set[int],
) -> None:
    floors = {"log_every_s": 3.5, "evaluate_every_s": 5.0, "checkpoint_every_s": 3.5}
    cfg = config(tmp_path, log_every=8, checkpoint_every=8, **floors)
    stage = LineStage(cfg, runtime)
    Seconds(monkeypatch, stage, per_step)
    assert trainer.fit(stage, cfg, runtime).finished
    written = rows(tmp_path)
    assert [r["samples_seen"] for r in written if "train/loss" in r] == lines
    assert [r["samples_seen"] for r in written if "eval/sum" in r] == evaluations
    assert {int(p.name) for p in (tmp_path / "line" / "checkpoints").iterdir()} == checkpoints
    expected, found = weights(undisturbed), weights(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_evaluation_whose_checkpoint_may_be_the_best_has_one(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, checkpoint_every=16, keep_best="eval/sum", keep_checkpoints=9, checkpoint_every_s=1e9)
    stage = LineStage(cfg, runtime)
    assert trainer.fit(stage, cfg, runtime).finished
    assert {int(p.name) for p in (tmp_path / "line" / "checkpoints").iterdir()} == {32, 64, 96}


def test_the_main_process_alone_has_a_clock(tmp_path: Path, runtime: Runtime) -> None:
    """Another one, which says by itself that nothing is ripe, does as it is told."""

    class Second(Runtime):
        def raised(self, flags: Sequence[bool | Tensor]) -> Tensor:
            assert flags[4:] in ([], [False, False, False])
            return super().raised([*flags[:4], *(True for _ in flags[4:])])

        @property
        def is_main(self) -> bool:
            return False

    cfg = config(tmp_path)
    facts = (getattr(runtime, name) for name in Runtime.__slots__)
    stage = LineStage(cfg, Second(*facts))
    stage.export = lambda folder: None  # type: ignore[method-assign]
    assert trainer.fit(stage, cfg, stage.runtime).finished
    assert stage.evaluations == [32, 64, 96]


def test_the_record_names_the_hardware_and_the_digest_of_the_options_does_not(
    undisturbed: Path, runtime: Runtime
) -> None:
    record = OmegaConf.to_container(OmegaConf.load(undisturbed / "line" / "config.yaml"))
    assert isinstance(record, dict)
    hardware = record.pop("hardware")
    assert hardware == runtime.hardware()
    assert hardware.keys() == {"device", "processes", "hosts", "torch"} and "core" in hardware["device"]
    state = json.loads((undisturbed / "line" / "checkpoints" / "000000000096" / "state.json").read_text())
    assert state["config"] == config_digest(record)


def test_threads_are_adjusted_before_each_step(tmp_path: Path, runtime: Runtime) -> None:
    adjusted = list[int]()

    class Noted(Threads):
        def adjust(self) -> None:
            adjusted.append(stage.net.steps)

    cfg = config(tmp_path)
    stage = LineStage(cfg, runtime)
    assert trainer.fit(stage, cfg, replace(runtime, threads=Noted())).finished
    assert adjusted == list(range(SAMPLES // SIZE))


@pytest.mark.parametrize(
    ("act", "moment", "count"),
    [
        (kill, "step", 1),
        (kill, "step", 5),
        (kill, "save", 1),
        (kill, "save", 4),
        (kill, "evaluate", 1),
        (kill, "evaluate", 3),
        (kill, "export", 1),
        (terminate, "step", 5),
        (terminate, "step", 12),
        (terminate, "evaluate", 1),
        (terminate, "evaluate", 3),
    ],
)
def test_interrupted_run_equals_the_uninterrupted_one(
    tmp_path: Path, undisturbed: Path, runtime: Runtime, act: Any, moment: str, count: int
) -> None:
    cfg = config(tmp_path)
    try:
        first = trainer.fit(LineStage(cfg, runtime, Interruption(moment, count, act)), cfg, runtime).finished
    except Killed:
        first = False
    assert first == (act is terminate and (moment, count) == ("evaluate", 3))  # all steps were done
    assert trainer.fit(LineStage(cfg, runtime), cfg, runtime).finished
    assert equal_to(undisturbed, tmp_path)
    assert not list((tmp_path / "line").rglob(".*"))


def test_checkpoint_that_cannot_be_written_ends_the_run_soon(
    tmp_path: Path, undisturbed: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def full_disk(*args: Any) -> Any:
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cfg = config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "write_part", full_disk)
        interruption = Interruption("step", 5, lambda: failed.wait(60))
        with pytest.raises(OSError, match=r"No space left.*checkpoints"):
            trainer.fit(LineStage(cfg, runtime, interruption), cfg, runtime)
    assert rows(tmp_path)[-1]["samples_seen"] <= 40  # before the next checkpoint
    assert list((tmp_path / "line" / "checkpoints").iterdir()) == []
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    assert equal_to(undisturbed, tmp_path)


def test_waiting_for_every_checkpoint_changes_nothing(tmp_path: Path, undisturbed: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, async_checkpoints=False)
    with pytest.raises(Killed):
        trainer.fit(LineStage(cfg, runtime, Interruption("step", 11, kill)), cfg, runtime)
    assert {p.name for p in (tmp_path / "line" / "checkpoints").iterdir()} == {"000000000048", "000000000072"}
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    assert equal_to(undisturbed, tmp_path)


@pytest.mark.parametrize(("step", "end"), [(4, 32), (7, 64)], ids=["beside an evaluation", "one step later"])
def test_signal_ends_after_the_step_with_a_checkpoint_and_asks_for_a_requeue(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, step: int, end: int
) -> None:
    monkeypatch.setenv("REQUEUE_FILE", str(tmp_path / "requeue"))
    before = signal.getsignal(signal.SIGTERM)
    cfg = config(tmp_path)
    outcome = trainer.fit(LineStage(cfg, runtime, Interruption("step", step, terminate)), cfg, runtime)
    assert (outcome.finished, outcome.samples_seen) == (False, end)
    assert (tmp_path / "line" / "checkpoints" / f"{end:012}" / "COMPLETE").exists()
    assert (tmp_path / "requeue").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    stage = LineStage(cfg, runtime)
    trainer.fit(stage, cfg, runtime)
    assert stage.evaluations == [seen for seen in (32, 64, 96) if seen >= end]  # and what the signal left out


def test_finished_stage_returns_at_once_unless_the_run_grew(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, samples=32)
    first = trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    again = LineStage(cfg, runtime)
    capsys.readouterr()
    assert trainer.fit(again, cfg, runtime) == first
    assert "already done at 32 samples" in capsys.readouterr().out
    assert again.evaluations == []
    longer = config(tmp_path, samples=64)
    assert trainer.fit(LineStage(longer, runtime), longer, runtime).samples_seen == 64
    assert [r["samples_seen"] for r in rows(tmp_path) if "eval/sum" in r] == [32, 64]


def test_best_checkpoint_outlives_later_ones(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, evaluate_every=16, checkpoint_every=16, keep_checkpoints=1, keep_best="eval/sum")
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    sums = {r["samples_seen"]: r["eval/sum"] for r in rows(tmp_path) if "eval/sum" in r and r["samples_seen"] < 96}
    best = min(sums, key=lambda seen: sums[seen])
    left = {int(path.name) for path in (tmp_path / "line" / "checkpoints").iterdir()}
    assert left == {best, 96}


def test_other_network_or_data_in_the_folder_is_refused(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, samples=16)
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    for samples in (16, 32):  # finished, and about to grow
        cfg = config(tmp_path, samples=samples)
        cfg.model.embed_dim += 1
        with pytest.raises(UserError, match=r"output_dir=.*model\.embed_dim was"):
            trainer.fit(LineStage(cfg, runtime), cfg, runtime)
        cfg.model.embed_dim -= 1
        stage = LineStage(cfg, runtime)
        stage.dataset = Points("other")
        with pytest.raises(UserError, match="the data set was"):
            trainer.fit(stage, cfg, runtime)


def test_a_run_is_bound_to_what_its_stage_says(tmp_path: Path, runtime: Runtime) -> None:
    def goes_on(samples: int, **bound_to: str) -> bool:
        cfg = config(tmp_path, samples=samples)
        stage = LineStage(cfg, runtime)
        stage.bound_to = bound_to
        return trainer.fit(stage, cfg, runtime).finished

    assert goes_on(16) and goes_on(32, teacher="one", method="lcm")  # of before it was said
    for samples in (32, 48):  # finished, and about to grow
        with pytest.raises(UserError, match=r"began differently \(teacher was one, is two\)"):
            goes_on(samples, teacher="two", method="lcm")
    assert goes_on(48, teacher="one", method="lcm")


def test_the_loop_waits_for_nothing_between_two_lines(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, log_every=SAMPLES, evaluate_every=SAMPLES, checkpoint_every=SAMPLES)
    waits, began, ended = Waits(), list[int](), list[str]()

    class Noted(Threads):
        def adjust(self) -> None:
            began.append(1)
            if len(began) == SAMPLES // SIZE:  # the last step settles, logs and ends the run
                ended.extend(line for line in waits.found if "data/loader.py" not in line)  # the host's own numbers

    stage = LineStage(cfg, runtime)
    with waits.watching():
        assert trainer.fit(stage, cfg, replace(runtime, threads=Noted())).finished
    assert ended == [] and len(waits.found) > 0


def test_a_profile_of_three_steps_is_a_trace_and_a_table(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    cfg.runtime.profile = True
    assert trainer.fit(LineStage(cfg, runtime), cfg, runtime).finished
    table, trace = (tmp_path / "line" / "profile" / f"rank-00000.{ending}" for ending in ("txt", "json"))
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile")]
    assert re.search(r"3 steps in \d\.\d{3} s: ", told) and str(table) in told and str(trace) in told
    assert "aten::addmm" in table.read_text() and table.read_text().startswith("3 steps in ")
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::addmm") == 3


def test_a_gpu_that_is_too_small_is_told_in_one_line(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a capacity of 79 GiB")

    cfg = config(tmp_path)
    monkeypatch.setattr(LineStage, "micro_step", full)
    expected = r"^line: batch\.micro_batch_size=8 is too much .* 2\.50 GiB was asked for; set batch\.micro_batch_size=4"
    with pytest.raises(UserError, match=expected):
        trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    monkeypatch.setattr(LineStage, "name", "clip")  # which takes no part of a batch at a time
    with pytest.raises(UserError, match=r"was asked for; set a lower batch\.global_batch_size or runtime"):
        trainer.fit(LineStage(cfg, runtime), cfg, runtime)


def test_a_profile_that_cannot_be_written_ends_no_training(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    cfg.runtime.profile = True
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "profile").write_text("a file where the folder should be")
    assert trainer.fit(LineStage(cfg, runtime), cfg, runtime).finished
    assert "profile     not written: " in capsys.readouterr().out


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path)
    stage = LineStage(cfg, runtime)
    stage.poisoned = [40]
    assert trainer.fit(stage, cfg, runtime).finished
    assert [r["train/skipped_steps"] for r in rows(tmp_path) if "train/loss" in r] == [0, 0, 1, 1, 1]
    assert all(r["train/loss"] is not None for r in rows(tmp_path) if "train/loss" in r)
    assert all(bool(w.isfinite().all()) for w in stage.net.weights().values())


class BesideAnUnsound(Runtime):
    """One of several processes, another of which finds its loss in the first step not finite."""

    others: ClassVar = [1.0]  # whether their losses are unsound, step by step

    def raised(self, flags: Sequence[bool | Tensor]) -> Tensor:
        found = super().raised(flags)
        found[3] += self.others.pop(0) if len(flags) > 1 and self.others else 0
        return found


def test_what_one_process_leaves_out_of_the_means_all_leave_out(tmp_path: Path, runtime: Runtime) -> None:
    """The means are summed by place: names that one process alone had would shift those of the others."""
    cfg = config(tmp_path, log_every=8)
    facts = (getattr(runtime, name) for name in Runtime.__slots__)
    assert trainer.fit(LineStage(cfg, runtime), cfg, BesideAnUnsound(*facts)).finished
    losses = ["train/loss" in row for row in rows(tmp_path) if "train/lr" in row]
    assert losses == [False] + [True] * 11


def test_many_in_a_row_go_back_to_the_checkpoint_once_and_then_name_the_samples(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, most_skipped_steps=2)
    stage = LineStage(cfg, runtime)
    stage.poisoned = [32, 40]  # the checkpoint before is at 24
    with pytest.raises(UserError, match=r"the losses of point-\d+, .* and more were .*2 steps in a row .*=48: lower"):
        trainer.fit(stage, cfg, runtime)
    assert capsys.readouterr().out.count("back to the last checkpoint") == 1
    assert not (tmp_path / "line" / "DONE").exists()
    sound = LineStage(cfg, runtime)
    assert trainer.fit(sound, cfg, runtime).finished


def test_checkpoints_made_meanwhile_give_the_same_fault_no_second_chance(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, samples=400, most_skipped_steps=5)  # one of whose steps falls on each checkpoint
    stage = LineStage(cfg, runtime)
    stage.poisoned = list(range(32, 400, 8))
    with pytest.raises(UserError, match="not finite in 5 steps in a row"):
        trainer.fit(stage, cfg, runtime)
    assert capsys.readouterr().out.count("back to the last checkpoint, once") == 1
    assert not (tmp_path / "line" / "DONE").exists() and not (tmp_path / "line" / "export").exists()


@pytest.mark.parametrize("most", [5, 100], ids=["back and again", "to the end"])
def test_a_training_that_learned_nothing_is_no_finished_one(tmp_path: Path, runtime: Runtime, most: int) -> None:
    cfg = config(tmp_path, most_skipped_steps=most)
    for _ in range(2):  # the second start finds checkpoints, the last of them at the end of the run
        stage = LineStage(cfg, runtime)
        stage.poisoned = list(range(0, 96, 8))
        with pytest.raises(UserError, match=r"nothing was learned, no step was finite|not finite in 5 steps in a row"):
            trainer.fit(stage, cfg, runtime)
        assert not (tmp_path / "line" / "DONE").exists() and not (tmp_path / "line" / "export").exists()


def test_a_last_evaluation_without_a_number_is_no_end(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path)
    monkeypatch.setattr(LineStage, "evaluate", lambda *_: {"eval/sum": float("nan")})
    for _ in range(2):  # the second one finds it in the journal
        with pytest.raises(UserError, match=r"no value of the last evaluation is finite \(eval/sum\)"):
            trainer.fit(LineStage(cfg, runtime), cfg, runtime)
        assert not (tmp_path / "line" / "DONE").exists() and not (tmp_path / "line" / "export").exists()


def test_a_fault_that_does_not_come_again_leaves_no_trace(tmp_path: Path, undisturbed: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, most_skipped_steps=2)
    stage = LineStage(cfg, runtime)
    stage.poisoned, stage.heals = [32, 40], True
    assert trainer.fit(stage, cfg, runtime).finished
    assert rows(tmp_path) == rows(undisturbed)
    assert all(torch.equal(found, weights(undisturbed)[name]) for name, found in weights(tmp_path).items())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, most_skipped_steps=1)
    stage = LineStage(cfg, runtime)
    stage.poisoned, stage.heals = [8], True
    with pytest.raises(UserError, match="1 steps in a row up to samples_seen=16"):
        trainer.fit(stage, cfg, runtime)
    assert all(bool(w.isfinite().all()) for w in stage.net.weights().values())


def test_micro_batches_change_no_metric(tmp_path: Path, undisturbed: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path, micro=2)
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    for ours, whole in zip(rows(tmp_path), rows(undisturbed), strict=True):
        assert ours.keys() == whole.keys()
        assert all(ours[name] == pytest.approx(whole[name], rel=1e-4) for name in whole)


def test_data_set_smaller_than_a_batch_is_refused(tmp_path: Path, runtime: Runtime) -> None:
    cfg = config(tmp_path)
    cfg.batch.global_batch_size = 48
    with pytest.raises(UserError, match=r"batch\.global_batch_size"):
        trainer.fit(LineStage(cfg, runtime), cfg, runtime)


def test_metrics_reach_wandb_against_samples_seen(tmp_path: Path, runtime: Runtime, wandb_history: Any) -> None:
    cfg = config(tmp_path)
    cfg.wandb.mode = WandbMode.offline
    trainer.fit(LineStage(cfg, runtime), cfg, runtime)
    merged: dict[int, dict[str, Any]] = {}
    for row in rows(tmp_path):
        merged.setdefault(row["samples_seen"], {}).update(row)
    dashboard = wandb_history(tmp_path / "line")
    assert [row["samples_seen"] for row in dashboard] == list(merged)
    assert all(row[k] == pytest.approx(v) for row in dashboard for k, v in merged[row["samples_seen"]].items())
    assert all("perf/images_per_s" in row for row in dashboard if "train/loss" in row)
