"""Every option is explained, and every shipped configuration composes, fits together and says what it costs."""

import ast
import copy
import functools
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf import entry
from conf.entry import compose, composing
from conf.errors import UserError
from conf.experiments import read_experiment
from conf.schema import COMMANDS as SCHEMAS
from conf.schema import AutoencoderRun, Device, EvaluateRun, PipelineRun, UNetRun
from models.conditions import ConditionContext, Conditions, Embedders
from models.denoiser import Denoiser
from models.formats.unet import architecture
from models.unet import UNet
from train.latents.provenance import asks_clip
from train.stages.tasks import STAGES, StageCommand, plan_tasks, separate

CONF = Path(__file__).parents[2] / "conf"
COMMANDS = {stage.name: stage for stage in STAGES}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml") if path.stem != "none")
RUNTIMES = sorted((CONF / "runtime").glob("*.yaml"))
SCHEMA = [
    f"schema/{name}.py"
    for name in (
        *("choices", "shared", "networks", "conditions", "data", "training", "sampling"),
        *("evaluation", "editing", "tools"),
    )
]


def test_all_files_of_the_schema_are_read() -> None:
    assert {CONF / file for file in SCHEMA} == set((CONF / "schema").glob("[!_]*.py"))


def options_of(file: str) -> Iterator[tuple[str, str, str, str]]:
    """(class, option, type, source lines) of each field of each dataclass."""
    source = (CONF / file).read_text()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        for field in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = "\n".join(lines[field.lineno - 1 : field.end_lineno])
                yield node.name, field.target.id, ast.unparse(field.annotation), text  # type: ignore[union-attr]


def test_every_option_has_a_comment() -> None:
    """Beside it or beside the same option of an earlier command; a section is explained by its own options."""
    explained: set[tuple[str, str]] = set()
    missing = []
    for owner, option, kind, text in (found for file in SCHEMA for found in options_of(file)):
        if "  # " in text:
            explained.add((option, kind))
        elif not kind.removesuffix(" | None").endswith("Config") and (option, kind) not in explained:
            missing.append(f"{owner}.{option}")
    assert missing == []
    assert len(explained) > 10


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_section_of_an_experiment_composes_for_its_command(experiment: str) -> None:
    found = read_experiment(experiment)
    assert all(name in found for name in found.stages)
    for name in found.stages:  # what it begins from may have others, which ask for options that its command lacks
        composed(COMMANDS[name], experiment)


@pytest.mark.parametrize("path", RUNTIMES, ids=lambda path: path.stem)
def test_every_runtime_composes_and_says_how_to_launch_it(path: Path) -> None:
    chosen = [] if path.stem == "auto" else [f"runtime={path.stem}"]
    runtime = compose("train_unet", UNetRun, chosen).runtime
    assert (runtime.device is Device.cuda) == (path.stem not in ("auto", "cpu"))
    header = " ".join(line for line in path.read_text().splitlines() if line.startswith("# "))
    assert "# Launch" in header and all(choice in header for choice in ["train/train_unet.py", *chosen])


@pytest.mark.parametrize("command", [name for name, schema in SCHEMAS.items() if hasattr(schema, "runtime")])
def test_every_runtime_serves_every_command(command: str) -> None:
    """A file may set what only the U-Net's training reads; a command line may not."""
    schema = SCHEMAS[command]
    own = {option.name for option in fields(cast(Any, schema).__dataclass_fields__["runtime"].type)}
    for path in RUNTIMES:
        with composing(command, schema, [f"runtime={path.stem}"]) as read:
            runtime = hydra.compose(command, read).runtime
        said = OmegaConf.load(path)
        assert runtime.keys() == own
        assert all(runtime[name].name == said[name] for name in ("device", "precision") if name in said)
    for option in {"backend=ddp", "zero_stage=1", "offload=none", "compile=true", "watchdog_s=1", "threads=1"}:
        name = option.partition("=")[0]
        refusal = pytest.raises(UserError, match=rf"^no option 'runtime\.{name}': .*train_unet")
        with nullcontext() if name in own else refusal, composing(command, schema, [f"runtime.{option}"]) as read:
            hydra.compose(command, read)


def test_a_runtime_file_with_an_unknown_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "conf/runtime/mine.yaml").write_text("zero_stag: 1\n")
    (tmp_path / "conf/runtime/broken.yaml").write_text("a: [\n")
    monkeypatch.setattr(entry, "CONF", tmp_path / "conf")
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))  # no other test shall be offered these files
    with pytest.raises(UserError, match=r"runtime/mine.*zero_stag"):
        compose("train_unet", UNetRun, ["runtime=mine"])
    with pytest.raises(UserError, match=r"broken\.yaml"):
        compose("train_unet", UNetRun, ["runtime=broken"])
    assert compose("train_unet", UNetRun, ["runtime=gpu"]).runtime.zero_stage == 1


def test_an_option_has_one_default() -> None:
    """What is always composed says nothing else than the schema; `plan` alone is of machines that are not here."""
    for command, schema in SCHEMAS.items():
        with composing(command, schema, []) as read:
            composed = OmegaConf.to_container(hydra.compose(command, read), resolve=False)
        differs = different(OmegaConf.to_container(OmegaConf.structured(schema)), composed)
        of_a_cluster = [f"runtime.{name}" for name in ("device", "precision", "compile", "watchdog_ends", "zero_stage")]
        assert differs == (of_a_cluster if command == "plan" else [])


def different(schema: Any, composed: Any, name: str = "") -> list[str]:
    """Options with a default that another value takes the place of."""
    if isinstance(schema, dict) and isinstance(composed, dict):
        return [
            d for key in schema for d in different(schema[key], composed.get(key), f"{name}.{key}".removeprefix("."))
        ]
    return [name] if schema not in ("???", composed) else []


def command_of(experiment: str) -> list[str]:
    """Arguments of the command that the experiment's header gives."""
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    line = next((line for line in header.splitlines() if line.startswith("# Command: ")), "")
    return [argument for argument in shlex.split(line) if "=" in argument] or [f"experiment={experiment}"]


@functools.cache
def composed(stage: StageCommand, experiment: str) -> Any:
    """Its options; only to be read."""
    return compose(stage.script.stem, stage.schema, separate(command_of(experiment))[1][stage.name])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_for_the_whole_pipeline(experiment: str) -> None:
    own, overrides = separate(command_of(experiment))
    tasks = plan_tasks(compose("pipeline", PipelineRun, own), overrides)
    assert len(tasks) >= 3
    assert all(task.cfg.name == experiment and task.cfg.run_dir == f"runs/{experiment}" for task in tasks)


def maker(network: str, own: str) -> str:
    """The experiment whose run folder a network comes from; one from elsewhere is told by the experiment itself."""
    match Path(network).parts:
        case ("runs", experiment, _, "export"):
            return experiment
    return own


def autoencoder_of(folder: str, own: str) -> Any:
    """The network in a run's export, or one of those in weights/MODEL."""
    match Path(folder).parts:
        case ("weights", model):
            return compose("train_autoencoder", AutoencoderRun, [f"model={model}", "run_dir=unused"]).model
    return composed(COMMANDS["autoencoder"], maker(folder, own)).model


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_stages_of_an_experiment_fit_together(experiment: str) -> None:
    latents, unet, evaluate = (composed(COMMANDS[name], experiment) for name in ("latents", "unet", "evaluate"))
    autoencoder = autoencoder_of(latents.autoencoder, experiment)
    arrays, wanted = (Conditions(command.conditions).facts() for command in (latents, unet))
    assert arrays == wanted
    assert latents.images.resolution == evaluate.images.resolution
    assert unet.model.out_channels == autoencoder.cached_channels
    assert unet.model.sample_size * autoencoder.downscale == latents.images.resolution
    assert unet.model.sample_size % unet.model.downscale == 0
    if latents.autoencoder == f"runs/{experiment}/autoencoder/export":  # networks from elsewhere may know other sizes
        trained = composed(COMMANDS["autoencoder"], experiment)
        assert latents.images.resolution == trained.images.resolution
    for command in (composed(COMMANDS["sample"], experiment), unet, evaluate):
        assert command.autoencoder == latents.autoencoder
        assert command.clip == latents.clip or not asks_clip(unet.conditions)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_network_of_an_experiment_takes_all_that_it_is_told(experiment: str) -> None:
    unet = composed(COMMANDS["unet"], experiment)
    channels, told = unet.model.out_channels, unet.conditions
    context = ConditionContext.of(
        unet.model,
        downscale=autoencoder_of(unet.autoencoder, experiment).downscale,
        latent_mean=torch.zeros(channels),
        latent_std=torch.ones(channels),
    )
    with torch.device("meta"):
        Denoiser(UNet(unet.model), Embedders(Conditions(told), context))
    if asks_clip(told) and unet.clip.startswith("runs/"):
        clip = composed(COMMANDS["clip"], maker(unet.clip, experiment)).model
        if clip.pretrained is None:
            assert told.caption is None or unet.model.cross_attention_dim == clip.text_width
            assert told.image_embedding is None or told.image_embedding.width == clip.embed_dim


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_an_experiment_starts_from_is_of_the_same_architecture(experiment: str) -> None:
    """But for further channels, and what a mean flow is told of its steps, which begin at zero."""
    unet = composed(COMMANDS["unet"], experiment)
    if unet.init_from is not None and (first_name := maker(unet.init_from, experiment)) != experiment:
        first = composed(COMMANDS["unet"], first_name)
        begun, added = architecture(first.model), {"in_channels", "time_cond_proj_dim"}
        assert begun == architecture(unet.model) | {name: begun[name] for name in added & begun.keys()}
        # A training may favour other moments, and learn more of them.
        drawn_alike = replace(first.process, logit_mean=unet.process.logit_mean, mean_flow=unet.process.mean_flow)
        assert drawn_alike == unet.process
        assert first.autoencoder == unet.autoencoder
        assert first.clip == unet.clip or not asks_clip(unet.conditions)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_its_purpose_command_cost_and_result(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("# "))
    for heading in ("Purpose:", "Command:", "Cost:", "Result:"):
        assert f"# {heading} " in header, heading
    assert f"experiment={experiment}" in header


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_composes_and_says_what_it_is(protocol: str) -> None:
    """All that two labs must share is in it: images, captions, sampler, its options, guidance."""
    text = (CONF / "protocol" / f"{protocol}.yaml").read_text()
    for heading in ("Purpose:", "Command:", "Cost:", "Result:"):
        assert f"\n# {heading} " in text, heading
    assert f"protocol={protocol}" in text
    for option in ("samples", "sampler", "steps", "guidance_scale"):
        assert f"\n{option}: " in text, option
    cfg = compose("evaluate", EvaluateRun, [f"protocol={protocol}", "run_dir=r", "inception=FILE"])
    assert cfg.captions.startswith("r/shards/") and cfg.reference.startswith("r/shards/")
    assert compose("evaluate", EvaluateRun, [f"protocol={protocol}", "run_dir=r", "steps=7"]).steps == 7
