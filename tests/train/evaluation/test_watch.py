"""Evaluation beside a training: every checkpoint once, by its average, in the training's own W&B run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from train.engine.runtime import Runtime
from train.evaluation import run as evaluate
from train.evaluation import watch
from train.evaluation.in_training import evaluate_in_loop, small_evaluation
from train.sampling.load import load_model

SMALL = ["prompt_following=false", "clip_score=null", "samples=4", "watch=true", "watch_s=0.01", "bootstrap=0"]


@pytest.fixture
def live(project: Any, tmp_path: Path) -> Path:
    """The U-Net's folder as it was before its end: no DONE, no export, its last checkpoint and a second one."""
    folder = tmp_path / "unet"
    shutil.copytree(project.folder / "unet", folder)
    shutil.move(folder / "DONE", tmp_path / "DONE")
    shutil.move(folder / "export", tmp_path / "export")
    (last,) = (folder / "checkpoints").iterdir()
    shutil.copytree(last, folder / "checkpoints" / "000000000480")
    (folder / "checkpoints" / ".tmp-000000000720").mkdir()  # one that is being written
    return folder


def config(project: Any, tmp_path: Path, *overrides: str) -> Any:
    return project.config("evaluate", f"output_dir={tmp_path}/out", f"unet={tmp_path}/unet/export", *SMALL, *overrides)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_are_evaluated_until_the_training_ends(
    project: Any, runtime: Runtime, tmp_path: Path, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        """The training ends while the evaluation waits."""
        naps.append(seconds)
        shutil.move(tmp_path / "export", live / "export")
        shutil.move(tmp_path / "DONE", live / "DONE")

    monkeypatch.setattr(watch.time, "sleep", nap)
    metrics = watch.watch(config(project, tmp_path), runtime)
    assert naps == [0.01]
    found = rows(tmp_path)
    assert [row["samples_seen"] for row in found] == [960, 480]  # the newest first; its weights are the export's
    assert found[0]["eval/fd_efficientnet"] == pytest.approx(found[1]["eval/fd_efficientnet"])
    left = [json.loads(path.read_text()) for path in sorted((live / "inbox").iterdir())]
    assert [message["samples_seen"] for message in left] == [480, 960]
    assert left[1]["metrics"] == {k: v for k, v in found[0].items() if k not in ("samples_seen", "time")}
    assert Path(left[1]["image"]).is_file()
    newest = json.loads((tmp_path / "out" / "metrics.json").read_text())  # although an older one came after it
    assert newest == metrics == {k: v for k, v in found[0].items() if k not in ("samples_seen", "time")}
    assert not (tmp_path / "out" / "wandb").exists()  # two writers of one run overwrite each other
    finished = evaluate.evaluate_run(config(project, tmp_path, "watch=false", f"output_dir={tmp_path}/export"), runtime)
    assert found[0]["eval/fd_efficientnet"] == pytest.approx(finished["eval/fd_efficientnet"], rel=1e-4)
    assert metrics["eval/fd_efficientnet"] == pytest.approx(finished["eval/fd_efficientnet"], rel=1e-4)


def test_export_is_evaluated_if_its_checkpoint_was_not(
    project: Any, runtime: Runtime, tmp_path: Path, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is gone when the evaluation comes to it; an older one was evaluated."""
    (live / "checkpoints" / "000000000960" / "unet" / "ema.safetensors").unlink()
    monkeypatch.setattr(watch, "evaluate", lambda *given: {"seen": given[-1]})
    monkeypatch.setattr(watch, "evaluate_run", lambda *_: {"seen": "export"})
    monkeypatch.setattr(watch.time, "sleep", lambda _: shutil.move(tmp_path / "DONE", live / "DONE"))
    assert watch.watch(config(project, tmp_path), runtime) == {"seen": "export"}


def test_next_start_leaves_out_what_was_evaluated(project: Any, runtime: Runtime, tmp_path: Path, live: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"samples_seen": 960, "eval/fid": 1.0}\n')
    assert watch.newest(live, tmp_path / "out", set()) == 480
    assert watch.newest(live, tmp_path / "out", {480}) is None


def test_checkpoint_that_is_gone_is_passed_over(project: Any, runtime: Runtime, tmp_path: Path, live: Path) -> None:
    assert watch.of_checkpoint(config(project, tmp_path), runtime, live, 123) is None
    (live / "checkpoints" / "000000000480" / "unet" / "ema.safetensors").unlink()
    assert watch.of_checkpoint(config(project, tmp_path), runtime, live, 480) is None


def test_watching_where_nothing_trains_is_one_line(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^watch=true: no training in '.*/unet'; start train/train_unet.py"):
        watch.watch(config(project, tmp_path), runtime)


def test_evaluation_in_the_loop_gives_the_commands_numbers(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    asked = ["evaluation.samples=6", f"output_dir={tmp_path}/unet", "sampling.steps=4"]
    training = project.config("unet", *asked, f"evaluation.shards={project.folder}/shards")
    cfg = project.config(
        "evaluate", f"output_dir={tmp_path}/out", "samples=6", "prompt_following=false", "clip_score=null"
    )
    model = load_model(cfg, torch.device("cpu"))
    small = evaluate_in_loop(training, runtime, model, 960)
    large = evaluate.evaluate_run(cfg, runtime)
    assert small.keys() == {name.replace("eval/", "eval/loop/") for name in large if name.startswith("eval/")}
    assert small == pytest.approx({name: large[name.replace("eval/loop/", "eval/")] for name in small})
    assert not (tmp_path / "unet" / "measured").exists()


def test_what_the_first_evaluation_would_miss_ends_the_training_at_its_start(
    project: Any, runtime: Runtime, tmp_path: Path
) -> None:
    assert small_evaluation(project.config("unet", "evaluation.samples=0"), runtime) is None  # needs nothing
    asked = ["evaluation.samples=10", f"evaluation.shards={project.folder}/shards"]
    assert small_evaluation(project.config("unet", *asked), runtime) is not None
    with pytest.raises(UserError, match=r"^inception=.*/none.pth: no such file"):
        small_evaluation(project.config("unet", *asked, f"evaluation.inception={tmp_path}/none.pth"), runtime)
    with pytest.raises(UserError, match=rf"^no shards at '{tmp_path}/heldout'"):
        small_evaluation(project.config("unet", "evaluation.samples=10", f"evaluation.shards={tmp_path}"), runtime)


def test_training_goes_on_when_a_image_is_not_finite(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluation.samples=4", f"output_dir={tmp_path}/unet", "sampling.steps=2"]
    training = project.config("unet", *asked, f"evaluation.shards={project.folder}/shards")
    model = load_model(project.config("evaluate"), torch.device("cpu"))
    monkeypatch.setattr(model, "decode", lambda latents: torch.full((len(latents), 3, 32, 32), torch.nan))
    assert evaluate_in_loop(training, runtime, model, 960) == {}
    assert "4 of 4 images are NaN or infinite: no eval/loop/… at 960 samples" in capfd.readouterr().out
