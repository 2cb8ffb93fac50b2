"""`train/evaluate_edits.py`: what edits say they change, what is measured of them, and the files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.entry import compose
from conf.errors import UserError
from conf.schema import EvaluateEditsRun, ImageConfig, Perceptual
from data.building.sources.demo import PARTS, attributes_of, scene
from data.image_dataset import ImageDataset
from models.editing.editing import DrawnImage, Edited
from models.losses import perceptual_distance
from train.editing import evaluate as module_under_test
from train.editing.demo_edits import SORTS, demo_edits
from train.editing.evaluate import Measures, edits_metrics, evaluate_edits, measure_edit, perfect_distances
from train.engine.runtime import Runtime
from train.sampling.sample_folder import read_png

SCENES = [attributes_of(scene(3, index).attributes) for index in range(120)]


def test_every_sort_of_edit_changes_what_it_says_and_nothing_else() -> None:
    edits = demo_edits(SCENES, 8, seed=0)
    assert [edit.sort for edit in edits] == [sort for sort in SORTS for _ in range(8)]
    assert edits == demo_edits(SCENES, 8, seed=0) != demo_edits(SCENES, 8, seed=1)
    for edit in edits:
        before, after = edit.edit.prompt.split(), edit.edit.edited.split()
        assert before != after and "  " not in edit.edit.edited
        if edit.sort in ("color", "background"):
            assert [new for old, new in zip(before, after, strict=True) if old != new] == [edit.value]
        elif edit.sort == "added":
            assert edit.value in edit.edit.edited and edit.value not in edit.edit.prompt and edit.attribute in PARTS
            assert set(before) < set(after)
        elif edit.sort == "removed":
            assert edit.value == "" and set(after) < set(before)
        else:
            assert edit.attribute == "kind" and before[-2:] == after[-2:]  # the background is kept
        assert edit.edit.blend_change == SORTS[edit.sort]["blend_change"]
    assert {edit.edit.replace_until for edit in demo_edits(SCENES, 2, 0, replace_until=0.9)} == {0.9}


def test_kinds_that_no_scene_has_are_no_edits() -> None:
    plants = [scene for scene in SCENES if scene["kind"] == "plant"]
    assert {edit.sort for edit in demo_edits(plants, 3, seed=0)} == {"color", "background"}


class FakeProbe:
    """Sees how bright an image is."""

    def log_probability(self, images: torch.Tensor, name: str, value: Any) -> torch.Tensor:
        return ((images.mean((1, 2, 3)) + 1) / 2).log()

    def most_probable(self, images: torch.Tensor, name: str) -> list[Any]:
        return ["pink" if image.mean() > 0 else "red" for image in images]


def test_row_tells_right_from_wrong_and_the_outside_from_the_inside() -> None:
    distance = perceptual_distance(Perceptual.efficientnet)
    assert distance is not None
    probe: Any = FakeProbe()
    noise = torch.Generator().manual_seed(0)
    source = (torch.rand(3, 64, 64, generator=noise) - 1).clamp(-1, 1)
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[:, :40] = True
    result = torch.where(region, torch.rand(3, 64, 64, generator=noise), source)
    fresh = torch.rand(3, 64, 64, generator=noise) * 2 - 1
    (edit, *_) = demo_edits(SCENES, 1, 0)
    edit = replace(edit, attribute="color", value="pink")
    made = Edited(DrawnImage(source, {}), DrawnImage(result, {}), region)
    row = measure_edit(Measures(probe, distance), edit, made, fresh, source)
    assert (row["right/source"], row["right/edit"], row["right/own"]) == (False, bool(result.mean() > 0), False)
    assert row["distance/own"] == pytest.approx(0, abs=1e-5) and row["distance/edit"] > 0
    assert row["outside/edit"] == pytest.approx(0, abs=1e-5) and row["outside/same"] > 0.01
    assert row["images"].shape == (3, 64, 64, 3)
    metrics = edits_metrics([row])
    assert metrics["eval/edits/color/distance_ratio"] == pytest.approx(row["distance/edit"] / row["distance/same"])
    assert not any("/kind/" in name for name in metrics)  # nothing of what was not there


def test_a_perfect_edit_changes_what_it_says_and_nothing_else() -> None:
    distance = perceptual_distance(Perceptual.efficientnet)
    assert distance is not None
    measures = Measures(FakeProbe(), distance)  # type: ignore[arg-type]
    edits = demo_edits(SCENES, 4, 0)
    found = perfect_distances(measures, range(len(edits)), edits, 64)
    means = {sort: float(found[[edit.sort == sort for edit in edits]].mean()) for sort in SORTS}
    assert 0 < means["added"] < means["color"] < means["background"]
    same = [replace(edit, scenes=(edit.scenes[0],) * 2) for edit in edits]
    assert perfect_distances(measures, range(len(edits)), same, 64).abs().max() < 1e-5


def test_edits_that_had_nothing_to_change_do_not_make_the_others_right() -> None:
    def row(before: bool, after: bool, away: float) -> dict[str, Any]:
        right = {"right/source": before, "right/edit": after, "right/own": True}
        away_from = {"distance/edit": away, "distance/same": 1.0, "distance/own": 1.0, "distance/perfect": 0.6}
        return {"sort": "added", **right, **away_from}

    found = edits_metrics([row(True, True, 0.0), row(True, True, 0.0), row(False, False, 0.9), row(False, True, 0.7)])
    for sort in ("added", "all"):
        assert found[f"eval/edits/{sort}/right"] == 0.75 and found[f"eval/edits/{sort}/lacking/right"] == 0.5
        assert found[f"eval/edits/{sort}/lacking/share"] == 0.5
        assert found[f"eval/edits/{sort}/distance_ratio"] == pytest.approx(0.4)
        assert found[f"eval/edits/{sort}/perfect_ratio"] == pytest.approx(0.6)
        assert found[f"eval/edits/{sort}/lacking/distance_ratio"] == pytest.approx(0.8)
    nothing = edits_metrics([row(True, True, 0.0)])
    assert nothing["eval/edits/all/lacking/share"] == 0 and "eval/edits/all/lacking/right" not in nothing


def test_command_measures_and_leaves_images(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    options = [f"run={project.folder}", "runtime=cpu", "wandb.mode=disabled", "steps=2", f"output_dir={tmp_path}"]
    found = []
    for batch in (3, 10):
        cfg = compose(
            "evaluate_edits",
            EvaluateEditsRun,
            [*options, "edits_per_sort=2", "words_per_sort=1", f"batch_size={batch}"],
        )
        found.append(evaluate_edits(cfg, runtime))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-3, abs=0.02), name
    assert {"eval/edits/all/right", "eval/edits/weights/all/rising", "probe/accuracy/mood"} <= found[0].keys()
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == found[0].keys()
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 10
    assert len((tmp_path / "weights.jsonl").read_text().splitlines()) == 5
    for name in ("edits.png", "weights.png", "words.png"):
        assert read_png(tmp_path / name).shape[1] > 300


def test_given_images_are_edited_in_place_of_drawn_ones(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[torch.Tensor]()

    def noted(measures: Any, edit: Any, made: Edited, same: torch.Tensor, own: torch.Tensor) -> dict[str, Any]:
        seen.append(made.source.image)
        return measure_edit(measures, edit, made, same, own)

    monkeypatch.setattr(module_under_test, "measure_edit", noted)
    options = [f"run={project.folder}", "runtime=cpu", "wandb.mode=disabled", "steps=2", f"output_dir={tmp_path}"]
    chosen = [*options, "given=true", "edits_per_sort=1", "words_per_sort=0"]
    found = evaluate_edits(compose("evaluate_edits", EvaluateEditsRun, chosen), runtime)
    heldout = ImageDataset(f"{project.folder}/shards/heldout", ImageConfig(resolution=32), 0)
    images = [heldout.at(index)["image"] for index in range(heldout.samples)]
    assert seen and all(any(torch.equal(image, one) for image in images) for one in seen)
    assert "eval/edits/color/right" in found and not any("weights" in name for name in found)


def test_option_that_no_edit_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"^strength.until: no option of an edit; choose among replace_until, "):
        compose("evaluate_edits", EvaluateEditsRun, ["run=unused", "+strength.until=1"])
    with pytest.raises(UserError, match=r"^self_until=2: must be in \[0, 1\]"):
        compose("evaluate_edits", EvaluateEditsRun, ["run=unused", "+strength.self_until=2"])
