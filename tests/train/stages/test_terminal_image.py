"""Images in a terminal: only where it can show them, and what it is sent decodes to the image."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from conf.schema import TerminalImages
from train.stages.display import Display, StageRow
from train.stages.terminal_image import TerminalImage, kitty, newest_image, protocol_of, sixel

KITTY = {"TERM": "xterm-kitty"}


def terminal(width: int = 80, **options: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=True, **options), out


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (KITTY, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "sixel"),
        ({"TERM": "xterm-256color"}, "none"),
        ({"TERM": "linux"}, "none"),
        (KITTY | {"TMUX": "/tmp/tmux"}, "none"),
        (KITTY | {"STY": "1.pts"}, "none"),
        (KITTY | {"CI": "true"}, "none"),
        ({}, "none"),
    ],
)
def test_a_terminal_is_sent_images_only_if_it_is_known_to_show_them(environment: dict[str, str], expected: str) -> None:
    assert protocol_of(TerminalImages.auto, terminal()[0], environment).value == expected
    assert protocol_of(TerminalImages.none, terminal()[0], environment) is TerminalImages.none
    for wish in TerminalImages:
        assert protocol_of(wish, Console(file=io.StringIO()), environment) is TerminalImages.none


def test_a_wish_counts_on_any_terminal() -> None:
    assert protocol_of(TerminalImages.sixel, terminal()[0], {"TERM": "xterm"}) is TerminalImages.sixel


def example(width: int = 96, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_kitty_is_sent_the_png_in_pieces_and_answers_nothing() -> None:
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(example(), 12, 3))
    assert commands[0][0] == "a=T,f=100,q=2,C=1,c=12,r=3,m=1" and commands[-1][0] == "m=0" and len(commands) > 2
    assert all(len(piece) <= 4096 for _, piece in commands)
    content = base64.b64decode("".join(piece for _, piece in commands))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(example()))


def test_sixel_decodes_to_the_image() -> None:
    colors = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)]
    pixels = np.array(colors, dtype=np.uint8)[np.random.default_rng(0).integers(4, size=(20, 31))]
    assert np.array_equal(decoded(sixel(Image.fromarray(pixels))), pixels)


def decoded(text: str) -> np.ndarray:
    """What a terminal shows of a sixel command."""
    header = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert header is not None and text.endswith("\x1b\\")
    width, height = map(int, header.groups())
    image, palette = np.zeros((height, width, 3), dtype=np.uint8), dict[int, tuple[int, ...]]()
    row = column = color = 0
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~$-]", text[header.end() : -2]):
        if token.startswith("#"):
            color, *rgb = map(int, token[1:].split(";"))
            if rgb:
                palette[color] = tuple(round(255 * share / 100) for share in rgb[1:])
        elif token == "$":
            column = 0
        elif token == "-":
            row, column = row + 6, 0
        else:
            end = column + (int(token[1:-1]) if token.startswith("!") else 1)
            for bit in range(6):
                if (ord(token[-1]) - 63) >> bit & 1:
                    image[row + bit, column:end] = palette[color]
            column = end
    return image


@pytest.mark.parametrize("protocol", [TerminalImages.kitty, TerminalImages.sixel])
def test_an_image_takes_lines_of_its_own_and_leaves_the_cursor_below(protocol: TerminalImages) -> None:
    console, out = terminal()
    console.print(TerminalImage(protocol, example(80, 64)), crop=False)
    match = re.fullmatch(r"\n{4}\x1b\[4A\x1b7.*\x1b8\x1b\[4B\r", out.getvalue(), re.DOTALL)  # ten columns of 8 x 16
    assert match is not None


def test_a_new_image_is_named_once_and_drawn_only_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for seen in (100, 20):
        example().save(tmp_path / f"samples/prompts-{seen:012d}.png")
    newest = newest_image(tmp_path)
    assert newest is not None and newest.name == "prompts-000000000100.png"
    console, out = terminal(width=200)
    Display([StageRow("unet")], console, TerminalImages.kitty).show("unet", newest, since=0)
    assert "\x1b_G" in out.getvalue()
    plain = io.StringIO()
    display = Display([StageRow("unet")], Console(file=plain, width=40), TerminalImages.none)
    for _ in range(2):
        display.show("unet", newest, since=0)
    display.show("unet", None, since=0)
    assert plain.getvalue() == f"unet        image    {newest}\n"


def test_an_image_of_an_earlier_start_or_a_broken_one_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"half a")
    console, out = terminal(width=200)
    display = Display([StageRow("sample")], console, TerminalImages.kitty)
    display.show("sample", newest_image(tmp_path), since=path.stat().st_mtime + 1)
    assert out.getvalue() == ""
    display.show("sample", newest_image(tmp_path), since=0)
    assert "\x1b_G" not in out.getvalue()
