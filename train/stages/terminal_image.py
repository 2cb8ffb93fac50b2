"""Images in a terminal that can show them: kitty's graphics protocol, or sixel, the older one."""

import base64
import fcntl
import io
import os
import struct
import termios
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import ControlType, Segment

from conf.schema import TerminalImages

STDOUT = 1
CHUNK = 4096  # bytes of a kitty command
CELL = (8, 16)  # pixels of a character where the terminal does not tell
WIDEST = 76  # columns
COLORS = 255  # of a sixel image; one more would be transparent
KITTY = ("xterm-kitty", "xterm-ghostty")  # values of $TERM
SIXEL = ("foot", "foot-extra", "mlterm", "yaft-256color")
SHOWN = ("reconstructions", "prompts")  # names of images in a training
SIXEL_PROGRAMS = ("WezTerm", "mintty")  # values of $TERM_PROGRAM


def protocol_of(wish: TerminalImages, console: Console, environment: Mapping[str, str] = os.environ) -> TerminalImages:
    """How images can be shown; `none` wherever it is not sure, as inside tmux and screen, which pass none on."""
    if not console.is_terminal or console.is_dumb_terminal or wish is TerminalImages.none:
        return TerminalImages.none
    if wish is not TerminalImages.auto:
        return wish
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or "STY" in environment or "CI" in environment:
        return TerminalImages.none
    if term in KITTY or program == "ghostty":
        return TerminalImages.kitty
    return TerminalImages.sixel if term in SIXEL or program in SIXEL_PROGRAMS else TerminalImages.none


class TerminalImage:
    """An image as something that a console prints, in lines of its own.

    Args:
        protocol: `kitty` or `sixel`.
        image: at most as wide as it is shown.
    """

    def __init__(self, protocol: TerminalImages, image: Image.Image) -> None:
        self.protocol, self.image = protocol, image.convert("RGB")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Empty lines, and on the way back over them the image."""
        width, height = cell_size()
        columns = max(1, min(WIDEST, options.max_width - 2, self.image.width // width))
        rows = max(1, round(columns * width * self.image.height / self.image.width / height))
        draw = kitty(self.image, columns, rows)
        if self.protocol is TerminalImages.sixel:
            draw = sixel(self.image.resize((columns * width, rows * height), Image.Resampling.LANCZOS))
        # The lines first: at the bottom of the screen they make the room. Save and restore the cursor around the image,
        # since terminals differ in where they leave it.
        yield Segment("\n" * rows)
        up = f"\x1b[{rows}A\x1b7{draw}\x1b8\x1b[{rows}B\r"
        yield Segment(up, None, [(ControlType.CARRIAGE_RETURN,)])


def newest_image(output_dir: Path) -> Path | None:
    """The last image that a stage has left to look at; None before the first one."""
    drawn = [path for name in SHOWN for path in (output_dir / "samples").glob(f"{name}-*.png")]
    finished = output_dir / "grid.png"
    return finished if finished.is_file() else max(drawn, default=None)


def cell_size() -> tuple[int, int]:
    """Width and height of a character in pixels."""
    try:
        size = fcntl.ioctl(STDOUT, termios.TIOCGWINSZ, b"\0" * 8)
    except OSError:
        return CELL
    rows, columns, width, height = struct.unpack("HHHH", size)
    return (width // columns, height // rows) if rows and columns and width >= columns and height >= rows else CELL


def kitty(image: Image.Image, columns: int, rows: int) -> str:
    """The commands that show an image in so many cells: a PNG in pieces, the cursor stays, and nothing is answered."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    content = base64.b64encode(stream.getvalue()).decode()
    pieces = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    keys = [f"a=T,f=100,q=2,C=1,c={columns},r={rows},", *[""] * (len(pieces) - 1)]
    return "".join(
        f"\x1b_G{key}m={int(number < len(pieces) - 1)};{piece}\x1b\\"
        for number, (key, piece) in enumerate(zip(keys, pieces, strict=True))
    )


def sixel(image: Image.Image) -> str:
    """The command that shows an image pixel by pixel: for each six rows the pixels of each colour, as runs."""
    reduced = image.quantize(COLORS)
    pixels = np.asarray(reduced)  # [H, W]
    palette = np.asarray(reduced.getpalette(), dtype=int).reshape(-1, 3) * 100 // 255  # in per cent
    colors = "".join(f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(palette.tolist()))
    bands = "-".join("$".join(_band(pixels[top : top + 6])) for top in range(0, len(pixels), 6))
    return f'\x1bPq"1;1;{image.width};{image.height}{colors}{bands}\x1b\\'


def _band(pixels: np.ndarray) -> Iterator[str]:
    """Six rows at most, colour by colour; each character stands for the rows of a column that have it."""
    weights = 1 << np.arange(len(pixels))
    for color in np.unique(pixels).tolist():
        codes = 63 + weights @ (pixels == color)  # [W]
        runs = ((chr(code), len(list(run))) for code, run in groupby(codes.tolist()))
        yield f"#{color}" + "".join(f"!{count}{code}" if count > 3 else code * count for code, count in runs)
