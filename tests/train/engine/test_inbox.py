"""What an evaluation leaves for a training reaches the training's W&B run, once per start, and not its own file."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conf.schema import WandbConfig, WandbMode
from train.engine.inbox import Inbox, Message, put
from train.engine.metric_log import MetricLog

OFFLINE = WandbConfig(mode=WandbMode.offline)


def journal(folder: Path, samples_seen: int = 0) -> MetricLog:
    return MetricLog(folder, OFFLINE, "unet", {"run_dir": "runs/x"}, True, samples_seen)


def message(tmp_path: Path, seen: int, value: float | None) -> Message:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    return Message(seen, {"eval/fid": value, "eval/kid": None}, "evaluation", str(tmp_path / "grid.png"))


def test_metrics_and_image_stand_in_the_trainings_run(tmp_path: Path, wandb_history: Any) -> None:
    folder = tmp_path / "unet"
    first = journal(folder)
    first.log(10, {"train/loss": 0.5})
    put(folder, message(tmp_path, 10, 30.0))
    first.log(20, {"train/loss": 0.25})
    put(folder, message(tmp_path, 20, 20.0))  # while the training writes its last checkpoint
    first.finish()
    rows = wandb_history(folder)
    assert [(row["samples_seen"], row["eval/fid"]) for row in rows if "eval/fid" in row] == [(10, 30.0), (20, 20.0)]
    assert sum(any(name.startswith("samples/evaluation") for name in row) for row in rows) == 2
    assert not any("eval/kid" in row for row in rows)
    assert [(r["samples_seen"], r["train/loss"]) for r in rows if "train/loss" in r] == [(10, 0.5), (20, 0.25)]
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in written] == [0.5, 0.25]

    again = journal(folder, samples_seen=20)  # its offline log begins empty
    again.log(30, {"train/loss": 0.125})
    again.finish()
    assert [row["eval/fid"] for row in wandb_history(folder) if "eval/fid" in row] == [30.0, 20.0]


def test_message_that_cannot_be_read_does_not_stop_the_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, message(tmp_path, 10, 30.0))
    (tmp_path / "inbox" / "000000000010-evaluation.json").write_text('{"of": "another version"}')
    training = journal(tmp_path)
    training.log(20, {"train/loss": 0.5})
    training.finish()
    assert capfd.readouterr().err.startswith("warning: W&B: ")
    assert '"train/loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_message_is_new_until_it_was_read_and_again_when_it_changes(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    assert inbox.new() == []
    put(tmp_path, message(tmp_path, 10, 1.0))
    assert [m.metrics["eval/fid"] for m in inbox.new()] == [1.0]
    assert inbox.new() == []
    put(tmp_path, message(tmp_path, 5, 2.0))
    put(tmp_path, message(tmp_path, 10, 3.0))
    assert [(m.samples_seen, m.metrics["eval/fid"]) for m in inbox.new()] == [(5, 2.0), (10, 3.0)]
