"""A user's own images: what is read beside them, how they are put together, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ConditionsConfig, SampleRun
from conf.schema.conditions import BoxesConfig, BoxMapConfig, ClassConfig, LowResolutionConfig, MaskedConfig
from models.conditions import Conditions
from train.sampling.requests import (
    Job,
    Prompt,
    Requests,
    jobs_of,
    labels_in,
    read_prompts,
    require_conditions,
    samples_of,
)
from train.sampling.sample_folder import together
from train.sampling.user_images import caption_beside, read_user_image


def image(path: Path, width: int = 12, height: int = 8) -> str:
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def mask(path: Path, width: int = 12, height: int = 8) -> None:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[2:4, 5:9] = 255
    Image.fromarray(pixels).save(path)


def test_all_that_lies_beside_a_image_is_read(tmp_path: Path) -> None:
    path = image(tmp_path / "photo.jpg")
    alone = read_user_image(path)
    assert alone.item["image"].shape == (3, 8, 12) and alone.item["labels"].class_id is None
    assert "mask" not in alone.item
    mask(tmp_path / "photo.mask.png")
    (tmp_path / "photo.json").write_text(json.dumps({"class_id": 3, "boxes": [{"box": [0, 0, 1, 1], "class_id": 1}]}))
    (tmp_path / "photo.txt").write_text(" a hill\n")
    whole = read_user_image(path)
    assert whole.item["mask"].sum() == 8 and whole.item["mask"][2, 5] and not whole.item["mask"][2, 4]
    assert whole.item["labels"].class_id == 3 and len(whole.item["labels"].boxes) == 1
    assert whole.digest != alone.digest
    cfg = compose("sample", SampleRun, ["run_dir=run", f"inputs=[{path}]", "prompts=[a moon]"])
    assert read_prompts(cfg) == [Prompt("a moon"), Prompt("a hill", file=path)]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\r\nhill", "a hill".encode("utf-16"), b"a\0hill"])
def test_a_caption_beside_a_image_is_read_as_that_of_a_data_set(tmp_path: Path, content: bytes) -> None:
    path = image(tmp_path / "photo.png")
    (tmp_path / "photo.txt").write_bytes(content)
    assert caption_beside(path) == "a hill"
    (tmp_path / "photo.txt").write_bytes(b"une \xe9cole")
    with pytest.raises(UserError, match=r"^inputs=.*/photo\.png: photo\.txt: not UTF-8"):
        caption_beside(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo.png", b"no image", r"^inputs=.*/photo\.png: not a readable image$"),
        ("photo.mask.png", b"no image", r"^inputs=.*/photo\.png: its mask is not a readable image$"),
        ("photo.json", b'{"class_id": "cat"}', r"^inputs=.*/photo\.png: class_id"),
        ("photo.json", b"[]", r"^inputs=.*/photo\.png: its \.json holds no object$"),
        ("photo.seg.png", b"", r"^inputs=.*/photo\.png: seg\.png: not a readable PNG$"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = image(tmp_path / "photo.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_user_image(path)


def test_mask_must_be_there_and_of_the_images_size(tmp_path: Path) -> None:
    path = image(tmp_path / "photo.png")
    conditions = Conditions(ConditionsConfig(caption=None, masked=MaskedConfig()))
    with pytest.raises(
        UserError, match=r"^inputs=.*: this network paints where .*: put .*/photo\.mask\.png beside it$"
    ):
        require_conditions(conditions, read_user_image(path).item, path)
    small = Conditions(ConditionsConfig(caption=None, low_resolution=LowResolutionConfig()))
    require_conditions(small, read_user_image(path).item, path)  # needs none
    mask(tmp_path / "photo.mask.png", width=10)
    with pytest.raises(UserError, match=r"its mask has 10 x 8 pixels, the image 12 x 8; make them equal$"):
        read_user_image(path)
    with pytest.raises(UserError, match=r"^inputs=.*/nowhere\.png: no such file$"):
        read_user_image(str(tmp_path / "nowhere.png"))
    with pytest.raises(UserError, match=r"^inputs=.*: a folder: name its files$"):
        read_user_image(str(tmp_path))


def test_a_mask_is_read_as_it_looks_and_refused_where_it_could_mean_either(tmp_path: Path) -> None:
    path, shape = image(tmp_path / "photo.png"), np.zeros((8, 12), dtype=bool)
    shape[2:4, 5:9] = True
    rgba = np.full((8, 12, 4), 255, dtype=np.uint8)
    rgba[..., 3] *= shape
    for values in (shape, shape.astype(np.uint8), shape.astype(np.uint16) * 65535, rgba):
        Image.fromarray(values).save(tmp_path / "photo.mask.png")
        assert np.array_equal(read_user_image(path).item["mask"].numpy(), shape)
    rgba[..., :3] = 120
    Image.fromarray(rgba).save(tmp_path / "photo.mask.png")
    with pytest.raises(
        UserError, match=r"^inputs=.*/photo\.png: its mask is partly transparent, .*make it black and white$"
    ):
        read_user_image(path)


def test_images_of_one_size_share_a_batch(tmp_path: Path) -> None:
    paths = [image(tmp_path / f"{name}.png", width) for name, width in (("a", 12), ("b", 12), ("c", 16))]
    asked = Requests([Prompt("", file=path) for path in paths], None, {path: read_user_image(path) for path in paths})
    jobs = jobs_of([*asked.prompts, Prompt("x")], 1)
    assert [job.number for job in jobs] == [0, 1, 2, 0]
    assert asked.batches(jobs, range(4), 8) == [[0, 1], [2], [3]]
    assert asked.batches(jobs, [0, 1], 1) == [[0], [1]]
    made = samples_of([asked.item(job) for job in jobs[:2]], [0, 1], seed=0, side=32)
    assert made.already_small and made.masks is None and made.images.shape == (2, 3, 8, 12)
    assert not samples_of([asked.item(Job("x", 0))], [0], seed=0, side=32).already_small


def test_sheet_shows_images_of_all_sizes() -> None:
    sheets = together([np.zeros((2, 3, 3), np.uint8), np.zeros((4, 2, 3), np.uint8)])
    assert sheets.shape == (2, 4, 3, 3)
    assert (sheets[0, :2] == 0).all() and (sheets[0, 2:] == 255).all() and (sheets[1, :, 2] == 255).all()
    assert torch.from_numpy(sheets).sum() == 255 * 3 * (6 + 4)


NAMED = {"classes": ["cat", "old dog"], "box_classes": ["sun", "moon"]}


def test_prompt_names_a_class_or_boxes_where_no_text_is_told() -> None:
    class_told = Conditions(ConditionsConfig(caption=None, class_token=ClassConfig(classes=3)), NAMED)
    assert [labels_in(class_told, words, 8)["labels"].class_id for words in ("old dog", "2", " cat ")] == [1, 2, 0]
    boxes_told = Conditions(ConditionsConfig(caption=None, boxes=BoxesConfig(classes=2)), NAMED)
    boxes = labels_in(boxes_told, "moon 0 0.25 0.5 1; sun .5 0 1 .5", 8)["labels"].boxes
    assert [(box.class_id, box.corners) for box in boxes] == [(1, (0, 0.25, 0.5, 1)), (0, (0.5, 0, 1, 0.5))]
    with_text = Conditions(ConditionsConfig(class_token=ClassConfig(classes=3)), NAMED)
    assert labels_in(with_text, "a cat", 8) == {}


@pytest.mark.parametrize(
    ("sections", "words", "message"),
    [
        (
            {"class_token": ClassConfig(classes=2)},
            "horse",
            "'horse': no class .* its classes: cat, old dog, or 0 to 1$",
        ),
        ({"class_vector": ClassConfig(classes=2)}, "2", "'2': no class of this network"),
        ({"boxes": BoxesConfig(classes=2)}, "sun 0 0 1", "'sun 0 0 1': no box; write CLASS LEFT TOP RIGHT BOTTOM"),
        ({"box_map": BoxMapConfig(classes=2)}, "sun 0 0 2 1", "'sun 0 0 2 1': boxes.0..box: .* leaves the image"),
        ({"boxes": BoxesConfig(classes=2)}, "star 0 0 1 1", "'star': no class of this network"),
    ],
)
def test_prompt_that_names_nothing_known_is_refused(sections: dict[str, Any], words: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^prompt {message}"):
        labels_in(Conditions(ConditionsConfig(caption=None, **sections), NAMED), words, 8)
