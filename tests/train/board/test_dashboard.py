"""The dashboard: its panels show what runs really log, it needs no network, and the server only when asked."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.entry import compose
from conf.errors import UserError
from conf.schema import DashboardRun, Perceptual
from train.board import dashboard
from train.board.panels import EVALUATIONS, IMAGES, SECTIONS, TRAININGS, Panel, logged_names
from train.board.run_folder import RunFolder
from train.engine import trainer
from train.engine.runtime import start
from train.training.distillation.stage import DistillStage

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # wandb-workspaces, on import

ROOT = Path(__file__).parents[3]
CONDITIONAL = {  # by trainings, with some option or on some device only
    "perf/mfu",  # of GPUs whose peak is known
    "data/skipped",  # stream.skip_broken
    "train/loss_scale/unet",  # runtime.precision=fp16, also those below
    "train/loss_scale/generator",
    "train/loss_scale/clip",
    "train/perceptual",  # loss.perceptual, also those below
    "eval/lpips",
    "eval/efficientnet",
    "train/codebook_use",  # model.num_vq_embeddings
    "eval/codebook_use",
    "train/gan_generator",  # after loss.adversarial_start
    "train/gan_discriminator",
    "train/grad_norm_discriminator",
    "train/logits_real",
    "train/logits_fake",
}


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def config(folder: Path, *overrides: str) -> DashboardRun:
    return compose("dashboard", DashboardRun, [f"run_dir={folder}", *overrides])


def panels() -> Iterator[Panel]:
    return (panel for section in SECTIONS.values() for panel in section)


@pytest.fixture(scope="module")
def distilled(project: Any, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The project's run with a student."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    shutil.copytree(project.folder, folder, ignore=lambda *_: {"shards", "checkpoints"})
    short = ["loop.samples=32", "loop.log_every=16", "loop.evaluate_every=32", "sample_prompts=2"]
    cfg = project.config("distill", f"output_dir={folder}/student", *short)
    runtime = start(cfg.runtime)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    return RunFolder.open(folder)


def test_every_panel_shows_what_a_run_logged(distilled: RunFolder) -> None:
    """Each stage of a panel, or it is a metric of some option, or of drawn images, which evaluations log."""
    logged = {name: {metric for row in stage.rows for metric in row} for name, stage in distilled.stages.items()}
    for panel in panels():
        trainings = set(panel.stages) - EVALUATIONS.keys()
        of_evaluations = len(trainings) < len(panel.stages)
        for name in logged_names(panel):
            if name in CONDITIONAL:
                assert not any(name in logged[stage] for stage in trainings), f"{name} is logged always"
            elif not (of_evaluations and name.startswith(("eval/", "probe/", "perf/"))):
                assert all(name in logged[stage] for stage in trainings), f"{panel.title}: nobody logs {name}"
    drawn = {name for stage in TRAININGS for name in distilled.stages[stage].images}
    assert drawn <= {images.name for images in IMAGES}


def test_the_specification_is_a_file_with_all_panels_and_needs_no_network(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "unet/wandb_run_id").write_text("abc123")
    path = dashboard.write_dashboard(config(run_dir, f"output_dir={tmp_path}", "wandb.project=here", "wandb.entity=us"))
    view = json.loads(path.read_text())
    assert (view["entity"], view["project"], view["displayName"]) == ("us", "here", "Latentline run")
    content = view["spec"]["section"]
    sections = {section["name"]: section["panels"] for section in content["panelBankConfig"]["sections"]}
    assert list(sections) == ["Quality", "Images", *list(SECTIONS)[1:]]
    plots = {panel["config"]["chartTitle"]: panel["config"] for name in SECTIONS for panel in sections[name]}
    assert len(plots) == len(list(panels()))
    assert all(plot["xAxis"] == "samples_seen" for plot in plots.values())
    assert plots["FID"]["metrics"][:2] == ["eval/fid", "eval/loop/fid"]
    assert plots["FID"]["overrideMarks"]["abc123:eval/fid_low"] == "dashed"
    assert [panel["config"]["mediaKeys"] for panel in sections["Images"]] == [[f"samples/{p.name}"] for p in IMAGES]


@pytest.mark.parametrize(
    ("given", "recorded", "group"),
    [(None, None, "run"), (None, "run/sweep", "run/sweep"), ("it's mine", "run/sweep", "it's mine")],
    ids=["name of the folder", "as recorded", "chosen"],
)
def test_only_the_runs_of_the_folder_are_shown(
    tmp_path: Path, given: str | None, recorded: str | None, group: str
) -> None:
    folder = tmp_path / "run" / "unet"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    (folder / "config.yaml").write_text(json.dumps({"wandb": {"group": recorded}}))
    overrides = [] if given is None else [f'wandb.group="{given}"']
    view = json.loads(dashboard.write_dashboard(config(tmp_path / "run", *overrides)).read_text())
    (runs,) = view["spec"]["section"]["runSets"]
    assert [rule["value"] for rule in runs["filters"]["filters"]] == [group]


def test_without_login_nothing_is_sent_and_one_line_says_why(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save=true: not logged in.*wandb login"):
        dashboard.write_dashboard(config(run_dir, f"output_dir={tmp_path}", "save=true"))
    assert (tmp_path / "dashboard.json").is_file()


def test_the_workspace_is_made_once_and_then_brought_up_to_date(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb_workspaces.workspaces import interface

    sent: list[tuple[str, str]] = []

    def server(view: Any) -> dict[str, Any]:
        sent.append((view.name, view.id))
        return {"upsertView": {"view": {"id": "view-7", "name": view.name}}}

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(interface.internal, "upsert_view2", server)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    monkeypatch.setattr("wandb.Api", lambda: None)
    monkeypatch.setattr("wandb.termlog", lambda text: None)
    for _ in range(2):
        dashboard.write_dashboard(config(run_dir, f"output_dir={tmp_path}", "save=true", "wandb.entity=us"))
    assert sent[0][1] == "" and sent[1] == (sent[0][0], "view-7")
    assert "https://wandb.example/us/latentline?nw=" in capsys.readouterr().out


def test_a_server_that_refuses_costs_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces.workspaces import interface

    def server(view: Any) -> None:
        raise ValueError("permission denied\nmore")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(interface.internal, "upsert_view2", server)
    with pytest.raises(UserError, match=r"permission denied; .*dashboard\.json was written") as refusal:
        dashboard.write_dashboard(config(run_dir, f"output_dir={tmp_path}", "save=true", "wandb.entity=us"))
    assert "\n" not in str(refusal.value) and "0" * 40 not in str(refusal.value)


def literals() -> set[str]:
    """Pieces of text that the code makes names of: its string constants, and what is fixed in its f-strings."""
    found: set[str] = set()
    for path in (ROOT / "train").rglob("*.py"):
        if path.parent.name != "board":
            constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            found |= {value for value in constants if isinstance(value, str) and "\n" not in value and " " not in value}
    return found


def made_of(name: str, pieces: set[str]) -> bool:
    """Whether a name is a row of such pieces."""
    ends = {0}
    for end in range(1, len(name) + 1):
        if any(name[start:end] in pieces for start in ends):
            ends.add(end)
    return len(name) in ends


def test_every_name_that_trainings_do_not_always_log_can_be_made_by_the_code() -> None:
    pieces = {piece for piece in literals() if len(piece) > 1}
    pieces |= {"r", "_", "/"}  # of reconstructions; before an extractor; before what a judge reads
    assert not any(made_of(name, pieces) for name in ("eval/fud_clip", "train/gan_generators", "eval/fid_lower"))
    measured = {name for panel in panels() if EVALUATIONS.keys() & set(panel.stages) for name in logged_names(panel)}
    pieces |= {piece.replace("clip", "clip_score") for piece in pieces}  # as train/evaluation/targets.py does
    pieces |= {kind.value for kind in Perceptual}
    assert [name for name in sorted(measured | CONDITIONAL) if not made_of(name, pieces)] == []
