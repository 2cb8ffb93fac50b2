"""Labels: what is written is read, what cannot be is named, and they follow the image through crop and flip."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.schema import Crop
from data.images import Cut, cut_of, to_pixels
from data.labels import (
    MAP,
    UNLABELLED,
    Box,
    LabelError,
    Labels,
    Use,
    Vocabulary,
    cut_labels,
    decode_map,
    encode_map,
    read_labels,
    shrink_map,
    to_json,
)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_written_is_read() -> None:
    segments = np.random.default_rng(0).integers(256, size=(5, 7), dtype=np.uint8)
    boxes = (Box((0.0, 0.25, 1.0, 1 / 3), 2, "cat"), Box((0.1, 0.2, 0.3, 0.4), 65_535))
    meta = json.loads(json.dumps(to_json(Labels(3, "street", boxes))))
    assert meta["boxes"][0] == {"box": [0.0, 0.25, 1.0, 1 / 3], "class": "cat", "class_id": 2}
    read = read_labels(meta, encode_map(segments), (7, 5))
    assert (read.class_id, read.class_name, read.boxes) == (3, "street", boxes)
    assert read.segments is not None and np.array_equal(read.segments, segments)
    empty = read_labels({"class": "no number, no label"}, None, (7, 5))
    assert (empty.class_id, empty.boxes, empty.segments, empty.uses()) == (None, (), None, [])


def test_numbers_of_a_palette_are_the_classes_and_those_of_a_table_may_be_text() -> None:
    palette = Image.fromarray(np.array([[0, 7]], dtype=np.uint8)).convert("P")
    palette.putpalette([0] * 21 + [200, 0, 0])
    assert decode_map(png(palette), (2, 1)).tolist() == [[0, 7]]
    assert read_labels({"class_id": "12"}, None, (1, 1)).class_id == 12


def box(*corners: Any, **fields: Any) -> dict[str, Any]:
    return {"boxes": [{"box": [0, 0, 1, 1], "class_id": 0}, {"box": list(corners), "class_id": 1, **fields}]}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"class_id": -1}, r"class_id: -1 is not in 0 to 65535"),
        ({"class_id": 10**4000}, r"class_id: 1000.* is not in 0 to 65535"),
        ({"class_id": "cat"}, r"class_id: 'cat' is not a whole number"),
        ({"class_id": True}, r"class_id: True is not a whole number"),
        ({"class_id": 1, "class": ["cat"]}, "class: not text"),
        ({"boxes": "0 0 1 1"}, "boxes: not a list"),
        ({"boxes": [[0, 0, 1, 1]]}, r"boxes\[0\]: not an object"),
        ({"boxes": [{"box": [0, 0, 1, 1]}]}, r"boxes\[0\].class_id: None is not a whole number"),
        (box(0, 0, 1), r"boxes\[1\].box: not \[x0, y0, x1, y1\]"),
        (box(0, 0, 1, "1"), r"boxes\[1\].box: not \[x0, y0, x1, y1\]"),
        (box(0, 0, 1.01, 1), r"boxes\[1\].box: .*1.01.* leaves the image; corners are fractions"),
        (box(0, 0, 10**4000, 1), r"boxes\[1\].box: .* leaves the image"),
        (box(float("nan"), 0, 1, 1), r"boxes\[1\].box: .* leaves the image"),
        (box(0.5, 0, 0.5, 1), r"boxes\[1\].box: .* has no area"),
        (box(0, 0.6, 1, 0.5), r"boxes\[1\].box: .* has no area"),
        ({"boxes": [*box(0, 0, 1, 1, **{"class": "a"})["boxes"], *box(0, 0, 1, 1, **{"class": "b"})["boxes"]]}, "'a'"),
    ],
)
def test_a_label_that_cannot_be_is_one_line_with_its_field(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError, match=message) as error:
        read_labels(meta, None, (4, 4))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable PNG"),
        (png(Image.new("L", (4, 3))), "has 4 x 3 pixels, the image 4 x 4"),
        (png(Image.new("L", (40_000, 1))), "has 40000 x 1 pixels"),
        (png(Image.new("RGB", (4, 4))), "mode RGB, not 8 bits"),
        (png(Image.effect_noise((4, 4), 90))[:-22], "broken PNG"),
    ],
    ids=["empty", "height", "width", "mode", "truncated"],
)
def test_a_map_that_does_not_fit_is_named(content: bytes, message: str) -> None:
    with pytest.raises(LabelError, match=f"{MAP}: .*{message}"):
        read_labels({}, content, (4, 4))


def test_a_vocabulary_learns_and_refuses_contradictions() -> None:
    known = Vocabulary.of({"classes": ["cat", "dog"], "segments": ["sky"]})
    known.learn([Use("box_classes", "boxes[0].class_id", 3, "ear"), Use("box_classes", "boxes[1].class_id", 1)])
    names = {"classes": ["cat", "dog"], "box_classes": ["", "", "", "ear"], "segments": ["sky"]}
    assert known.as_dict() == names == Vocabulary.of(names).as_dict()
    for use, message in (
        (Use("classes", "class_id", 1, "cow"), "class_id: 1 is 'dog' in this data set, not 'cow'"),
        (Use("classes", "class_id", 7, "cat"), "class_id: 'cat' is 0 in this data set, not 7"),
    ):
        with pytest.raises(LabelError, match=message):
            known.learn([Use("segments", MAP, 9), use])
    assert known.as_dict() == names  # nothing of a sample that contradicts
    known.check([Use("classes", "class_id", 1), Use("box_classes", "boxes[0].class_id", 2, "tail")])
    with pytest.raises(LabelError, match=f"{MAP}: 1 is out of range, the data set has 1 segments"):
        known.check(Labels(segments=np.array([[0, 1, UNLABELLED]], dtype=np.uint8)).uses())


def drawn(corners: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """A white rectangle on black, uint8 [H, W, 3]."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[corners[1] : corners[3], corners[0] : corners[2]] = 255
    return pixels


def test_labels_follow_the_pixels_of_a_rectangle_through_crop_and_flip() -> None:
    size, random, kept = (96, 64), np.random.default_rng(1), 0
    for _ in range(60):
        (x0, x1), (y0, y1) = (np.sort(random.choice(extent // 4, 2, replace=False)) * 4 for extent in size)
        pixels = drawn((x0, y0, x1, y1), size)
        before = Box((x0 / 96, y0 / 64, x1 / 96, y1 / 64), 0)
        labels = Labels(boxes=(before,), segments=pixels[..., 0] // 255)
        cut = cut_of(*size, Crop.random, True, random)
        after = cut_labels(labels, cut, 64, 64, size)
        cut_pixels = to_pixels(Image.fromarray(pixels), 64, 64, cut)[..., 0]
        assert after.segments is not None and np.array_equal(after.segments, cut_pixels // 255)
        share = cut_pixels.astype(bool).sum() / ((x1 - x0) * (y1 - y0))
        assert len(after.boxes) == (share >= 0.1)
        if after.boxes:
            left, top, right, bottom = (round(corner * 64) for corner in after.boxes[0].corners)
            assert np.array_equal(drawn((left, top, right, bottom), (64, 64))[..., 0], cut_pixels)
            kept += 1
    assert 20 < kept < 60


def test_a_scaled_map_keeps_its_numbers_and_its_place() -> None:
    segments = np.array([[3, 200], [17, 255]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # [16, 16]
    assert np.array_equal(shrink_map(segments, (4, 4)), segments[::4, ::4])
    after = cut_labels(Labels(segments=segments), Cut(0, 0, 16, 16, flipped=True), 8, 8, (16, 16))
    assert after.segments is not None and np.array_equal(after.segments, segments[::2, ::-2])
