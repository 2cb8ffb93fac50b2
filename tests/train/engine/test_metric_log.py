"""The record of a run: the file is the truth, W&B is a faithful copy that may fail."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.errors import UserError
from conf.schema import WandbConfig, WandbMode
from train.engine import metric_log as journal_module
from train.engine.metric_log import METRICS, MetricLog, read_config, read_metrics, wandb_mode

OFF = WandbConfig(mode=WandbMode.disabled)
OFFLINE = WandbConfig(mode=WandbMode.offline)


class Opener:
    """Opens journals of one stage; those that a test leaves open (as a kill would) are closed after it."""

    def __init__(self) -> None:
        self.journals: list[MetricLog] = []

    def __call__(self, folder: Path, cfg: WandbConfig = OFF, samples_seen: int = 0, is_main: bool = True) -> MetricLog:
        self.journals.append(MetricLog(folder, cfg, "unet", {"run_dir": "runs/x", "seed": 3}, is_main, samples_seen))
        return self.journals[-1]


@pytest.fixture
def open_journal() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    for journal in opener.journals:
        journal.finish()


def rows(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    return [
        (r["samples_seen"], {k: v for k, v in r.items() if k not in ("samples_seen", "time")})
        for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path: Path, open_journal: Opener) -> None:
    journal = open_journal(tmp_path)
    for seen in (10, 20, 30):
        journal.log(seen, {"train/loss": 1 / seen})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"samples_seen": 40, "trai')  # a kill in the middle of a write
    resumed = open_journal(tmp_path, samples_seen=20)
    resumed.log(30, {"train/loss": 0.5})
    assert rows(tmp_path) == [(10, {"train/loss": 0.1}), (20, {"train/loss": 0.05}), (30, {"train/loss": 0.5})]


def test_lines_are_on_disk_at_once_and_are_json(tmp_path: Path, open_journal: Opener) -> None:
    journal = open_journal(tmp_path)
    journal.log(10, {"eval/psnr": float("inf"), "eval/loss": float("nan"), "eval/ssim": 0.5})
    assert rows(tmp_path) == [(10, {"eval/psnr": None, "eval/loss": None, "eval/ssim": 0.5})]
    assert journal.recorded(10)["eval/ssim"] == 0.5
    assert journal.recorded(20) == {}
    assert open_journal(tmp_path, samples_seen=10).recorded(10).keys() == {"eval/psnr", "eval/loss", "eval/ssim"}


def test_reading_ends_at_what_is_no_row(tmp_path: Path) -> None:
    sound = '{"samples_seen": 16, "train/loss": NaN}\n'
    assert read_metrics(tmp_path / METRICS) == []
    rests = ('{"samples_se', "\x00\x00\n", "3\n", "[]\n", '{"train/loss": 1}\n', '{"samples_seen": null}\n', "é")
    for rest in rests:
        (tmp_path / METRICS).write_bytes((sound + rest).encode("latin-1"))
        assert read_metrics(tmp_path / METRICS) == [{"samples_seen": 16, "train/loss": None}]


@pytest.mark.parametrize("content", [None, "", "[1, 2", "3", "a: b: c"])
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    if content == "":
        assert not read_config(tmp_path)
        return
    with pytest.raises(UserError, match=r"config\.yaml is missing or no configuration of a stage"):
        read_config(tmp_path)


def test_other_processes_write_nothing(tmp_path: Path, open_journal: Opener) -> None:
    journal = open_journal(tmp_path / "stage", OFFLINE, is_main=False)
    journal.log(10, {"train/loss": 1.0})
    journal.image("grid", np.zeros((4, 4, 3), np.uint8), 10)
    journal.finish()
    assert not (tmp_path / "stage").exists()


def test_console_line_is_one_line_with_the_metrics(
    tmp_path: Path, open_journal: Opener, capsys: pytest.CaptureFixture[str]
) -> None:
    perf = {"perf/images_per_s": 64.0, "perf/eta_s": 3725.0, "perf/step_ms": 10.0}
    open_journal(tmp_path).log(12_800, {"train/loss": 0.25, "train/lr": 1e-4, "train/grad_norm": 1.5, **perf})
    (line,) = capsys.readouterr().out.splitlines()
    assert " ".join(line.split()) == "unet 12,800 loss 0.25 lr 0.0001 grad_norm 1.5 64 images/s 1:02:05 left"


def test_offline_wandb_says_what_the_file_says_and_a_resume_continues_the_run(
    tmp_path: Path, open_journal: Opener, wandb_history: Any
) -> None:
    first = open_journal(tmp_path, OFFLINE)
    first.log(10, {"train/loss": 0.5})
    first.log(10, {"eval/psnr": 20.0})
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    first.image("grid", pixels, 10, "a red planet")
    first.log(20, {"train/loss": 0.25})
    first.finish()
    written = wandb_history(tmp_path)
    assert [(r["samples_seen"], r["train/loss"]) for r in written] == [(10, 0.5), (20, 0.25)]
    assert written[0]["eval/psnr"] == 20.0
    assert written[0]["samples/grid/caption"] == "a red planet"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "grid-000000000010.png")), pixels)

    second = open_journal(tmp_path, OFFLINE, samples_seen=10)
    second.log(20, {"train/loss": 0.125})
    second.finish()
    assert second.run_id == first.run_id == (tmp_path / "wandb_run_id").read_text()
    # The whole run stands in the newest log: the earlier one may have lost its tail to a kill.
    assert [(r["samples_seen"], r["train/loss"]) for r in wandb_history(tmp_path)] == [(10, 0.5), (20, 0.125)]


def test_the_line_for_wandb_can_be_copied_into_a_shell(
    tmp_path: Path, open_journal: Opener, capsys: pytest.CaptureFixture[str]
) -> None:
    open_journal(tmp_path / "my (1) 'runs' & $co", OFFLINE).finish()
    copied = capsys.readouterr().out.partition("upload with: ")[2].strip().removesuffix(")")
    program, command, folder = shlex.split(copied)
    assert (program, command) == ("wandb", "sync") and Path(folder).is_relative_to(tmp_path / "my (1) 'runs' & $co")


@pytest.mark.parametrize(
    ("chosen", "group", "name"),
    [({}, "x", "x/unet"), ({"group": "x/sweep", "name": "optim.lr=1e-4"}, "x/sweep", "optim.lr=1e-4")],
    ids=["alone", "member of a sweep"],
)
def test_wandb_shows_together_what_belongs_together(
    tmp_path: Path, open_journal: Opener, chosen: dict[str, str], group: str, name: str
) -> None:
    journal = open_journal(tmp_path, WandbConfig(mode=WandbMode.offline, **chosen))
    assert journal.wandb is not None and journal.wandb.run is not None
    assert (journal.wandb.run.group, journal.wandb.run.name) == (group, name)


def test_unreachable_server_costs_one_warning_and_the_run_goes_on_offline(
    tmp_path: Path,
    open_journal: Opener,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wandb_history: Any,
) -> None:
    import wandb

    wandb.teardown()  # so that it reads the environment again
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(journal_module, "WANDB_INIT_TIMEOUT_S", 2.0)
    journal = open_journal(tmp_path, WandbConfig(mode=WandbMode.online))
    journal.log(10, {"train/loss": 0.5})
    journal.finish()
    printed = capsys.readouterr()
    assert printed.err.count("warning: W&B") == 1
    assert "0" * 40 not in printed.out + printed.err
    assert rows(tmp_path) == [(10, {"train/loss": 0.5})]
    assert [r["train/loss"] for r in wandb_history(tmp_path)] == [0.5]


def test_wandb_that_breaks_later_never_stops_the_run(
    tmp_path: Path,
    open_journal: Opener,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = open_journal(tmp_path, OFFLINE)
    assert journal.wandb is not None and journal.wandb.run is not None

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.wandb.run, "log", fail)
    for seen in (10, 20, 30):
        journal.log(seen, {"train/loss": 1.0})
        journal.image("grid", np.zeros((4, 4, 3), np.uint8), seen)
    journal.finish()
    assert [seen for seen, _ in rows(tmp_path)] == [10, 20, 30]
    assert capsys.readouterr().err.count("warning: W&B") == 1


def test_auto_is_online_only_when_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode(WandbMode.auto) is WandbMode.offline
    netrc.write_text("machine example.org login user password secret\n")
    assert wandb_mode(WandbMode.auto) is WandbMode.offline
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(WandbMode.auto) is WandbMode.online
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbMode.auto) is WandbMode.disabled
    assert wandb_mode(WandbMode.offline) is WandbMode.offline  # what the options say is stronger
    monkeypatch.delenv("WANDB_MODE")
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(WandbMode.auto) is WandbMode.online


def test_config_yaml_is_the_resolved_configuration(tmp_path: Path, open_journal: Opener) -> None:
    open_journal(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "run_dir: runs/x\nseed: 3\n"
    assert read_metrics(tmp_path / "absent.jsonl") == []
