"""Captions of any script: drawn in a font that has them, or named as what cannot be drawn."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from train.engine import fonts
from train.engine.fonts import Lettering, charted, font_with
from train.engine.image_grid import boxed, captioned, wrap

KOREAN, AMHARIC, CYRILLIC = "고양이", "ድመት", "кот"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts of its own, to which nothing was told yet."""
    monkeypatch.setattr(fonts, "system_fonts", list)
    monkeypatch.setattr(fonts, "_told", set())
    font_with.cache_clear()
    yield
    font_with.cache_clear()


def inked(text: str, size: int = 20) -> np.ndarray:
    canvas = Image.new("L", (300, 40), "white")
    Lettering(size).draw(ImageDraw.Draw(canvas), (5, 5), text, "black")
    return np.asarray(canvas)


def korean_font(path: Path) -> str:
    """A font in which each syllable of KOREAN is a bar of its own height."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    builder, glyphs = FontBuilder(1000, isTTF=True), {}
    names = [".notdef", *(f"syllable{number}" for number in range(len(KOREAN)))]
    for number, name in enumerate(names):
        pen = TTGlyphPen(None)
        for step, corner in enumerate([(100, 0), (100, 200 * number + 50), (900, 200 * number + 50), (900, 0)]):
            (pen.lineTo if step else pen.moveTo)(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(char): name for char, name in zip(KOREAN, names[1:], strict=True)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def test_latin_is_drawn_as_ever() -> None:
    canvas = Image.new("L", (300, 40), "white")
    ImageDraw.Draw(canvas).text((5, 5), 'a "red" planet, 5', fill="black", font=ImageFont.load_default(size=20))
    assert np.array_equal(inked('a "red" planet, 5'), np.asarray(canvas))


@pytest.mark.parametrize("text", [CYRILLIC, "über café", "γάτα", "قطة", "a — b"])
def test_scripts_of_the_bundled_font_are_no_boxes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    letters = [inked(char) for char in text if char.isalpha()]
    box = inked("\U0010fffd")
    assert all((letter != box).any() for letter in letters) and len({letter.tobytes() for letter in letters}) > 1
    captioned(np.zeros((1, 16, 16, 3), np.uint8), [text])
    assert capsys.readouterr().out == ""


def test_a_font_of_the_system_draws_what_ours_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = korean_font(tmp_path / "bars.ttf")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(fonts, "system_fonts", lambda: [str(broken), bars])
    assert [font_with(char) for char in KOREAN] == [bars] * 3
    heights = [int((inked(char) < 128).any(axis=1).sum()) for char in KOREAN]
    assert heights[0] < heights[1] < heights[2]
    letters = Lettering(20)
    mixed = f"a {KOREAN} cat"
    assert letters.getlength(mixed) == pytest.approx(60 + letters.getlength("a ") + letters.getlength(" cat"), abs=8)
    captioned(np.zeros((1, 16, 16, 3), np.uint8), [mixed])
    assert capsys.readouterr().out == ""


def test_what_no_font_has_is_told_once_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((3, 16, 16, 3), np.uint8)
    for _ in range(2):
        captioned(images, [f"{KOREAN} cat", f"{AMHARIC} {CYRILLIC}", "\U0001f642"])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert "no font here has Ethiopic, Hangul, some symbols: images show boxes instead" in told[0]


def test_names_of_boxes_in_any_script_fit_their_frame() -> None:
    from data.labels import Box

    image = np.zeros((128, 128, 3), np.uint8)
    named = [boxed(image, [Box((0.1, 0.5, 0.9, 0.9), 0, name)]) for name in ("кошка", f"{KOREAN} x", "")]
    assert all(one.shape == image.shape and (one.min(axis=2) > 150).any() for one in named)


def test_chinese_lines_end_anywhere_and_others_between_words() -> None:
    font = Lettering(12)
    text = "红色的猫坐在蓝色的背景上看着我们" * 2
    lines = wrap(text, font, 60)
    assert len(lines) > 2 and "".join(lines) == text and all(font.getlength(line) <= 60 for line in lines)
    assert wrap("a red cat 红猫", font, 1000) == ["a red cat 红猫"]


def test_charts_of_names_in_any_script_raise_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with charted([KOREAN, "cat", CYRILLIC]):
            figure.add_subplot().barh([KOREAN, "cat", CYRILLIC], [1, 2, 3])
            figure.savefig(tmp_path / "chart.png")
    assert "no font here has Hangul:" in capsys.readouterr().out
