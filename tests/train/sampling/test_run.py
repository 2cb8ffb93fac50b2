"""Images from an exported model: the right networks together, and an image that says how to make it again."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import Precision
from models.autoencoder import Autoencoder
from models.clip import Clip
from train.engine.runtime import Runtime
from train.latents.provenance import weights_digest
from train.sampling import run as sampling
from train.sampling.load import load_model
from train.sampling.requests import Prompt, Requests, jobs_of
from train.sampling.sample_folder import read_parameters, read_png

PROMPTS = ["a red planet", "a green hill, at night", "a sad “square” monster"]


def config(project: Any, folder: Path, *overrides: str) -> Any:
    prompts = "prompts=" + json.dumps(PROMPTS, ensure_ascii=False)
    return project.config("sample", f"output_dir={folder}", prompts, *overrides)


def draw(project: Any, runtime: Runtime, folder: Path, *overrides: str) -> list[np.ndarray]:
    sampling.sample(config(project, folder, *overrides), runtime)
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def largest_step(first: list[np.ndarray], second: list[np.ndarray]) -> int:
    """Largest difference of two lists of images in 8-bit steps."""
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(first, second, strict=True))


def test_image_carries_all_that_makes_it_again(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    images = draw(project, runtime, tmp_path / "a", "images_per_prompt=2", "seed=3", "guidance_scale=2.5")
    assert len(images) == 6 and images[0].shape == (32, 32, 3)
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
        "size": [],
        "prompt_syntax": True,
        "weighting": "difference",
        "tile": 0,
        "precision": "fp32",
        "unet": weights_digest(str(project.folder / "unet" / "export")),
    }
    again = project.config("sample", f"seed={facts['seed']}", f"steps={facts['steps']}", "guidance_scale=2.5")
    model = load_model(again, runtime.device)
    made = sampling.generate_images(model, again, [{"caption": facts["prompt"]}], [facts["number"]]).images
    assert largest_step([sampling.to_uint8(made)[0]], images[5:]) <= 1


LONG = "a red planet with rings and moons and stars and clouds and mountains and rivers and trees and a " * 2


def test_words_that_no_image_can_show_are_told(
    project: Any, runtime: Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("steps=1", f"negative_prompt={LONG}blurred sky", f'prompts=["a red planet", "{LONG}(hat:1.5)"]')
    for folder in ("first", "again"):
        draw(project, runtime, tmp_path / folder, *options)
        told = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
        assert [line.split("are longer")[0].split() for line in told] == [
            ["sample", "1", "of", "2", "prompts"],
            ["sample", "1", "of", "1", "negative", "prompts"],
        ]
        assert told[0].endswith("and a hat'") and told[1].endswith("and a blurred sky'")
    draw(project, runtime, tmp_path / "short", "steps=1", 'prompts=["a red planet"]')
    assert "left out" not in capfd.readouterr().out


def test_batch_size_changes_no_image(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    together = draw(project, runtime, tmp_path / "together", "images_per_prompt=2", "batch_size=32")
    apart = draw(project, runtime, tmp_path / "apart", "images_per_prompt=2", "batch_size=4")
    assert largest_step(together, apart) <= 1  # float rounding
    assert len({image.tobytes() for image in together}) == 6


def test_seed_steps_and_prompt_change_the_image(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    first = draw(project, runtime, tmp_path / "first")
    for change in ("seed=1", "steps=6", "sampler=ddim", "guidance_scale=6"):
        assert largest_step(first[:1], draw(project, runtime, tmp_path / change.partition("=")[0], change)[:1]) > 1


class Together(Runtime):
    """One of several processes, all of them threads of this one, that gather in turn."""

    values: ClassVar[list[Any]]
    met: ClassVar[threading.Barrier]

    def gather_objects(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.met.wait(timeout=60)
        gathered = list(self.values)
        self.met.wait(timeout=60)
        return gathered


def draw_on_ranks(cfg: Any, runtime: Runtime, world: int) -> None:
    """The command as `world` processes."""
    Together.values, Together.met = [None] * world, threading.Barrier(world)
    facts = {name: getattr(runtime, name) for name in ("local_rank", "device", "precision", "accelerator")}
    with ThreadPoolExecutor(world) as ranks:
        list(ranks.map(partial(sampling.sample, cfg), [Together(rank=i, world=world, **facts) for i in range(world)]))


def test_three_ranks_write_what_one_process_writes(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    """Eight images, so that the last rank has fewer; of each image and each strip the same file."""
    given = ["film_frames=3", "images_per_prompt=2", "prompts_from_samples=1"]
    given.append(f"prompts_from={project.folder}/shards/heldout")
    whole = draw(project, runtime, tmp_path / "whole", *given, "batch_size=3")
    draw_on_ranks(config(project, tmp_path / "parts", *given, "batch_size=2"), runtime, 3)
    names = [f"0000{index}.png" for index in range(8)]
    names += ["film.png", "grid.png", *(f"strips/0000{index}.png" for index in (0, 2, 4, 6))]
    for folder in ("whole", "parts"):
        files = {str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*.*")}
        assert files == set(names)
    assert largest_step(whole, [read_png(tmp_path / "parts" / name) for name in names[:8]]) <= 1
    for name in names[:8] + names[10:]:
        assert read_parameters(tmp_path / "whole" / name) == read_parameters(tmp_path / "parts" / name)


def test_killed_command_goes_on_where_it_was(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in its third batch; the next start, of two processes, draws what is not there, and only that."""
    whole = draw(project, runtime, tmp_path / "whole", "images_per_prompt=3", "film_frames=2")
    given = ["images_per_prompt=3", "film_frames=2", "batch_size=2"]
    drawn: list[tuple[str, int]] = []
    original = sampling.generate_images

    def noted(model: Any, cfg: Any, items: Any, numbers: Any, film: Any = None) -> Any:
        drawn.extend(zip([item["caption"] for item in items], numbers, strict=True))
        return original(model, cfg, items, numbers, film)

    def dies(*given: Any) -> Any:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return noted(*given)

    monkeypatch.setattr(sampling, "generate_images", dies)
    with pytest.raises(KeyboardInterrupt):
        draw(project, runtime, tmp_path / "again", *given)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("0*.png")}
    assert len(written) == 4 + 2 and not (tmp_path / "again" / "grid.png").exists()
    (tmp_path / "again" / "strips" / "00003.png").unlink()
    (tmp_path / "again" / "00001.png").write_bytes(b"damaged")

    drawn.clear()
    monkeypatch.setattr(sampling, "generate_images", noted)
    draw_on_ranks(config(project, tmp_path / "again", *given), runtime, 2)
    jobs = [(prompt, number) for prompt in PROMPTS for number in range(3)]
    assert sorted(drawn) == sorted(job for index, job in enumerate(jobs) if index not in (0, 2))
    names = [f"{index:05d}.png" for index in range(9)]
    assert largest_step(whole, [read_png(tmp_path / "again" / name) for name in names]) <= 1
    kept = tmp_path / "again" / "00002.png"
    assert kept.stat().st_mtime_ns == written[kept]


def test_second_start_draws_nothing_unless_something_else_is_asked_for(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(project, tmp_path)
    sampling.sample(cfg, runtime)
    monkeypatch.setattr(sampling, "generate_images", lambda *_: pytest.fail("an image was drawn again"))
    sampling.sample(cfg, runtime)
    assert "all 3 images were there already: " in capsys.readouterr().out.splitlines()[-1]
    requests = Requests([Prompt(prompt) for prompt in PROMPTS], None)
    jobs = jobs_of(requests.prompts, 1)
    assert sampling.folder_of(cfg, requests, jobs).holds(2)
    low = replace(cfg.runtime, precision=Precision.bf16)
    for change in ({"seed": 1}, {"steps": 5}, {"tile": 16}, {"film_frames": 2}, {"runtime": low}):
        assert not sampling.folder_of(replace(cfg, **change), requests, jobs).holds(2)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "pndm", "heun", "unipc"])
def test_film_ends_with_the_image(project: Any, runtime: Runtime, tmp_path: Path, sampler: str) -> None:
    images = draw(project, runtime, tmp_path, f"sampler={sampler}", "film_frames=3", "steps=6")
    for index, image in enumerate(images):
        first, middle, last = np.split(read_png(tmp_path / "strips" / f"{index:05d}.png"), 3, axis=1)
        assert np.array_equal(last, image)
        assert largest_step([first], [image]) > largest_step([middle], [image]) > 0
    with Image.open(tmp_path / "film.png") as sheet:
        assert sheet.width >= 3 * 128 and sheet.height > 3 * 128


def test_images_that_are_not_finite_are_left_out_and_their_prompts_named(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sampling.generate_images

    def broken(model: Any, cfg: Any, items: Any, *given: Any) -> Any:
        drawing = original(model, cfg, items, *given)
        drawing.images[[item["caption"] == PROMPTS[1] for item in items], 0, 5, 5] = torch.nan
        return drawing

    monkeypatch.setattr(sampling, "generate_images", broken)
    with pytest.raises(UserError, match=rf"^images of '{PROMPTS[1]}' are NaN or infinite, 1 in all: set runtime\."):
        draw(project, runtime, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"00000.png", "00002.png"}
    all_broken = sampling.GeneratedBatch(torch.full((2, 3, 32, 32), torch.inf), torch.zeros(2, 3, 32, 32), {}, ["", ""])
    monkeypatch.setattr(sampling, "generate_images", lambda *_: all_broken)
    prompts = f"prompts=['{PROMPTS[1]}', b, c, d, e]"
    with pytest.raises(UserError, match=r"^images of 'a green hill, at night', 'b' are NaN or infinite, 2 in all: "):
        draw(project, runtime, tmp_path, prompts, "batch_size=2")  # not even the first batch has a sound one


def test_grid_shows_every_image(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    draw(project, runtime, tmp_path)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 3 * 128 and grid.height > 128


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
