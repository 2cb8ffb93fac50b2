"""The files of a command: images that say what they are, and sheets of bounded size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.sampling import sample_folder
from train.sampling.sample_folder import SampleFolder, read_parameters, read_png, shrunk


def filled(folder: Path, prompts: list[str]) -> SampleFolder:
    """Images of 8 x 8 pixels, each of one grey; the first two are filmed, from black on."""

    def facts(index: int) -> dict[str, Any]:
        return {"prompt": prompts[index], "seed": 3}

    made = SampleFolder(folder, len(prompts), facts, filmed=range(2), labels=["step 1", "step 9"])
    for index, prompt in enumerate(prompts):
        image = np.full((8, 8, 3), 3 * index, np.uint8)
        made.add(index, image, prompt, np.stack([np.zeros_like(image), image]) if index in made.filmed else None)
    return made


def test_file_is_known_again_by_what_it_says(tmp_path: Path) -> None:
    prompts = ["a hill"] * 3
    made = filled(tmp_path, prompts)
    assert [made.holds(index) for index in range(3)] == [True] * 3
    assert read_parameters(made.image(2)) == {"prompt": "a hill", "seed": 3}
    assert (read_png(made.strip(1)) == np.repeat([0, 3], 8)[:, None]).all()  # the frames side by side
    prompts[2] = "a moon"
    made.strip(0).unlink()
    made.image(1).write_bytes(made.image(1).read_bytes()[:20])
    assert [made.holds(index) for index in range(3)] == [False] * 3


def test_parts_of_one_job_are_held_together_and_shown_in_turn(tmp_path: Path) -> None:
    facts = {"prompt": "a hill", "lora_scale": 1.0}
    made = SampleFolder(tmp_path, 1, lambda _: facts, ("before", "after"), sheet=True, measured=("changed",))
    for part, grey in (("before", 0), ("after", 90), ("", 200)):
        assert not made.holds(0)
        made.add(0, np.full((8, 8, 3), grey, np.uint8), part or "both", part=part, measured={"changed": 0.5})
    assert made.holds(0) and read_parameters(made.image(0, "after")) == facts | {"changed": 0.5}
    (grid,) = made.write_sheets()
    pixels = np.asarray(Image.open(grid))[:, :, 0]
    assert [(pixels == grey).sum() >= 128 * 128 for grey in (0, 90, 200)] == [True, True, False]
    del facts["lora_scale"]  # fewer facts are other ones: of images with adapters none may stay for one without
    assert not made.holds(0)


def test_foreign_images_say_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", format="JPEG")
    assert [read_parameters(tmp_path / name) for name in ("plain.png", "other.png", "none.png")] == [None] * 3


def test_sheets_show_no_more_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_folder, "GRID_IMAGES", 9)
    grid, film = filled(tmp_path, ["a hill"] * 11).write_sheets()
    sheet = np.asarray(Image.open(grid))
    shown = [index for index in range(11) if (sheet[:, :, 0] == 3 * index).sum() >= 128 * 128]
    assert shown == list(range(9))
    strips = np.asarray(Image.open(film))
    assert [(strips[:, :, 0] == grey).sum() >= 128 * 128 for grey in (0, 3, 6)] == [True, True, False]


def test_large_images_are_shown_smaller() -> None:
    sides = {64: 64, 512: 512, 768: 768, 1024: 512, 2048: 512}
    assert {side: len(shrunk(np.zeros((side, side, 3), np.uint8))) for side in sides} == sides
