"""`train/edit.py`: edits of the command line and of a file, their files, and free text on the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import EditMode, EditRun
from train.editing.edits_file import read_edits
from train.editing.run import draw_edits
from train.engine.runtime import Runtime
from train.sampling.sample_folder import read_parameters, read_png


def config(*overrides: str) -> Any:
    return compose("edit", EditRun, ["run=unused", *overrides])


def written(folder: Path, *lines: str) -> str:
    path = folder / "edits.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"edits_file={path}"


def test_text_of_the_command_line_needs_no_quotes_for_hydra() -> None:
    prompt = 'a "sad", [red] monster: it\'s {here} (now)=\\'
    cfg = config(f"prompt={prompt}", "weights=bell-shaped:2.0,round ears:-1", "blend=round ears,monster", "edit=null")
    (edit,) = read_edits(cfg)
    assert (edit.prompt, edit.edit, edit.blend) == (prompt, None, ["round ears", "monster"])
    assert edit.weights == {"bell-shaped": 2.0, "round ears": -1.0}
    (edit,) = read_edits(config("prompt=a b", "weights=a:2,b:0", "during=a:0.5,b:0.2-0.6"))
    assert edit.during == {"a": (0.0, 0.5), "b": (0.2, 0.6)}
    assert config("prompt='a, b'").prompt == "a, b"
    assert cfg.unet == "unused/unet/export"


def test_lines_of_a_file_differ_from_the_command_line(tmp_path: Path) -> None:
    first = {"prompt": "a", "edit": "b", "mode": "refine", "weights": {"b": 2}, "blend": "b", "self_until": 1}
    first["during"] = {"b": [0, 0.5]}
    file = written(tmp_path, json.dumps(first), "", '{"prompt": "c"}')
    one, two = read_edits(config(file, "replace_until=0.9", "until=a:0.1"))
    assert (one.mode, one.weights, one.blend, one.self_until) == (EditMode.refine, {"b": 2}, ["b"], 1)
    assert one.during == {"b": (0, 0.5)}
    assert (two.mode, two.edited, two.replace_until, two.until) == (EditMode.auto, "c", 0.9, {"a": 0.1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a red planet", r"line 1: is no JSON object; write"),
        ('{"edit": "a"}', "line 1: names no prompt"),
        ('{"prompt": "a", "weight": {}}', "line 1: no option 'weight': choose among mode, "),
        ('{"prompt": "a", "weights": "sad"}', "line 1: weights=sad: write weights="),
        ('{"prompt": "a", "weights": [1]}', r"line 1: weights=\[1\]: of another type"),
        ('{"prompt": "a", "weights": {"a": 2}, "during": {"a": [1]}}', r"line 1: during=.*: of another type"),
        (
            '{"prompt": "a", "weights": {"a": 2}, "during": {"a": [0.5, 0.2]}}',
            "line 1: during=a:0.5-0.2: must be two shares",
        ),
        ('{"prompt": "a", "during": {"a": [0, 0.5]}}', "line 1: during=a: has no weight; name it in weights, too"),
        ('{"prompt": "a", "mode": "swap"}', "line 1: mode=swap: choose one of auto, replace, refine"),
        ('{"prompt": "a", "replace_until": 2}', r"line 1: replace_until=2: must be in \[0, 1\]"),
        ('{"prompt": "a", "edit": 3}', "line 1: edit=3: of another type"),
        ("", "holds no edit"),
    ],
)
def test_line_that_is_no_edit_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_edits(config(written(tmp_path, line)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", r'^set prompt="\.\.\." and edit="\.\.\.", or edits_file=FILE'),
        ("weights=red", r"^weights=red: write weights=\"WORD:NUMBER"),
        ("during=red:a", r"^during=red:a: write during=\"WORD:SHARE,WORD:SHARE-SHARE\""),
        ("during=red:-0.5", r"^during=red:-0.5: write during=\"WORD:SHARE,WORD:SHARE-SHARE\""),
        ("self_until=1.5", r"^self_until=1.5: must be in \[0, 1\]"),
        ("inversion=null_text", "^inversion=null_text: is for a given image; set image=FILE"),
    ],
)
def test_impossible_options_end_before_torch_is_imported(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(override, *(["prompt=a"] if override != "steps=3" else []))


def test_edits_are_drawn_recorded_and_the_same_in_any_batch(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a red planet", "edit": "a blue planet", "blend": ["planet"], "weights": {"blue": 2}},
        {"prompt": "a red planet", "edit": "a sad red planet", "blend_change": True},
    ]
    file = written(tmp_path, *map(json.dumps, lines))
    options = [f"run={project.folder}", "runtime=cpu", "wandb.mode=disabled", "steps=2", "images_per_edit=2", file]
    for batch in (3, 1):
        draw_edits(
            compose("edit", EditRun, [*options, f"batch_size={batch}", f"output_dir={tmp_path / str(batch)}"]), runtime
        )
    folder, other = tmp_path / "3", tmp_path / "1"
    records = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    assert [(record["edit"], record["number"]) for record in records] == [
        *(("a blue planet", number) for number in (0, 1)),
        *(("a sad red planet", number) for number in (0, 1)),
    ]
    for index, record in enumerate(records):
        assert record["changed_outside"] == 0 and 0 < record["region"] <= 1
        assert read_parameters(folder / f"{index:05d}-after.png") == record
        for name in ("before", "after"):
            first, second = (read_png(place / f"{index:05d}-{name}.png").astype(int) for place in (folder, other))
            assert first.shape == (32, 32, 3) and abs(first - second).max() <= 1
    assert (read_png(folder / "00000-before.png") == read_png(folder / "00002-before.png")).all()  # one source
    assert len(list((folder / "samples").glob("edit-*.png"))) == 4  # sheets, as W&B gets them
    assert read_png(folder / "grid.png").shape[1] > 500


def test_edits_that_are_there_are_not_drawn_again(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    options = [f"run={project.folder}", "runtime=cpu", "wandb.mode=disabled", "steps=2", f"output_dir={tmp_path / 'o'}"]
    lines = [{"prompt": "a red planet", "edit": f"a {color} planet", "blend": ["planet"]} for color in ("blue", "pink")]
    cfg = compose("edit", EditRun, [*options, written(tmp_path, *map(json.dumps, lines))])
    draw_edits(cfg, runtime)
    files = sorted((tmp_path / "o").glob("0*.png"))
    assert len(files) == 6
    content = [file.read_bytes() for file in files]
    files[4].unlink()  # the second edit's image before
    times = [file.stat().st_mtime_ns for file in files[:3]]
    draw_edits(cfg, runtime)
    assert [file.read_bytes() for file in files] == content
    assert [file.stat().st_mtime_ns for file in files[:3]] == times
    draw_edits(
        compose("edit", EditRun, [*options, "self_until=0.9", f"edits_file={tmp_path / 'edits.jsonl'}"]), runtime
    )
    assert files[0].read_bytes() != content[0]  # its options are other ones


def test_given_images_are_edited_by_file(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, side in (("photo.png", 32), ("large.png", 48)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / name)
    options = [f"run={project.folder}", "runtime=cpu", "wandb.mode=disabled", "steps=2"]
    line = {"prompt": "a red planet", "edit": "a blue planet"}
    lines = [{**line, "image": str(tmp_path / "photo.png"), "blend_change": True}, line]
    file = written(tmp_path, *map(json.dumps, lines))
    draw_edits(compose("edit", EditRun, [*options, "images_per_edit=2", file, f"output_dir={tmp_path / 'o'}"]), runtime)
    given, *drawn = [json.loads(line) for line in (tmp_path / "o" / "edits.jsonl").read_text().splitlines()]
    assert len(drawn) == 2 and not any("reconstruction_psnr" in record for record in drawn)
    assert given["inversion"] == "negative_prompt" and given["reconstruction_psnr"] > 5
    assert (read_png(tmp_path / "o" / "00000-before.png") == read_png(tmp_path / "photo.png")).all()
    for name, message in (("large.png", "has 48 x 48 pixels, .* 32 x 32 are drawn"), ("none.png", "no such file")):
        with pytest.raises(UserError, match=rf"^image=.*{name}: {message}"):
            draw_edits(compose("edit", EditRun, [*options, "prompt=a", f"image={tmp_path / name}"]), runtime)
