"""Pictures from an exported model: the right networks together, and a picture that says how to make it again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import UserError
from models.autoencoder import Autoencoder
from models.clip import Clip
from train.engine.provenance import weights_digest
from train.engine.runtime import Runtime
from train.evaluation import sampling

PROMPTS = ["a red planet", "a green hill, at night", "a sad “square” monster"]


def draw(project: Any, runtime: Runtime, folder: Path, *overrides: str) -> list[np.ndarray]:
    prompts = "prompts=" + json.dumps(PROMPTS, ensure_ascii=False)
    sampling.run(project.config("sample", f"output_dir={folder}", prompts, *overrides), runtime)
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def largest_step(first: list[np.ndarray], second: list[np.ndarray]) -> int:
    """Largest difference of two lists of pictures in 8-bit steps."""
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(first, second, strict=True))


def test_picture_carries_all_that_makes_it_again(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    pictures = draw(project, runtime, tmp_path / "a", "images_per_prompt=2", "seed=3", "guidance_scale=2.5")
    assert len(pictures) == 6 and pictures[0].shape == (32, 32, 3)
    with Image.open(tmp_path / "a" / "00005.png") as image:
        facts = json.loads(image.text["parameters"])
    assert facts == {
        "prompt": PROMPTS[2],
        "seed": 3,
        "number": 1,
        "sampler": "dpmpp_2m",
        "steps": 4,
        "eta": None,
        "spacing": "trailing",
        "shift": None,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.0,
        "guidance_interval": [],
        "negative_prompt": "",
        "prompt_syntax": True,
        "unet": weights_digest(str(project.folder / "unet" / "export")),
    }
    again = project.config("sample", f"seed={facts['seed']}", f"steps={facts['steps']}", "guidance_scale=2.5")
    model = sampling.load_model(again, runtime.device)
    (made,) = sampling.pictures(model, again, [(facts["prompt"], facts["number"])])
    assert largest_step([sampling.to_uint8(made)[0]], pictures[5:]) <= 1


def test_batch_size_changes_no_picture(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    together = draw(project, runtime, tmp_path / "together", "images_per_prompt=2", "batch_size=32")
    apart = draw(project, runtime, tmp_path / "apart", "images_per_prompt=2", "batch_size=4")
    assert largest_step(together, apart) <= 1  # float rounding
    assert len({picture.tobytes() for picture in together}) == 6


def test_seed_steps_and_prompt_change_the_picture(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    first = draw(project, runtime, tmp_path / "first")
    for change in ("seed=1", "steps=6", "sampler=ddim", "guidance_scale=6"):
        assert largest_step(first[:1], draw(project, runtime, tmp_path / change.partition("=")[0], change)[:1]) > 1


def test_ranks_draw_what_one_process_draws(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    whole = draw(project, runtime, tmp_path / "whole")
    facts = {name: getattr(runtime, name) for name in ("local_rank", "device", "precision", "accelerator")}
    for rank in (1, 2, 3):  # the last one has nothing to do
        draw(project, Runtime(rank=rank, world=4, **facts), tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "parts").glob("*.png"))
    assert names == ["00001.png", "00002.png"]
    parts = [np.asarray(Image.open(tmp_path / "parts" / name)) for name in names]
    assert largest_step(parts, whole[1:]) <= 1


def test_grid_shows_every_picture(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    draw(project, runtime, tmp_path)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 3 * 128 and grid.height > 128


def test_prompts_of_the_file_follow_those_of_the_command_line(project: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cactus\n\n  a palm  \n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n")
    given = project.config("sample", 'prompts=["a moon"]', f"prompts_file={tmp_path}/prompts.txt")
    assert sampling.read_prompts(given) == ["a moon", "a cactus", "a palm"]
    for name, message in (("empty.txt", "holds no prompt"), ("nowhere.txt", "no such file")):
        with pytest.raises(UserError, match=message):
            sampling.read_prompts(project.config("sample", "prompts=[]", f"prompts_file={tmp_path}/{name}"))


@pytest.mark.parametrize("option", ["autoencoder", "clip"])
def test_network_that_was_not_the_unets_is_refused(project: Any, runtime: Runtime, tmp_path: Path, option: str) -> None:
    torch.manual_seed(1)
    network: Any = Autoencoder if option == "autoencoder" else Clip.from_config
    network(project.config(option).model).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=rf"^{option}=.*/other: not the one that unet=.* was trained with"):
        draw(project, runtime, tmp_path / "samples", f"{option}={tmp_path}/other")
    assert not (tmp_path / "samples").exists()


def test_missing_unet_is_asked_for(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train the U-Net first, or set unet=FOLDER"):
        draw(project, runtime, tmp_path / "samples", f"unet={tmp_path}")
