"""Images for people: exact bytes, and grids whose captions stay below their image."""

import numpy as np
import torch
from PIL import ImageFont

from train.engine.image_grid import film_strips, grid, to_uint8, wrap


def test_range_maps_to_all_bytes_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[0, :, :, 0], np.arange(256).reshape(16, 16))


def test_grid_places_every_image_unchanged_on_white() -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 24, 24, 3), dtype=np.uint8)
    sheet = np.asarray(grid(images, columns=3))
    margin = (sheet.shape[1] - 3 * 24) // 4
    assert sheet.shape[0] == 2 * 24 + 3 * margin
    for index, image in enumerate(images):
        top, left = (margin + (24 + margin) * at for at in divmod(index, 3))
        assert np.array_equal(sheet[top : top + 24, left : left + 24], image)
    assert (sheet[-margin - 24 :, -margin - 24 :] == 255).all()  # the empty place


def test_captions_are_drawn_within_their_column() -> None:
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    captions = ["a surprised striped orange monster with two eyes on a cream background", "x" * 200]
    sheet = np.asarray(grid(images, columns=2, captions=captions, scale=2))
    margin = (sheet.shape[1] - 2 * 128) // 3
    below = sheet[margin + 128 :]
    assert below.min() < 100  # ink
    assert (below[:, margin + 128 + 1 : 2 * margin + 128 - 1] == 255).all()
    assert (below[:, : margin - 1] == 255).all() and (below[:, -margin + 1 :] == 255).all()
    assert (below[-margin // 2 :] == 255).all()


def test_wrapping_keeps_every_word_that_fits_and_marks_what_is_cut() -> None:
    font = ImageFont.load_default(size=12)
    text = "a red planet with two rings and three moons"
    lines = wrap(text, font, 100)
    assert " ".join(lines) == text and all(font.getlength(line) <= 100 for line in lines)
    short = wrap(text, font, 100, lines=2)
    assert len(short) == 2 and short[1].endswith("…") and font.getlength(short[1]) <= 100
    assert wrap("", font, 100) == []


def test_film_strips_show_every_frame_unchanged_in_its_row() -> None:
    """Each row below its caption, which is drawn on white; the label of a frame below it."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 3, 128, 128, 3), dtype=np.uint8)
    captions = ["a red planet", "a very long caption that goes on and on " * 20]
    sheet = np.asarray(film_strips(frames, captions, ["step 1", "step 2", "step 4"]))
    margin = (sheet.shape[1] - 3 * 128) // 4
    lefts = [margin + (128 + margin) * column for column in range(3)]
    tops = [
        next(top for top in range(sheet.shape[0]) if np.array_equal(sheet[top, margin : margin + 128], row[0, 0]))
        for row in frames
    ]
    for row, top in zip(frames, tops, strict=True):
        for frame, left in zip(row, lefts, strict=True):
            assert np.array_equal(sheet[top : top + 128, left : left + 128], frame)
            assert sheet[top + 128 + margin // 2 : top + 128 + 2 * margin, left : left + 128].min() < 100  # its label
    above = [sheet[: tops[0]], sheet[tops[0] + 128 + 3 * margin : tops[1]]]
    assert all(part.min() < 100 for part in above)  # the captions, the second one in two lines
    assert above[1].shape[0] > above[0].shape[0]
    assert (sheet[:, -margin + 1 :] == 255).all() and (sheet[-margin // 2 :] == 255).all()
