"""The record of a stage: metrics.jsonl (the truth), config.yaml, samples/*.png, a console line and Weights & Biases.

metrics.jsonl holds one flat object per line, `samples_seen` and `time` (Unix seconds) and then the metrics by their
full names; a value that is not finite is null. W&B is a copy for looking at: when it fails, training goes on.
"""

import io
import math
import netrc
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlparse

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.text import Text

from conf.errors import UserError
from conf.files import atomic_write
from conf.overrides import literally
from conf.plain_json import dumps, loads
from conf.schema import WandbConfig, WandbMode
from train.engine.inbox import Inbox

if TYPE_CHECKING:
    import wandb

WANDB_INIT_TIMEOUT_S = 60.0  # then the run goes on offline
WANDB_FINISH_TIMEOUT_S = 300.0  # for the last upload
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where `wandb login` goes unless $WANDB_BASE_URL is set
METRICS, CONFIG, X_AXIS = "metrics.jsonl", "config.yaml", "samples_seen"
DETAILS = ("perf/", "train/loss_by_timestep/")  # for the dashboard only
CAPTIONS = "Captions"  # of an image's `info`, and the text chunk of its PNG: those that are drawn in it, as JSON
SPREAD = ("_low", "_high", "_std")  # likewise, at the end of a name


def say(stage: str, text: str) -> None:
    """One line of the console; long ones are never broken, so that logs can be searched."""
    line = Text.assemble((f"{stage:<12}", "bold cyan"), text)
    Console(highlight=False).print(line, soft_wrap=True)


class MetricLog:
    """Writes on the main process and does nothing on the others.

    Args:
        output_dir: the stage's folder.
        job_type: the stage's name, in W&B and on the console.
        config: the resolved configuration, plain values only.
        samples_seen: where the run continues; what was recorded after it never happened and is dropped.
        prefix: begins the lines of the console; empty: the job type.

    Raises:
        OSError: the folder cannot be written.

    """

    def __init__(
        self,
        output_dir: Path | str,
        cfg: WandbConfig,
        job_type: str,
        config: Mapping[str, Any],
        is_main: bool,
        samples_seen: int = 0,
        prefix: str = "",
    ) -> None:
        self.output_dir, self.prefix, self.is_main = Path(output_dir), prefix or job_type, is_main
        self.latest: list[dict[str, Any]] = []  # rows of the highest samples_seen so far
        self.wandb: WandbCopy | None = None
        self.inbox = Inbox(self.output_dir)
        if not is_main:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(self.output_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(literally(config))).encode())
        self.path = self.output_dir / METRICS
        rows = [row for row in read_metrics(self.path) if row[X_AXIS] <= samples_seen]
        atomic_write(self.path, "".join(dumps(row) + "\n" for row in rows).encode())
        self.latest = [row for row in rows if row[X_AXIS] == rows[-1][X_AXIS]]
        self.file = self.path.open("a", encoding="utf-8")
        mode = wandb_mode(cfg.mode)
        if mode is not WandbMode.disabled:
            self.wandb = WandbCopy(self.output_dir, cfg, mode, job_type, config)
            self.wandb.replay(rows)

    @property
    def run_id(self) -> str:
        """Of the W&B run; empty where there is none."""
        return self.wandb.run_id if self.wandb is not None else ""

    def log(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by their full names (`train/loss`)."""
        if not self.is_main or not metrics:
            return
        row = {X_AXIS: samples_seen, "time": round(time.time(), 3), **finite_metrics(metrics)}
        self.file.write(dumps(row) + "\n")
        self.file.flush()
        self.latest = [*(r for r in self.latest if r[X_AXIS] == samples_seen), row]
        say(self.prefix, metrics_line(samples_seen, metrics))
        if self.wandb is not None:
            self.wandb.log(samples_seen, metrics)
            self.wandb.forward(self.inbox)

    def image(self, name: str, image: np.ndarray | Image.Image, samples_seen: int, caption: str = "") -> Path:
        """Record an image or pixels, uint8 [H, W, 3], as samples/<name>-<samples_seen>.png; returns that path."""
        path = self.output_dir / "samples" / f"{name.replace('/', '-')}-{samples_seen:012d}.png"
        if not self.is_main:
            return path
        atomic_write(path, png_of(Image.fromarray(image) if isinstance(image, np.ndarray) else image))
        if self.wandb is not None:
            self.wandb.image(f"samples/{name}", path, samples_seen, caption)
        return path

    def recorded(self, samples_seen: int, prefix: str = "eval/") -> dict[str, float]:
        """What the newest rows say under a prefix, if they are of `samples_seen`; an earlier start may have put it."""
        rows = [row for row in self.latest if row[X_AXIS] == samples_seen]
        return {k: math.nan if v is None else v for row in rows for k, v in row.items() if k.startswith(prefix)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.finish(0 if kind is None else 1)

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and let W&B write what it holds."""
        if not self.is_main:
            return
        self.file.close()
        if self.wandb is not None:
            self.wandb.forward(self.inbox)
            self.wandb.finish(exit_code)


def png_of(image: Image.Image) -> bytes:
    """Contents of a PNG, with the captions that are drawn in it as text beside the pixels."""
    content, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if CAPTIONS in image.info:
        info.add_itxt(CAPTIONS, dumps(image.info[CAPTIONS]))
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def captions_in(content: bytes) -> list[str]:
    """The captions of a PNG that `png_of` made; none of another file."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            found = loads(image.info.get(CAPTIONS, "[]"))
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [str(caption) for caption in found] if isinstance(found, list) else []


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: None for what is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def read_config(output_dir: Path) -> DictConfig:
    """The resolved configuration of a stage; raises UserError where there is none that can be read."""
    path = output_dir / CONFIG
    try:
        found = OmegaConf.load(path) if path.is_file() else None
    except (ValueError, yaml.YAMLError, OmegaConfBaseException):
        found = None
    except OSError as error:
        if error.errno is not None:  # OmegaConf's word for a number in place of options has none
            raise
        found = None
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} is missing or no configuration of a stage: point at the folder of a training")
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, none where there is no file; ends at a line that a kill cut off, or that is no row."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or type(row.get(X_AXIS)) is not int:
            break
        rows.append(row)
    return rows


def metrics_line(samples_seen: int, metrics: Mapping[str, float]) -> str:
    """One console line; of the timings only speed and time left, of the rest what is no detail."""
    told = {n: v for n, v in metrics.items() if not n.startswith(DETAILS) and not n.endswith(SPREAD)}
    shown = {n.removeprefix("train/"): f"{v:.4g}" for n, v in told.items()}
    if metrics.get("train/skipped_steps") == 0:
        del shown["skipped_steps"]
    parts = [f"{samples_seen:>11,}", *(f"{name} {value}" for name, value in shown.items())]
    if "perf/images_per_s" in metrics:
        parts.append(f"{metrics['perf/images_per_s']:.4g} images/s")
    if "perf/eta_s" in metrics:
        minutes, seconds = divmod(round(metrics["perf/eta_s"]), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return "  ".join(parts)


def wandb_mode(mode: WandbMode) -> WandbMode:
    """What `auto` means here: $WANDB_MODE where it is set, else online when logged in, else offline."""
    if mode is not WandbMode.auto:
        return mode
    wish = os.environ.get("WANDB_MODE", "")
    if wish in ("offline", "online", "disabled"):
        return WandbMode(wish)
    return WandbMode.online if logged_in() else WandbMode.offline


def logged_in() -> bool:
    """Whether a key for the W&B server is in the environment or in netrc; the key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlparse(server).netloc,) if server else WANDB_HOSTS
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class WandbCopy:
    """The same rows in W&B. Nothing here raises: the first failure is told in one line, the rest is left out.

    A run keeps its id in output_dir/wandb_run_id over all its starts. W&B's own step is samples_seen, so a row that is
    sent twice lands on itself.
    """

    def __init__(
        self, output_dir: Path, cfg: WandbConfig, mode: WandbMode, job_type: str, config: Mapping[str, Any]
    ) -> None:
        self.job_type, self.warned = job_type, False
        self.run: wandb.Run | None = None
        self.output_dir, self.cfg, self.config = output_dir, cfg, config
        id_file = output_dir / "wandb_run_id"
        if not id_file.exists():
            atomic_write(id_file, os.urandom(6).hex().encode())  # ours: known before W&B answers, if it ever does
        self.run_id = id_file.read_text().strip()
        if mode is WandbMode.online:
            self._attempt(lambda: self._start("online"))
        if self.run is None:
            self._attempt(lambda: self._start("offline", again=mode is WandbMode.online))

    def _start(self, mode: Literal["online", "offline"], again: bool = False) -> None:
        import wandb  # only the main process, and only when it is wanted, waits for the import

        if again:
            wandb.teardown()  # its service still holds the id of the run that could not start
        settings = wandb.Settings(
            silent=True,
            console="off",  # the console line is ours, and metrics.jsonl says the same
            init_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=WANDB_FINISH_TIMEOUT_S,
        )
        run_dir = Path(self.config.get("run_dir", self.output_dir.parent)).name
        run = wandb.init(
            project=self.cfg.project,
            entity=self.cfg.entity,
            dir=str(self.output_dir.absolute()),
            id=self.run_id,
            name=self.cfg.name or f"{run_dir}/{self.job_type}",
            group=self.cfg.group or run_dir,
            job_type=self.job_type,
            config=dict(self.config),
            mode=mode,
            resume="allow",  # the run of an earlier start where W&B has it, else a new one: offline it cannot know
            settings=settings,
        )
        # Charts are over samples seen whatever W&B's own step is, which may run ahead of it (see `log`).
        run.define_metric(X_AXIS)
        run.define_metric("*", step_metric=X_AXIS)
        self.run = run
        sync = ["wandb", "sync", str(Path(run.dir).parent)]
        where = run.url if mode == "online" else f"offline; upload with: {shlex.join(sync)}"
        say(self.job_type, f"W&B run {self.run_id} ({where})")

    def replay(self, rows: list[dict[str, Any]]) -> None:
        """Send what W&B does not have yet: a kill loses what it buffered, and an offline log begins empty."""
        if self.run is None:
            return
        known = self.run.step  # where W&B's own count goes on: one past the last row that reached it
        for row in rows:
            if row[X_AXIS] >= known:
                self.log(row[X_AXIS], {k: v for k, v in row.items() if k not in (X_AXIS, "time") and v is not None})

    def log(self, samples_seen: int, values: Mapping[str, Any]) -> None:
        """Add values to the row of `samples_seen`."""

        def send() -> None:
            if self.run is not None:
                # W&B drops what is logged at a step before its latest one. So what is of the past (after a kill, or
                # of an evaluation that took long) gets a row of its own there, in which samples_seen is right.
                step = samples_seen if samples_seen >= self.run.step else self.run.step + 1
                self.run.log({X_AXIS: samples_seen, **values}, step=step)

        self._attempt(send)

    def image(self, name: str, path: Path, samples_seen: int, caption: str) -> None:
        """Add an image to the row of `samples_seen`."""

        def send() -> None:
            import wandb

            self.log(samples_seen, {name: wandb.Image(str(path), caption=caption or None)})

        self._attempt(send)

    def forward(self, inbox: Inbox) -> None:
        """Add what another process, an evaluation of this training, has left."""

        def send() -> None:
            for message in inbox.new():
                known = {name: value for name, value in message.metrics.items() if value is not None}
                self.log(message.samples_seen, known)
                if message.image is not None:
                    self.image(f"samples/{message.name}", Path(message.image), message.samples_seen, "")

        self._attempt(send)

    def table(
        self, name: str, rows: Sequence[Mapping[str, Any]], charts: Mapping[str, tuple[str, str]], samples_seen: int
    ) -> None:
        """Add a table of rows with the same columns, and named charts of one column (x) and another (y) of it."""

        def send() -> None:
            import wandb

            values = [list(row.values()) for row in rows]
            table = wandb.Table(columns=list(rows[0]), data=values, allow_mixed_types=True)
            points = {title: wandb.plot.scatter(table, x, y, title) for title, (x, y) in charts.items()}
            self.log(samples_seen, {name: table, **points})

        self._attempt(send)

    def finish(self, exit_code: int) -> None:
        """Flush and leave."""
        self._attempt(lambda: self.run.finish(exit_code=exit_code) if self.run is not None else None)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do it, or say once that it failed: on one process alone, an error would leave the others waiting for it."""
        try:
            action()
        except Exception as error:  # whatever a dashboard can raise, it must not stop a training
            if not self.warned:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                print(
                    f"warning: W&B: {reason}; training goes on, metrics.jsonl is complete", file=sys.stderr, flush=True
                )
            self.warned = True
