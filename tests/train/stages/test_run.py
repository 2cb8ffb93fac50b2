"""The chain of stages, with scripts in place of the stages: what it starts, skips, passes on and reports."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from rich.console import Console

from conf.entry import compose
from conf.errors import UserError
from conf.schema import PipelineRun
from data.building.build import build_shards
from train.stages.calibration import Calibration, key_of, known_costs
from train.stages.display import Display, StageRow
from train.stages.run import _Chain, run_stages
from train.stages.tasks import STAGES, StageCommand, Task, plan_tasks, separate
from train.stages.time_left import StageCost

ROOT = Path(__file__).parents[3]
NAMES = PipelineRun(run_dir="unused", name="unused").stages  # those that run where nobody chooses
FOLDERS = {"build": "shards", "sample": "samples", "evaluate": "evaluation"}
WAIT_S = 60.0

# Takes the command line of a stage, leaves the proof of a finished one, and can be told by files to wait or to fail.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

NAME, FOLDER, PROOF = {name!r}, {folder!r}, {proof!r}
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
run_dir = Path(options["run_dir"])
output = run_dir / FOLDER
output.mkdir(parents=True, exist_ok=True)
with (run_dir / "calls.jsonl").open("a") as file:
    file.write(json.dumps([NAME, sys.argv[1:], os.environ.get("WORLD_SIZE", "1")]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: ((output / "checkpoint").write_text("saved"), sys.exit(0)))
(output / "pid").write_text(str(os.getpid()))
with (output / "metrics.jsonl").open("a") as file:
    row = {{"samples_seen": 128, "time": time.time(), "train/loss": 0.5, "perf/images_per_s": 10.0, "perf/eta_s": 9.0}}
    file.write(json.dumps(row) + "\\n")
    if NAME == "latents":
        file.write(json.dumps({{"samples_seen": 320, "time": time.time(), "latents/train_psnr": 23.5}}) + "\\n")
while (run_dir / f"hold-{{NAME}}").exists():
    time.sleep(0.05)
if (run_dir / f"fail-{{NAME}}").exists():
    print("error: the loss is not finite: lower optim.lr", file=sys.stderr)
    print("a last word", file=sys.stderr)
    sys.exit(2)
if (run_dir / f"raise-{{NAME}}").exists():
    raise ValueError("a defect")
proof = output / PROOF
proof.parent.mkdir(exist_ok=True)
made = {{
    "DONE": {{"samples_seen": 512, "metrics": {{"eval/psnr": 25.5, "eval/bad": None}}, "lr": options.get("optim.lr")}},
    "metrics.json": {{"eval/prompt_following/kind": 0.97, "probe/accuracy/kind": 0.99}},
}}
proof.write_text(json.dumps(made.get(PROOF, [NAME, sys.argv[1:]])))
if NAME in ("sample", "evaluate"):
    (output / "grid.png").write_bytes(NAME.encode())
"""

DRIVER = """
import sys
from conf.ending import fail
from conf.entry import compose
from conf.schema import PipelineRun
from dataclasses import replace
from pathlib import Path
from train.stages.run import run_stages
from train.stages.tasks import STAGES, separate

folder = Path(sys.argv[1])
stages = [replace(stage, script=folder / stage.script.name) for stage in STAGES]
own, overrides = separate(sys.argv[2:], stages)
try:
    sys.exit(run_stages(compose("pipeline", PipelineRun, own), overrides, stages))
except Exception as error:
    fail(error)
finally:
    assert "torch" not in sys.modules
"""


def hear_interrupts() -> None:
    """Tests that run in the background of a shell are started deaf to SIGINT, and their children with them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Chain:
    """A pipeline of stand-ins in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir()
        self.stages: list[StageCommand] = []
        for stage in STAGES:
            script = folder / stage.script.name
            script.write_text(
                STAND_IN.format(name=stage.name, folder=FOLDERS.get(stage.name, stage.name), proof=stage.proof)
            )
            self.stages.append(replace(stage, script=script))
        (folder / "driver.py").write_text(DRIVER)
        self.line = [f"run_dir={self.run_dir}", "experiment=smoke", "calibrate=false", "live=false"]
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *arguments: str) -> int:
        own, overrides = separate([*self.line, *arguments], self.stages)
        return run_stages(compose("pipeline", PipelineRun, own), overrides, self.stages)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, str(self.folder / "driver.py"), str(self.folder), *self.line, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=hear_interrupts,
        )
        self.started.append(process)
        return process

    def calls(self) -> list[Any]:
        """[stage, arguments, processes] of each start of a stage so far; the file is emptied."""
        path = self.run_dir / "calls.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return rows

    def order(self) -> list[str]:
        return [name for name, _, _ in self.calls()]

    def tell(self, what: str, name: str) -> Path:
        path = self.run_dir / f"{what}-{name}"
        path.touch()
        return path

    def summary(self) -> dict[str, float]:
        content: dict[str, float] = json.loads((self.run_dir / "summary.json").read_text())
        return content


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    made = Chain(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
    return value


def pid_of(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text()))


def test_stages_run_in_order_and_finished_ones_are_skipped(chain: Chain) -> None:
    assert chain.run() == 0
    assert chain.order() == NAMES
    assert chain.run() == 0
    assert chain.order() == []


def test_a_changed_option_reruns_the_stage_and_what_its_new_result_feeds(chain: Chain) -> None:
    chain.run()
    chain.calls()
    chain.run("autoencoder.optim.lr=5e-4")  # another DONE: latents were made from another autoencoder
    assert chain.order() == ["autoencoder", "latents", "unet", "sample", "evaluate"]
    chain.run("autoencoder.optim.lr=5e-4", "unet.loop.log_every=64")  # leaves the same DONE: nothing downstream changes
    assert chain.order() == ["unet"]


def test_where_and_how_it_runs_reruns_nothing(chain: Chain) -> None:
    chain.run()
    chain.calls()
    chain.run("wandb.mode=disabled", "runtime.threads=1")
    assert chain.order() == []


def test_a_longer_training_or_a_deleted_result_runs_again(chain: Chain) -> None:
    chain.run()
    chain.calls()
    (chain.run_dir / "unet" / "DONE").unlink()
    chain.run()
    assert chain.order() == ["unet"]  # the same result again: sample and evaluate stay
    with pytest.raises(UserError, match="stage clip: somebody stopped it before its end"):
        chain.run("clip.loop.samples=1024")  # the stand-in stops at 512
    assert chain.order() == ["clip"]


def test_a_build_whose_source_was_edited_is_not_skipped(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.run()
    chain.calls()
    monkeypatch.setattr(Task, "outdated", lambda task: task.stage.name == "build")
    chain.run()
    assert chain.order() == ["build"]


def test_only_a_source_that_is_there_outdates_a_build(tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8)).save(photo)
    photo.with_suffix(".txt").write_text("a caption")
    stage = next(stage for stage in STAGES if stage.name == "build")
    line = ["source=folder", f"path={photo.parent}", f"run_dir={tmp_path}", "heldout_fraction=0"]
    task = Task(stage, compose("build_shards", stage.schema, line), [])
    assert not task.outdated()  # nothing is built
    build_shards(task.cfg)
    assert not task.outdated()
    os.utime(photo, ns=(0, 10**9))
    assert task.outdated()
    shutil.rmtree(photo.parent)
    assert not task.outdated()


def test_other_captions_are_another_input_of_the_images(tmp_path: Path) -> None:
    stage = next(stage for stage in STAGES if stage.name == "sample")
    cfg = compose("sample", stage.schema, ["experiment=smoke", f"run_dir={tmp_path}", f"prompts_from={tmp_path}/side"])
    (tmp_path / "side").mkdir()
    digests = set()
    for content in ("one data set", "another one"):
        (tmp_path / "side" / "manifest.json").write_text(content)
        digests.add(Task(stage, cfg, []).inputs())
    assert len(digests) == 2


def test_overrides_reach_the_stages_that_have_the_option(chain: Chain) -> None:
    chain.run(
        "unet.optim.lr=1e-3", "wandb.mode=disabled", "seed=3", "++build.workers=1", "clip.batch.workers=1", "steps=2"
    )
    given = {name: arguments[2:] for name, arguments, _ in chain.calls()}
    assert given == {
        "build": ["seed=3", "++workers=1"],
        "autoencoder": ["wandb.mode=disabled", "seed=3"],
        "clip": ["wandb.mode=disabled", "seed=3", "batch.workers=1"],
        "latents": ["wandb.mode=disabled", "seed=3"],
        "unet": ["optim.lr=1e-3", "wandb.mode=disabled", "seed=3"],
        "sample": ["seed=3", "steps=2"],
        "evaluate": ["wandb.mode=disabled", "seed=3", "steps=2"],
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("unet.optim.lrr=1", "stage unet: no option 'optim.lrr': did you mean optim.lr"),
        ("unett.optim.lr=1", "no option 'unett.optim.lr': did you mean unet.optim.lr"),
        ("lr=1", "no option 'lr': did you mean optim.lr"),
        ("procesess=2", "no option 'procesess': did you mean processes"),
        ("build.samples=many", "stage build: .*samples=many"),
        ("autoencoder.images.resolution=31", "stage autoencoder: images.resolution=31"),
        ("evaluate.runtime=cpuu", "stage evaluate: .*choose one of auto, cpu, fsdp, gpu"),
        ("output_dir=x", "output_dir: each stage has its own"),
        ("stages=[clipp]", "stages: no stage 'clipp'"),
        ("processes=0", "processes=0: must be positive"),
        ("--multirun", "does not sweep"),
    ],
)
def test_a_wrong_option_of_any_stage_is_refused_before_the_first_starts(
    chain: Chain, argument: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chain.run(argument)
    assert chain.order() == []


def test_flags_and_options_of_hydra_stay_with_the_pipeline() -> None:
    assert separate(["--cfg", "job", "processes=2", "hydra.verbose=true"])[0] == [
        "--cfg",
        "job",
        "processes=2",
        "hydra.verbose=true",
    ]


def test_a_failed_stage_ends_the_run_in_one_line_with_its_reason_and_log(chain: Chain) -> None:
    chain.tell("fail", "clip")
    process = chain.start()
    output, _ = process.communicate(timeout=WAIT_S)
    log = chain.run_dir / "logs" / "clip.log"
    assert process.returncode == 2
    assert output.splitlines()[-1] == f"error: stage clip: the loss is not finite: lower optim.lr (log: {log})"
    assert "a last word" in log.read_text()
    assert chain.order() == ["build", "autoencoder", "clip"]
    (chain.run_dir / "fail-clip").unlink()
    chain.tell("raise", "clip")
    with pytest.raises(UserError, match="stage clip: ValueError: a defect"):
        chain.run()
    (chain.run_dir / "raise-clip").unlink()
    assert chain.run() == 0
    assert chain.order() == ["clip", *NAMES[2:]]
    assert log.read_text().count("--- ") == 3  # appended to, with a header for each start


def test_a_stage_that_was_killed_is_named_with_the_signal(chain: Chain) -> None:
    chain.tell("hold", "unet")
    process = chain.start()
    os.kill(pid_of(chain.run_dir / "unet" / "pid"), signal.SIGKILL)
    output, _ = process.communicate(timeout=WAIT_S)
    assert "error: stage unet: ended by SIGKILL: out of memory?" in output and process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_stage_write_its_checkpoint_and_the_same_line_continues(
    chain: Chain, number: signal.Signals
) -> None:
    hold = chain.tell("hold", "autoencoder")
    process = chain.start()
    child = pid_of(chain.run_dir / "autoencoder" / "pid")
    process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number and "start the same line again" in output
    assert (chain.run_dir / "autoencoder" / "checkpoint").read_text() == "saved"
    assert not psutil.pid_exists(child)
    hold.unlink()
    assert chain.run() == 0
    assert chain.order() == ["build", "autoencoder", *NAMES[1:]]  # build is not done again


def test_a_second_signal_ends_a_stage_that_does_not_listen(chain: Chain) -> None:
    script = chain.folder / "build_shards.py"
    script.write_text(script.read_text().replace("sys.exit(0)", "None"))
    chain.tell("hold", "build")
    process = chain.start()
    child = pid_of(chain.run_dir / "shards" / "pid")
    process.send_signal(signal.SIGTERM)
    until((chain.run_dir / "shards" / "checkpoint").exists)
    assert psutil.pid_exists(child)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + signal.SIGTERM and not psutil.pid_exists(child)


def test_a_killed_pipeline_leaves_no_orphan_and_the_same_line_continues(chain: Chain) -> None:
    hold = chain.tell("hold", "unet")
    process = chain.start()
    child = pid_of(chain.run_dir / "unet" / "pid")
    process.kill()
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert (chain.run_dir / "unet" / "checkpoint").read_text() == "saved"
    hold.unlink()
    assert chain.run() == 0
    assert chain.order() == [*NAMES[:5], *NAMES[4:]]


def test_a_new_start_waits_for_a_stage_that_a_killed_pipeline_left_behind(chain: Chain) -> None:
    script = chain.folder / "build_shards.py"
    script.write_text(script.read_text().replace("sys.exit(0)", "None"))  # its last checkpoint takes long
    hold = chain.tell("hold", "build")
    process = chain.start()
    child = pid_of(chain.run_dir / "shards" / "pid")
    process.kill()
    second = chain.start()
    assert second.stdout is not None
    assert "waiting for a stage" in second.stdout.readline()
    assert psutil.pid_exists(child) and chain.order() == ["build"]
    hold.unlink()
    assert second.wait(WAIT_S) == 0
    assert chain.order() == NAMES  # build is asked once more, since nobody saw it end


def test_a_second_pipeline_in_the_same_folder_is_refused(chain: Chain) -> None:
    hold = chain.tell("hold", "build")
    process = chain.start()
    pid_of(chain.run_dir / "shards" / "pid")
    with pytest.raises(UserError, match="another pipeline works there"):
        chain.run()
    hold.unlink()
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0 and chain.order() == NAMES


def test_summary_holds_the_recorded_metrics_under_their_names_and_no_other(chain: Chain) -> None:
    chain.run()
    summary = chain.summary()
    assert {name: value for name, value in summary.items() if not name.startswith("seconds/")} == {
        "autoencoder/psnr": 25.5,
        "clip/psnr": 25.5,
        "unet/psnr": 25.5,
        "latents/train_psnr": 23.5,
        "eval/prompt_following/kind": 0.97,
        "probe/accuracy/kind": 0.99,
    }
    seconds = {name: value for name, value in summary.items() if name.startswith("seconds/")}
    assert set(seconds) == {f"seconds/{name}" for name in [*NAMES, "total"]}
    assert seconds.pop("seconds/total") == pytest.approx(sum(seconds.values()))
    assert (chain.run_dir / "grid.png").read_bytes() == b"evaluate"


def test_seconds_add_up_over_starts_and_a_part_of_the_chain_keeps_the_rest_of_the_summary(chain: Chain) -> None:
    chain.run()
    whole = chain.summary()
    path = chain.run_dir / ".stages" / "unet.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0, "outcome": "another"}))
    chain.run("stages=[unet]")
    assert chain.order()[-1] == "unet"
    again = chain.summary()
    assert 1000.0 <= again["seconds/unet"] < 1000.0 + WAIT_S
    assert again.keys() == whole.keys()


def test_metrics_of_a_model_that_was_replaced_leave_the_summary(chain: Chain) -> None:
    chain.run()
    chain.run("stages=[unet]", "unet.optim.lr=2e-3")  # another DONE
    names = chain.summary().keys()
    assert {"autoencoder/psnr", "unet/psnr"} <= names
    assert not {"eval/prompt_following/kind", "seconds/evaluate", "seconds/sample"} & names


def test_without_a_terminal_each_stage_is_told_in_plain_lines(chain: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    chain.run()
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["build", "running"],
        ["build", "done"],
        ["autoencoder", "running"],
        ["autoencoder", "done"],
    ]
    done = next(line for line in lines if line.startswith("unet" + " " * 8 + "done"))
    assert "samples 128/512" in done and "loss 0.5" in done and "images/s 10" in done
    chain.run()
    assert ["unet", "skipped"] in [line.split()[:2] for line in capfd.readouterr().out.splitlines()]


def test_several_processes_share_a_training_through_torchrun(chain: Chain) -> None:
    chain.tell("fail", "autoencoder")
    with pytest.raises(UserError, match=r"stage autoencoder: the loss is not finite: lower optim.lr"):
        chain.run("processes=2", "stages=[build,autoencoder]")
    assert {(name, world) for name, _, world in chain.calls()} == {("build", "1"), ("autoencoder", "2")}


def test_a_killed_pipeline_ends_the_processes_of_torchrun_too(chain: Chain) -> None:
    chain.tell("hold", "autoencoder")
    process = chain.start("processes=2", "stages=[autoencoder]")
    calls = chain.run_dir / "calls.jsonl"
    until(lambda: calls.exists() and len(calls.read_text().splitlines()) == 2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    process.kill()
    assert psutil.wait_procs(family, timeout=WAIT_S)[1] == []
    assert (chain.run_dir / "autoencoder" / "checkpoint").read_text() == "saved"


def test_the_first_line_names_the_live_page_and_the_last_ones_what_to_try(
    chain: Chain, capfd: pytest.CaptureFixture[str]
) -> None:
    chain.run("live=true")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("live page: ") and lines[0].endswith(
        f"train/report.py run_dir={chain.run_dir} live=true"
    )
    assert lines[-4] == "try next"
    assert [Path(word).stem for line in lines[-3:] for word in line.split() if word.endswith(".py")] == [
        "sample",
        "edit",
        "playground",
    ]
    chain.tell("fail", "evaluate")
    with pytest.raises(UserError):
        chain.run("evaluate.samples=32")
    assert "try next" not in capfd.readouterr().out
    assert "\x1b" not in "".join(lines)


def test_what_a_stage_tells_reaches_the_pipeline(chain: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    script = chain.folder / "train_clip.py"
    told = 'from conf.process import tell; tell("training", 130, 512)\n'
    script.write_text(told + script.read_text())
    chain.run("stages=[clip]", "wandb.mode=disabled")
    done = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("clip        done"))
    assert "samples 130/512" in done


def test_what_earlier_starts_have_finished_takes_no_time(chain: Chain) -> None:
    chain.run()
    own, overrides = separate(chain.line, chain.stages)
    tasks = plan_tasks(compose("pipeline", PipelineRun, own), overrides, chain.stages)
    calibration = Calibration(chain.run_dir, tasks, wanted=False)
    calibration.costs = {name: StageCost(1.0, 1.0) for name in NAMES}
    (chain.run_dir / "unet" / "DONE").unlink()
    rows = [StageRow(task.stage.name) for task in tasks]
    display = Display(rows, Console(file=io.StringIO()))
    _Chain(chain.run_dir, 1, 0, [], display, calibration).look_ahead(tasks)
    assert [row.name for row in rows if not row.finished] == ["unet", "sample", "evaluate"]  # these read its result
    assert display.rest_s == (1 + 512 - 128) + (1 + 2) + (1 + 16)  # the training from its last row of metrics on


def test_costs_are_kept_for_the_options_and_the_machine_that_they_are_of(chain: Chain) -> None:
    own, overrides = separate(chain.line, chain.stages)
    tasks = plan_tasks(compose("pipeline", PipelineRun, own), overrides, chain.stages)
    path = chain.run_dir / "costs.json"
    key = key_of(tasks)
    path.write_text(json.dumps({"key": key, "costs": {"unet": {"fixed_s": 1, "sample_s": 2, "evaluation_s": 3}}}))
    assert known_costs(path, key) == {"unet": StageCost(1, 2, 3)}
    own, overrides = separate([*chain.line, "unet.batch.global_batch_size=8"], chain.stages)
    assert known_costs(path, key_of(plan_tasks(compose("pipeline", PipelineRun, own), overrides, chain.stages))) is None
    path.write_text("{")
    assert known_costs(path, key) is None
