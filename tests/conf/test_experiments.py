"""Experiments: what a file says to each command, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf import experiments
from conf.entry import compose, to_plain
from conf.errors import UserError
from conf.schema import COMMANDS, BuildRun, ClipRun, EditRun, EvaluateRun, ExportRun, PipelineRun, SampleRun, UNetRun

Write = Callable[[str, str], object]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts an experiment into a folder that takes the place of conf/experiment/."""
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    return lambda name, text: (tmp_path / f"{name}.yaml").write_text(text)


def test_options_for_all_reach_every_command_that_has_them(write: Write) -> None:
    write("mine", "{stages: [sample], all: {autoencoder: A, sampling: {steps: 7}}, unet: {seed: 3}, sample: {}}")
    chosen = ["experiment=mine"]
    unet = compose("train_unet", UNetRun, chosen)
    assert (unet.name, unet.run_dir, unet.seed) == ("mine", "runs/mine", 3)
    assert (unet.autoencoder, unet.sampling.steps) == ("A", 7)
    sample = compose("sample", SampleRun, [*chosen, "prompts=[a]"])
    assert (sample.autoencoder, sample.steps, sample.seed) == ("A", 7, 0)
    assert compose("edit", EditRun, [*chosen, "prompt=a"]).steps == 7
    assert compose("export", ExportRun, chosen).autoencoder == "A"
    assert compose("pipeline", PipelineRun, chosen).stages == ["sample"]


def test_options_for_all_may_name_others_of_the_command(write: Write) -> None:
    write("mine", '{all: {shards: "${run_dir}/own", sampling: {negative_prompt: "${name}"}}, clip: {}, sample: {}}')
    assert compose("train_clip", ClipRun, ["experiment=mine", "run_dir=R"]).shards == "R/own"
    assert compose("sample", SampleRun, ["experiment=mine", "prompts=[a]"]).negative_prompt == "mine"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in experiments.STAGES])
def test_a_command_without_a_section_composes_with_every_experiment(command: str) -> None:
    """What stands in `all` is also for commands whose option of that name is of another kind."""
    typed = {"average": ["sigma_rel=0.1"], "edit": ["prompt=a"]}.get(command, [])
    for name in experiments.names():
        assert compose(command, COMMANDS[command], [f"experiment={name}", *typed]).name == name


def test_the_command_line_wins_over_the_section_and_this_over_all(write: Write) -> None:
    write("mine", "{all: {sampling: {steps: 7, guidance_scale: 2.0}}, sample: {steps: 8, prompts: [a]}}")
    assert compose("sample", SampleRun, ["experiment=mine"]).steps == 8
    cfg = compose("sample", SampleRun, ["experiment=mine", "steps=9"])
    assert (cfg.steps, cfg.guidance_scale) == (9, 2.0)


def test_an_experiment_says_only_what_differs_from_the_one_it_begins_from(write: Write) -> None:
    write("first", "{build: {source: demo, samples: 5, resolution: 64}}")
    write("second", "{begin_from: first, build: {samples: 6}}")
    write("third", "{begin_from: second, build: {seed: 1}}")
    cfg = compose("build_shards", BuildRun, ["experiment=third"])
    assert (cfg.samples, cfg.resolution, cfg.seed, cfg.name) == (6, 64, 1, "third")


def test_a_section_begins_with_files_of_other_groups(write: Write) -> None:
    write("mine", "{unet: {defaults: [/model/sd1@model], model: {sample_size: 32}}}")
    model = compose("train_unet", UNetRun, ["experiment=mine"]).model
    assert (model.cross_attention_dim, model.sample_size) == (768, 32)
    assert compose("train_unet", UNetRun, ["experiment=mine", "model=sd2"]).model.cross_attention_dim == 1024


def test_no_experiment_is_the_schema() -> None:
    plain = to_plain(compose("train_unet", UNetRun, ["run_dir=r"]))
    assert to_plain(compose("train_unet", UNetRun, ["run_dir=r", "experiment=none"])) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{unet: {}, build: {}}",
            r"^experiment=mine has no section 'clip', which this command reads; it has unet, build$",
        ),
        ("{clip: {}, untt: {}}", r"mine\.yaml: section 'untt' is read by no command; did you mean unet\?"),
        (
            "{clip: {}, all: {autencoder: A}}",
            r"mine\.yaml: all 'autencoder' is read by no command; did you mean autoenc",
        ),
        ("{begin_from: nobody, clip: {}}", r"^no experiment 'nobody': choose one of none, mine$"),
        ("{clip: {optim: {lrr: 1.0}}}", r"lrr"),
        ("[clip]", r"mine\.yaml: must hold sections"),
        ("{clip: ", r"mine\.yaml: "),
    ],
)
def test_what_no_command_reads_is_one_line(write: Write, text: str, message: str) -> None:
    write("mine", text)
    with pytest.raises(UserError, match=message):
        compose("train_clip", ClipRun, ["experiment=mine"])


def test_a_misspelt_experiment_is_told_its_neighbours() -> None:
    with pytest.raises(
        UserError, match=r"^no experiment 'clas_demo': did you mean class_demo.*\? choose one of none, "
    ):
        compose("train_unet", UNetRun, ["experiment=clas_demo"])


def test_an_evaluation_of_the_autoencoder_asks_nothing_of_a_unet() -> None:
    cfg = compose("evaluate", EvaluateRun, ["experiment=smoke", "subject=autoencoder"])
    assert not cfg.prompt_following and cfg.clip_score is None
    assert cfg.output_dir == "runs/smoke/autoencoder_evaluation"
    assert compose("evaluate", EvaluateRun, ["experiment=smoke"]).prompt_following
