"""`--help` names every option of every command with its meaning, fits the terminal, and shows a section alone."""

import dataclasses
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.entry import compose, explain_command
from conf.errors import UserError
from conf.help import examples, kind_of, meaning, purpose, sections, show_help, shown
from conf.schema import COMMANDS, Device, UNetRun
from train.stages.tasks import separate

ROOT = Path(__file__).parents[2]


def help_of(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, width: int = 80
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    explain_command(command, COMMANDS[command], arguments)
    return capsys.readouterr().out


def test_every_script_is_a_command() -> None:
    found = {}
    for script in (*ROOT.glob("data/*.py"), *ROOT.glob("train/*.py")):
        for command, schema in re.findall(r'@entry\("(\w+)", (\w+)', script.read_text()):
            found[command] = schema
            assert purpose(COMMANDS[command]).startswith(f"{script.parent.name}/{script.name}: ")
    assert found == {command: schema.__name__ for command, schema in COMMANDS.items()}


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_told_within_the_terminal(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys, monkeypatch, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text  # colours are for terminals
    for section in sections(COMMANDS[command], {}):
        _, _, rows = text.partition(f"\n{section.name or 'options'}")
        for option in dataclasses.fields(section.schema):
            name = f"{section.name}.{option.name}".removeprefix(".")  # a section that is there stands by itself
            assert re.search(rf"(?m)^{option.name}( |$)", rows) or f"\n{name}  " in text, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_meaning(command: str) -> None:
    for section in sections(COMMANDS[command], {}):
        for option in dataclasses.fields(section.schema):
            kind = kind_of(option)
            assert "section" in kind or meaning(section.schema, option), f"{section.name}.{option.name}"


def test_comments_of_bases_are_found() -> None:
    runtime, optim = UNetRun.__dataclass_fields__["runtime"].type, UNetRun.__dataclass_fields__["optim"].type
    fields: Any = {option.name: option for kind in (runtime, optim) for option in dataclasses.fields(kind)}
    assert meaning(runtime, fields["device"]) == "auto: cuda when there is one"
    assert meaning(optim, fields["warmup_samples"]) == "samples of linear warm-up from 0"


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_lines_that_the_command_takes(command: str) -> None:
    lines = examples(COMMANDS[command])
    assert len(lines) == 3
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if not word.startswith("-")]
        script, arguments = words[0], words[1:]
        assert Path(script).stem == command and (ROOT / script).is_file()
        swept = [re.sub(r"(?<=[\w.]),[^\]]*$", "", a) if " -m " in line else a for a in arguments]
        compose(command, COMMANDS[command], separate(swept)[0] if command == "pipeline" else swept)


def test_a_section_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of("train_unet", capsys, monkeypatch, "runtime")
    assert text.startswith("runtime=NAME\nauto, cpu, ") and "zero_stage" in text and "lr " not in text
    below = help_of("train_unet", capsys, monkeypatch, "conditions")
    assert "\nconditions.boxes  " in below and "\noptim" not in below
    assert help_of("train_unet", capsys, monkeypatch, "options").startswith("\noptions\nrun_dir ")


def test_values_are_those_of_the_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of("train_unet", capsys, monkeypatch, "optim", "experiment=demo", "optim.eps=0.5")
    assert re.search(r"\nlr +float +0\.006 ", text) and re.search(r"\neps +float +0\.5 ", text)


def test_an_unknown_section_is_one_line_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^--help runtme: no such section; choose one of runtime, .*mean runtime\?$"):
        explain_command("train_unet", UNetRun, ["runtme"])
    with pytest.raises(UserError, match=r"^no option 'optim\.lrr': did you mean optim\.lr"):
        explain_command("train_unet", UNetRun, ["optim.lrr=1"])


def test_the_pipeline_lists_its_stages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of("pipeline", capsys, monkeypatch)
    for stage in ("build", "autoencoder", "clip", "latents", "unet", "sample", "evaluate"):
        assert re.search(rf"(?m)^  {stage} +(data|train)/\w+\.py: ", text)
    assert help_of("pipeline", capsys, monkeypatch, "unet").startswith("train/train_unet.py: ")


def test_colours_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    show_help(UNetRun, {}, {}, console=console)
    assert "\x1b[1m" in console.file.getvalue()  # type: ignore[attr-defined]


def test_values_are_shown_as_they_are_typed() -> None:
    values = [None, True, 1.0, "", "???", [1, None], {"a": False}, Device.cpu]
    assert [shown(v) for v in values] == ["null", "true", "1.0", '""', "(needed)", "[1, null]", "{a: false}", "cpu"]


def test_help_needs_no_torch() -> None:
    code = "import runpy, sys; sys.argv = ['train_unet.py', '--help', 'ema']; runpy.run_path('train/train_unet.py', "
    code += "run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("\nema  ") and done.stdout.endswith("\nFalse\n")
