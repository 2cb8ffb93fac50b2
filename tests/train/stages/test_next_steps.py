"""The commands at the end of a run: the shell and Hydra read from them what the run is, whatever it is called."""

import copy
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.entry import compose
from conf.schema import EditRun, PipelineRun, PlaygroundRun, Sampler, SampleRun
from train.stages import next_steps as steps
from train.stages.next_steps import edited, next_steps, print_next_steps
from train.stages.tasks import ROOT, Task, plan_tasks, separate

SCHEMAS: dict[str, Any] = {"sample": SampleRun, "edit": EditRun, "playground": PlaygroundRun}


@pytest.fixture(scope="module")
def composed_once() -> list[Task]:
    return tasks_of("experiment=smoke", "run_dir=runs/first")


@pytest.fixture
def tasks(composed_once: list[Task]) -> list[Task]:
    return copy.deepcopy(composed_once)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(steps, "has_gradio", lambda: True)


def tasks_of(*line: str) -> list[Task]:
    own, overrides = separate(line)
    return plan_tasks(compose("pipeline", PipelineRun, own), overrides)


def composed(command: str) -> Any:
    """The options of a command line, as its script would have them."""
    python, script, *arguments = shlex.split(command)
    assert Path(script).is_file() and python
    name = Path(script).stem
    return compose(name, SCHEMAS[name], arguments)


def test_three_commands_with_the_runs_own_paths_and_prompts(tasks: list[Task]) -> None:
    draw, edit, playground = map(composed, next_steps(tasks))
    assert draw.prompts == ["a red planet on a navy background"] and draw.output_dir == "runs/first/drawn"
    assert (edit.prompt, edit.edit) == ("a red planet on a navy background", "a blue planet on a navy background")
    assert {cfg.unet for cfg in (draw, edit, playground)} == {"runs/first/unet/export"}


def test_a_student_draws_as_it_has_learnt() -> None:
    draw, edit, playground = map(composed, next_steps(tasks_of("experiment=distill_demo", "run_dir=runs/first")))
    for cfg in (draw, edit, playground):
        assert (cfg.sampler, cfg.steps, cfg.guidance_scale) == (Sampler.lcm, 4, 2.0)
        assert cfg.unet == "runs/first/unet/export" and cfg.clip == "runs/demo/clip/export"


@pytest.mark.parametrize(
    ("folder", "prompt"),
    [
        ("my runs/a=b", "a red planet"),
        ("runs/[1]", 'it\'s a "fine" red ball, 5 % of ${a}: [x], {y}'),
        ("runs/$HOME's, {a: b}", "red"),
        ('runs/"x"/é', "(a:1.2) red \\ `ls` !"),
    ],
)
def test_any_path_and_prompt_comes_through_the_shell(tasks: list[Task], folder: str, prompt: str) -> None:
    for task in tasks:
        task.cfg.run_dir = folder
    sample = next(task.cfg for task in tasks if task.stage.name == "sample")
    sample.prompts = [prompt]
    sample.unet, sample.autoencoder, sample.clip = (
        f"{folder}/{name}/export" for name in ("unet", "autoencoder", "clip")
    )
    draw, edit, playground = map(composed, next_steps(tasks))
    assert draw.prompts == [prompt] and edit.prompt == prompt and edit.edit == re.sub(r"(?<!\S)red", "blue", prompt)
    assert draw.run_dir == edit.run_dir == playground.run_dir == folder


def test_networks_of_another_run_are_named() -> None:
    draw, edit, playground = map(composed, next_steps(tasks_of("experiment=dreambooth_demo")))
    for cfg in (draw, edit, playground):
        assert cfg.unet == "runs/dreambooth_demo/unet/export"
        assert cfg.autoencoder == "runs/demo/autoencoder/export" and cfg.clip == "runs/demo/clip/export"


def test_a_network_that_is_told_more_than_a_prompt_draws_from_its_data_set() -> None:
    for name in ("inpainting_text_demo", "unconditional_demo"):
        (draw,) = map(composed, next_steps(tasks_of(f"experiment={name}")))
        assert draw.prompts_from and not draw.prompts


def test_a_part_of_a_run_suggests_nothing(tasks: list[Task]) -> None:
    tasks = [task for task in tasks if task.stage.name in ("build", "autoencoder")]
    out = io.StringIO()
    print_next_steps(Console(file=out), tasks)
    assert next_steps(tasks) == [] and out.getvalue() == ""


def test_a_command_is_one_line_however_narrow_the_terminal(tasks: list[Task]) -> None:
    out = io.StringIO()
    print_next_steps(Console(file=out, width=20), tasks)
    assert [line.strip() for line in out.getvalue().splitlines()[1:]] == next_steps(tasks)


def test_from_elsewhere_the_script_is_named_in_full(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(str(ROOT / "train") in command for command in next_steps(tasks))


def test_what_the_playground_lacks_is_installed_first(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "has_gradio", lambda: False)
    assert "pip install '.[playground]' && " in next_steps(tasks)[-1]


def test_an_edit_changes_one_colour_else_the_prompt() -> None:
    assert edited(["a red cat on a blue mat"]) == ("a red cat on a blue mat", "a green cat on a blue mat")
    assert edited(["a cat", "a dog"]) == ("a cat", "a dog")
    assert edited(["a cat"]) is None
