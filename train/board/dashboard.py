"""The W&B workspace of a run as code: the panels of `panels.py`, in `dashboard.json` and, if wanted, on the server."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps, read_object
from conf.schema import DashboardRun, WandbMode
from train.board.panels import IMAGES, SECTIONS, Panel, bounds, logged_names
from train.board.run_folder import RunFolder
from train.engine.metric_log import X_AXIS, say, wandb_mode

if TYPE_CHECKING:
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import interface as reports

DASHBOARD = "dashboard.json"
OPEN = ("Quality", "Loss", "Throughput")  # sections that are unfolded at first
SMOOTHING = 0.6  # of the curves of a training


def write_dashboard(cfg: DashboardRun) -> Path:
    """Write the specification; with `save`, create the workspace or bring the one of an earlier call up to date.

    Raises:
        UserError: no run in the folder; nobody is logged in, or the server refuses.
    """
    path = Path(cfg.output_dir) / DASHBOARD
    workspace = build_workspace(cfg, RunFolder.open(cfg.run_dir))
    before = read_object(path)  # says which workspace an earlier call has made
    workspace._internal_name, workspace._internal_id = before.get("name", ""), before.get("id", "")
    write_specification(path, workspace)
    panels = sum(len(section.panels) for section in workspace.sections)
    say("dashboard", f"{panels} panels: {path}")
    if cfg.save:
        save_workspace(cfg, workspace, path)
    return path


def build_workspace(cfg: DashboardRun, run: RunFolder) -> "workspaces.Workspace":
    """The workspace that shows the runs of one run folder."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import interface as reports

    recorded = [stage.section("wandb").get("group") for stage in run.stages.values()]
    group = cfg.wandb.group or next(filter(None, recorded), run.path.name)  # as the journal names it
    sections = [
        workspaces.Section(
            name=title, panels=[line_plot(panel, run_ids(run, panel)) for panel in panels], is_open=title in OPEN
        )
        for title, panels in SECTIONS.items()
    ]
    browsers: list[Any] = [
        reports.MediaBrowser(title=shown.title, media_keys=[f"samples/{shown.name}"], gallery_axis="step")
        for shown in IMAGES
    ]
    sections.insert(1, workspaces.Section(name="Images", panels=browsers, is_open=True))
    return workspaces.Workspace(
        entity=cfg.wandb.entity or "",
        project=cfg.wandb.project,
        name=cfg.wandb.name or f"Latentline {run.path.name}",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=workspaces.RunsetSettings(filters=f'Metric("Group") == {group!r}'),
    )


def line_plot(panel: Panel, ids: list[str]) -> "reports.LinePlot":
    """One panel; the ends of an interval are dashed."""
    from wandb_workspaces.reports.v2 import interface as reports

    ends = [end for metric in panel.bounded for end in bounds(metric)]
    training = any(name.startswith("train/") for name in panel.metrics)
    return reports.LinePlot(
        title=f"{panel.title} [{panel.unit}]" if panel.unit else panel.title,
        x=X_AXIS,
        y=list(logged_names(panel)),
        log_y=panel.logarithmic or None,
        smoothing_type="exponentialTimeWeighted" if training else "none",
        smoothing_factor=SMOOTHING if training else None,
        smoothing_show_original=training or None,
        line_marks={f"{run_id}:{name}": "dashed" for run_id in ids for name in ends} or None,
    )


def run_ids(run: RunFolder, panel: Panel) -> list[str]:
    """W&B's ids of the runs behind a panel; an evaluation belongs to the run of its U-Net."""
    files = [run.path / stage / "wandb_run_id" for stage in panel.stages]
    return sorted({file.read_text().strip() for file in files if file.is_file()})


def save_workspace(cfg: DashboardRun, workspace: "workspaces.Workspace", path: Path) -> None:
    """Put the workspace on the server and remember which one it is."""
    if wandb_mode(cfg.wandb.mode) is not WandbMode.online:
        raise UserError(f"save=true: not logged in to W&B, so only {path} was written: run `wandb login` first")
    import wandb

    try:
        workspace.entity = cfg.wandb.entity or wandb.Api().default_entity or ""
        workspace.save()
        url = workspace.url
    except Exception as error:  # whatever the server or the way to it may raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"save=true: W&B: {reason}; {path} was written") from error
    write_specification(path, workspace)
    say("dashboard", url)


def write_specification(path: Path, workspace: "workspaces.Workspace") -> None:
    """The specification as the server would get it."""
    specification: dict[str, Any] = workspace._spec
    atomic_write(path, dumps(specification, indent=1).encode())
