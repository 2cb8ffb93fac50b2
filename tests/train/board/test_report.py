"""What stands on the page, whatever a run has so far: its numbers, its images within their budget, its gaps."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ReportRun
from data.shards.shard import ShardWriter
from train.board import curves, facts, report
from train.board.images import galleries
from train.board.panels import Panel
from train.board.run_folder import RunFolder
from train.engine.image_grid import captioned
from train.engine.metric_log import captions_in, png_of


def render(folder: Path, *overrides: str) -> str:
    return report.render_report(compose("report", ReportRun, [f"run_dir={folder}", *overrides]), RunFolder.open(folder))


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no run.*run_dir"):
            render(folder)


def test_a_run_that_has_only_begun_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder/metrics.jsonl").write_text('{"samples_seen": 10, "time": 5, "train/loss": null}\n{"samp')
    page = render(tmp_path)
    assert "a CLIP (<code>train/train_clip.py</code>)" in page and "an evaluation" in page
    assert "No images yet" in page and "set <code>shards=FOLDER</code>" in page
    assert "an autoencoder" not in page


def scene_shards(folder: Path, caption: str, meta: str) -> None:
    for side in ("train", "heldout"):
        with ShardWriter(folder / "shards" / side, 10) as writer:
            image = io.BytesIO()
            Image.new("RGB", (40, 32)).save(image, "PNG")
            writer.add("0", {"png": image.getvalue(), "txt": caption.encode(), "json": meta.encode()})


def test_a_run_of_shards_alone_gives_a_page(tmp_path: Path) -> None:
    scene_shards(tmp_path, "under $5", '{"class_id": 0, "class": "x^2 $\\\\frac{$", "score": NaN}')
    page = render(tmp_path)
    assert "under $5" in page and "No stage has begun yet" in page and "Distributions of 1 samples" in page


def test_images_that_cannot_be_read_are_told_on_the_page(tmp_path: Path) -> None:
    scene_shards(tmp_path, "x", "[" * 100_000)
    page = render(tmp_path)
    assert "none of 12 samples can be read" in page and "nested too deeply" in page


@pytest.mark.parametrize("config", ["", "loop: 3\nhardware: 4\nwandb:", "[1, 2", "\x00"])
@pytest.mark.parametrize("rows", ["", '{"samples_seen": 0, "time": 5}\n', '{"samp', "3\n", '{"train/loss": 1}\n'])
def test_no_file_of_a_young_run_needs_to_be_whole(tmp_path: Path, config: str, rows: str) -> None:
    for stage in ("autoencoder", "unet", "evaluation", "latents"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(rows)
        (tmp_path / stage / "config.yaml").write_text(config)
    for torn in ("evaluation/protocol.json", "unet/DONE", ".stages/unet.json", "evaluation/metrics.json"):
        (tmp_path / torn).parent.mkdir(exist_ok=True)
        (tmp_path / torn).write_text('{"samp')
    assert "Not there yet" in render(tmp_path)


def test_images_keep_within_their_budget_and_the_frames_within_their_number(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"samples_seen": 10, "time": 5}\n')
    for seen in range(1, 13):
        noise = Image.effect_noise((350, 200), 90)
        noise.save(folder / "samples" / f"prompts-{seen:012d}.png")
    (film,) = galleries(RunFolder.open(tmp_path), most=8, budget=120_000)["samples"]
    assert [film.frames[0].samples_seen, film.frames[-1].samples_seen, len(film.frames)] == [1, 12, 8]
    assert sum(len(frame.source) for frame in film.frames) <= 120_000
    assert all(160 <= frame.width < 350 for frame in film.frames)
    assert film.frames[0].width / film.frames[0].height == pytest.approx(350 / 200, rel=0.02)


def test_captions_that_an_image_shows_stand_on_the_page_as_text(tmp_path: Path) -> None:
    """In the fonts of whoever looks: those of the machine that drew the image may have lacked them."""
    (tmp_path / "unet/samples").mkdir(parents=True)
    (tmp_path / "unet/metrics.jsonl").write_text('{"samples_seen": 10, "time": 5}\n')
    sheet = captioned(np.zeros((2, 32, 32, 3), np.uint8), ["고양이", "a <b>cat</b>"])
    (tmp_path / "unet/samples/prompts-000000000010.png").write_bytes(png_of(sheet))
    (tmp_path / "unet/samples/torn-000000000010.png").write_bytes(png_of(sheet)[:200])
    page = render(tmp_path)
    assert '<li dir="auto">고양이</li><li dir="auto">a &lt;b&gt;cat&lt;/b&gt;</li>' in page.replace("\n", "")
    assert page.count('data-film="unet/samples/') == 1 and captions_in(b"no image") == []


def test_a_long_curve_is_thinned_to_means_and_keeps_its_gaps() -> None:
    points: list[tuple[int, float | None]] = [(i, float(i)) for i in range(1, 1001)]
    assert curves.thinned(points, 500)[0] == (2, 1.5) and len(curves.thinned(points, 500)) == 500
    assert curves.thinned(points[:500], 500) == points[:500]
    gap: list[tuple[int, float | None]] = [(1, None), (2, None), (3, 1.0), (4, None)]
    assert curves.thinned(gap, 2) == [(2, None), (4, 1.0)]


def test_curves_are_named_by_what_tells_them_apart() -> None:
    def names(*metrics: str) -> list[str]:
        return [curves.short_name(metric, Panel("", metrics)) for metric in metrics]

    assert names("train/loss") == ["loss"]
    assert names("eval/fid", "eval/loop/fid") == ["fid", "loop/fid"]
    assert names("train/loss_by_timestep/1", "train/loss_by_timestep/2") == ["1", "2"]


def test_numbers_of_an_evaluation_beside_a_training_are_those_of_the_most_samples(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    rows = [{"samples_seen": seen, "time": 5, "eval/fid": float(seen)} for seen in (30, 10, 20)]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunFolder.open(tmp_path)
    assert [card.value for card in facts.cards(run) if card.title == "FID"] == ["30.00"]
    assert facts.last_evaluations(run)["evaluation after 30 samples"][0]["value"] == "30"
    (chart,) = curves.sections(run)["Quality"]
    assert chart["lines"][0]["points"] == [(10, 10.0), (20, 20.0), (30, 30.0)]


def test_the_last_evaluation_is_a_table_and_no_chart_of_single_points(tmp_path: Path) -> None:
    row = {"samples_seen": 30, "time": 5, "eval/fid": 12.5, "eval/fid_low": 11.0, "eval/fid_high": 14.0}
    row |= {"eval/fid_floor": 3.0, "eval/kid": 0.25, "eval/kid_std": 0.125, "eval/recall": None}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.jsonl").write_text(json.dumps(row) + "\n")
    run = RunFolder.open(tmp_path)
    assert facts.last_evaluations(run) == {
        "evaluation after 30 samples": [
            {"metric": "fid", "value": "12.5", "interval": "11 to 14", "deviation": "", "floor": "3"},
            {"metric": "kid", "value": "0.25", "interval": "", "deviation": "0.125", "floor": ""},
        ]
    }
    assert curves.sections(run)["Quality"] != []
    assert '<figure class="chart">' not in render(tmp_path)


def denoiser(folder: Path, config: str) -> None:
    folder.mkdir(parents=True)
    rows = [{"samples_seen": seen, "time": seen, "train/loss": 1 / seen, "eval/loss": 2 / seen} for seen in (10, 20)]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.joinpath("config.yaml").write_text(config)


def test_a_student_stands_beside_its_teacher(tmp_path: Path) -> None:
    denoiser(tmp_path / "unet", "seed: 0")
    denoiser(tmp_path / "student", "teacher: unet/export")
    (tmp_path / ".stages").mkdir()
    (tmp_path / ".stages/distill.json").write_text(json.dumps({"outcome": "x", "seconds": 125.0}))
    run = RunFolder.open(tmp_path)
    charts = [chart["title"] for section in curves.sections(run).values() for chart in section]
    assert charts == [f"{title} · {name}" for title in ("Validation loss", "Loss") for name in ("U-Net", "student")]
    assert [(row["stage"], row["state"], row["time"]) for row in facts.stage_table(run)] == [
        ("U-Net", "begun", "0:10"),
        ("student", "done", "2:05"),
    ]


def test_a_student_in_the_place_of_a_network_is_called_one(tmp_path: Path) -> None:
    """As experiment=distill_demo leaves it, for sampling and evaluation to find."""
    denoiser(tmp_path / "unet", "teacher: ../demo/unet/export")
    (tmp_path / ".stages").mkdir()
    (tmp_path / ".stages/distill.json").write_text(json.dumps({"outcome": "x", "seconds": 125.0}))
    run = RunFolder.open(tmp_path)
    assert [chart["title"] for chart in curves.sections(run)["Loss"]] == ["Loss · student"]
    assert [(row["stage"], row["time"]) for row in facts.stage_table(run)] == [("student", "2:05")]
    assert {card.title for card in facts.cards(run)} == {"Validation loss", "Samples seen"}


def test_addresses_lose_their_credentials() -> None:
    text = "shards: s3://key:secret@host/a\nother: https://host/x?X-Amz-Signature=abc&b=1\nplain: https://host/x?b=1"
    shown = facts.without_credentials(text)
    assert "secret" not in shown and "abc" not in shown and "https://host/x?b=1" in shown


def test_a_real_run_fills_the_page(project: object) -> None:
    folder = project.folder  # type: ignore[attr-defined]
    page = render(folder, "samples=20")
    for heading in ("Validation loss", "Loss by quarter of the timesteps", "Held-out pairs that are found"):
        assert heading in page
    assert page.count('data-film="unet/samples/prompts"') == 1 and "reconstructions" in page
    assert "caption length" in page and "unet/config.yaml" in page
    hardware = RunFolder.open(folder).stages["unet"].config["hardware"]
    assert hardware["processes"] == hardware["hosts"] == 1 and hardware["device"] in page
