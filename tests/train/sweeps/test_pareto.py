"""After a sweep: the front is right, what cannot be compared is left out and named, the plots can be told apart."""

import csv
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pytest
from PIL import Image

from conf.entry import CONF, register
from conf.schema import EvaluateRun, Sampler, WandbConfig, WandbMode
from train.sweeps import pareto
from train.sweeps.plots import Looks, pareto_figure, steps_figure
from train.sweeps.results import read_sweep, undominated

OFF = WandbConfig(mode=WandbMode.disabled)
METRICS = {"eval/fid": 20.0, "eval/clip_score": 0.2, "perf/pictures_per_s": 4.0}

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Leaves what a member of a sweep leaves, in a folder named after its options."""

    def result(
        metrics: dict[str, float | None],
        sweep: str = "now",
        error: str | None = None,
        samples: int = 128,
        **options: Any,
    ) -> None:
        overrides = [f"{name}={value}" for name, value in options.items()]
        folder = tmp_path / ",".join(overrides)
        folder.mkdir()
        record = {"sweep": sweep, "name": folder.name, "overrides": ["run_dir=runs/x", *overrides], "error": error}
        (folder / "member.json").write_text(json.dumps(record))
        if metrics:
            protocol = {"samples": samples, "steps": 30, "guidance_scale": 3.0, "guidance_interval": []}
            (folder / "metrics.json").write_text(json.dumps(metrics))
            (folder / "protocol.json").write_text(json.dumps(protocol))
            (folder / "metrics.jsonl").write_text('{"samples_seen": 640, "eval/fid": 1.0}\n')

    return result


def test_dominated_points_are_not_on_the_front() -> None:
    costs = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (4.0, 1.0), (5.0, 5.0)]
    assert undominated(costs) == [0, 1, 4, 5]
    assert undominated([]) == []


def test_front_is_of_small_distance_and_high_score_or_little_time(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, guidance, fid, score, speed in (
        (10, 1, 30.0, 0.10, 8.0),  # the fastest
        (10, 3, 20.0, 0.20, 4.0),
        (50, 3, 15.0, 0.21, 1.0),  # the closest
        (50, 7, 25.0, 0.30, 1.0),  # the best score
        (10, 7, 26.0, 0.25, 4.0),  # beaten in both plots
    ):
        metrics = {"eval/fid": fid, "eval/clip_score": score, "perf/pictures_per_s": speed}
        write(metrics | {"eval/fid_low": fid - 1, "eval/fid_high": fid + 1}, steps=steps, guidance_scale=guidance)
    write({}, error="the data are missing", steps=20, guidance_scale=1)
    pareto.write_pareto(tmp_path, "now", OFF, "runs/x")
    found = json.loads((tmp_path / "pareto/pareto.json").read_text())
    assert (found["swept"], found["distance"]) == (["steps", "guidance_scale"], "eval/fid")
    assert {tuple(m["options"].values()): m["front"] for m in found["members"]} == {
        (10, 1): ["seconds_per_image"],
        (10, 3): ["seconds_per_image"],
        (10, 7): [],
        (50, 3): ["eval/clip_score", "seconds_per_image"],
        (50, 7): ["eval/clip_score"],
    }
    assert found["left_out"] == {"steps=20,guidance_scale=1": "the data are missing"}
    printed = capsys.readouterr().out
    assert "without steps=20,guidance_scale=1: the data are missing" in printed
    table = (tmp_path / "pareto/table.md").read_text()
    assert table in printed and "20 [19, 21]" in table and "| CLIP score, seconds per image |" in table
    assert [line.split("|")[1:3] for line in table.splitlines()[2:]] == [
        [f" {steps}    ", f" {guidance}              "]
        for steps, guidance in [(10, 1), (10, 3), (10, 7), (50, 3), (50, 7)]
    ]
    with (tmp_path / "pareto/members.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["steps"], rows[0]["eval/fid"], rows[0]["seconds_per_image"]) == ("10", "30.0", "0.125")
    with Image.open(tmp_path / "pareto/pareto.png") as image:
        assert image.width > 1500
    assert not (tmp_path / "pareto/steps.png").exists()  # of one sampler


@pytest.mark.parametrize(
    ("metrics", "trade_offs"),
    [
        ({"eval/fd_efficientnet": 5.0, "eval/fd_efficientnet_floor": 4.0}, []),
        ({"eval/fd_clip": 5.0, "perf/pictures_per_s": 2.0}, ["seconds_per_image"]),
        ({"eval/fd_clip": 5.0, "eval/fid": 7.0, "eval/clip_score_own": 0.3}, ["eval/clip_score_own"]),
        (
            {"eval/fid": 5.0, "eval/prompt_following/kind": 0.5, "eval/prompt_following/color": 0.7},
            ["eval/prompt_following"],
        ),
    ],
    ids=["neither", "time alone", "score alone", "the probe as score"],
)
def test_each_metric_has_its_panel_if_it_is_there(
    write: Write, tmp_path: Path, metrics: dict[str, float], trade_offs: list[str]
) -> None:
    for steps in (2, 4):
        write(metrics, steps=steps)
    sweep = read_sweep(tmp_path, "now")
    assert sweep.trade_offs == trade_offs
    assert sweep.distance == next(name for name in ("eval/fid", *metrics) if name in metrics)
    figure = pareto_figure(sweep)
    assert (len(figure.axes) if figure else 0) == len(trade_offs)
    if trade_offs == ["eval/prompt_following"]:
        assert sweep.results[0].metrics[trade_offs[0]] == pytest.approx(0.6)
    pareto.write_pareto(tmp_path, "now", OFF, "runs/x")
    assert (tmp_path / "pareto/pareto.png").exists() == bool(trade_offs)
    assert "4" in (tmp_path / "pareto/table.md").read_text()


def test_members_that_lack_a_metric_stay_in_the_other_panels(write: Write, tmp_path: Path) -> None:
    write(METRICS, sampler="ddim", steps=10)
    write(METRICS | {"eval/fid": 10.0}, sampler="heun", steps=10)
    write({"eval/fid": 5.0, "eval/clip_score": None}, sampler="heun", steps=20)
    sweep = read_sweep(tmp_path, "now")
    assert [len(sweep.having("eval/fid", metric)) for metric in sweep.trade_offs] == [2, 2]
    pareto.write_pareto(tmp_path, "now", OFF, "runs/x")
    assert "| heun | 10       | 5        |" in (tmp_path / "pareto/table.md").read_text()


def test_sweep_started_again_shows_earlier_members_of_the_same_protocol(write: Write, tmp_path: Path) -> None:
    write(METRICS, sweep="before", steps=10)
    write(METRICS, sweep="before", steps=20, samples=64)
    write(METRICS, steps=40, guidance_scale=3)
    write(METRICS, guidance_interval="[0.3,5]")  # at the protocol's 30 steps
    sweep = read_sweep(tmp_path, "now")
    assert sweep.varied == ["steps", "guidance_interval"]
    assert [result.option("steps") for result in sweep.results] == [10, 30, 40]
    assert sweep.left_out == {"steps=20": "of an earlier start, with other samples"}
    pareto.write_pareto(tmp_path, "now", OFF, "runs/x")


def test_nothing_to_draw_is_said(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({}, error="ended by SIGKILL", steps=10)
    write({}, steps=20)
    pareto.write_pareto(tmp_path, "now", OFF, "runs/x")
    printed = capsys.readouterr().out
    assert "without steps=10: ended by SIGKILL" in printed and "without steps=20: no metrics.json" in printed
    assert "there is nothing to draw" in printed and not (tmp_path / "pareto").exists()


def test_all_samplers_can_be_told_apart(write: Write, tmp_path: Path) -> None:
    """Each has its own colour and its own marker, and they are listed in the order of the schema."""
    for number, (sampler, steps) in enumerate(product(Sampler, (5, 50))):
        write(METRICS | {"eval/fid": 100 / steps + number}, sampler=sampler.value, steps=steps)
    sweep = read_sweep(tmp_path, "now")
    looks = [Looks(sweep).of_kind(sampler.value) for sampler in Sampler]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(Sampler)
    figure = steps_figure(sweep)
    assert figure is not None
    for axes in figure.axes:
        assert len(axes.lines) == len(Sampler) and axes.get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [sampler.value for sampler in Sampler]


def test_lines_over_steps_are_of_the_guidance_with_the_smallest_distance(write: Write, tmp_path: Path) -> None:
    """Both metrics of one member, not the best of each."""
    for sampler, steps, guidance in product(("ddim", "unipc"), (5, 50), (1, 3)):
        metrics = {"eval/fid": 9.0 - guidance, "eval/clip_score": 0.4 - guidance / 10}
        write(metrics, sampler=sampler, steps=steps, guidance_scale=guidance)
    figure = steps_figure(read_sweep(tmp_path, "now"))
    assert figure is not None
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == [[6, 6], pytest.approx([0.1, 0.1])]


def test_wandb_run_of_its_own_holds_table_charts_and_images(write: Write, tmp_path: Path, wandb_history: Any) -> None:
    for sampler, steps in product(("ddim", "unipc"), (5, 50)):
        write(METRICS | {"eval/fid": 100.0 / steps}, sampler=sampler, steps=steps)
    cfg = WandbConfig(mode=WandbMode.offline, group="x/sweep/evaluate")
    pareto.write_pareto(tmp_path, "now", cfg, "runs/x")
    (row,) = wandb_history(tmp_path / "pareto")
    assert row["samples_seen"] == 640 and row["pareto/members/nrows"] == 4
    for chart in ("pareto/FID against CLIP score", "pareto/FID against seconds per image"):
        assert row[f"{chart}_table/nrows"] == 4
    for name in ("pareto", "steps"):
        with Image.open(tmp_path / f"pareto/{name}.png") as image:
            assert row[f"samples/{name}/width"] == image.width


def test_evaluate_compares_its_members_in_their_wandb_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is swept is not part of the configuration then, so that it need not be sound by itself."""
    from train.evaluate import compare_members

    told: list[Any] = []
    monkeypatch.setattr(pareto, "write_pareto", lambda *given: told.append(given))
    register("evaluate", EvaluateRun, [])
    for mine, group in (([], "x/sweep/evaluate"), (["wandb.group=mine"], "mine")):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            given = ["run_dir=runs/x", "eta=0.5", "wandb.project=p", *mine]
            composed = hydra.compose("evaluate", given, return_hydra_config=True)
        compare_members(Path("runs/x/sweep/evaluate"), "now", composed)
        assert told.pop() == (Path("runs/x/sweep/evaluate"), "now", WandbConfig(project="p", group=group), "runs/x")
