"""`report.html`: everything that a run folder has, on one page that asks nobody for anything."""

import time
from pathlib import Path
from typing import Any

from markupsafe import Markup

from conf.files import atomic_write
from conf.schema import ReportRun
from train.board import curves, facts
from train.board.data_facts import DataFacts, look
from train.board.images import galleries
from train.board.markup import templates
from train.board.run_folder import RunFolder
from train.engine.metric_log import say

PAGE = Path(__file__).parent / "page"
REPORT = "report.html"
MISSING = (  # (what, whether it is there, what brings it)
    ("an autoencoder", "autoencoder", "train/train_autoencoder.py"),
    ("a CLIP", "clip", "train/train_clip.py"),
    ("latents", "latents", "data/precompute_latents.py"),
    ("a U-Net", "unet", "train/train_unet.py"),
    ("an evaluation", "evaluation", "train/evaluate.py"),
)


def write_report(cfg: ReportRun) -> Path:
    """Write the page and say where it is.

    Raises:
        UserError: there is no run in the folder.
    """
    folder = RunFolder.open(cfg.run_dir)
    path = Path(cfg.output_dir) / REPORT
    page = render_report(cfg, folder)
    atomic_write(path, page.encode())
    say("report", f"{len(page.encode()) / 1e6:.1f} MB: {path}")
    return path


def render_report(cfg: ReportRun, run: RunFolder) -> str:
    """The page as text, with everything in it."""
    return render(run, "", cfg.shards, report_contents(cfg, run, look(cfg, run), round(cfg.images_mb * 1e6)))


def render_live(cfg: ReportRun, run: RunFolder, data: DataFacts | None, version: str) -> str:
    """The page of a run that goes on, or has not begun; it asks its server for images, and for newer versions."""
    return render(run, version, cfg.shards, report_contents(cfg, run, data, budget=None))


def render(run: RunFolder, version: str, shards: str, contents: dict[str, Any]) -> str:
    """The template with its values. Whatever stands in captions, configurations and names is escaped."""
    environment = templates(PAGE)
    environment.filters["withheld"] = facts.without_credentials
    return environment.get_template("report.html").render(
        title=run.path.resolve().name,
        made=time.strftime("%Y-%m-%d %H:%M:%S" if version else "%Y-%m-%d %H:%M"),
        version=version,
        css=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup((PAGE / "report.js").read_text(encoding="utf-8")),
        shards=shards,
        **contents,
    )


def report_contents(cfg: ReportRun, run: RunFolder, data: DataFacts | None, budget: int | None) -> dict[str, Any]:
    """What the template shows, with images as of `galleries`."""
    charts = curves.sections(run)
    return {
        "cards": facts.cards(run),
        "stages": facts.stage_table(run),
        "evaluations": facts.last_evaluations(run),
        "quality": [chart for chart in charts.pop("Quality", []) if curves.moves(chart)],
        "curves": charts,
        "images": galleries(run, cfg.frames, budget),
        "data": data,
        "protocols": {name: facts.flat(protocol) for name, protocol in run.protocols.items()},
        "configs": {name: stage.config_text for name, stage in run.stages.items() if stage.config_text},
        "missing": [(what, how) for what, stage, how in MISSING if stage not in run.stages],
    }
