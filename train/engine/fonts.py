"""Text on images in any script: in Pillow's own font, else in one that comes with matplotlib, else in the system's."""

import io
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageDraw, ImageFont

from train.engine.metric_log import say

DRAWS_BOXES = "lastresort"  # fonts that claim every character
_told: set[str] = set()  # scripts that could not be drawn, as the console knows
REGULAR = 400  # weight of a font for running text
Run = tuple[ImageFont.FreeTypeFont, str]  # text of one font


class Lettering:
    """Text of one size; what no font has is drawn as boxes."""

    def __init__(self, size: float) -> None:
        self.size, self.missing = size, set[str]()
        self.usual = usual(size)
        self.ascent = self.usual.getmetrics()[0]

    def getlength(self, text: str) -> float:
        """Width in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def getbbox(self, text: str) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what `draw` marks, from where it begins."""
        runs = self._runs(text)
        if runs == [(self.usual, text)]:
            return self.usual.getbbox(text)
        boxes, left = list[tuple[float, ...]](), 0.0
        for font, part in runs:
            x0, y0, x1, y1 = font.getbbox(part, anchor="ls")
            boxes.append((left + x0, self.ascent + y0, left + x1, self.ascent + y1))
            left += font.getlength(part)
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)

    def draw(
        self,
        draw: ImageDraw.ImageDraw,
        at: tuple[float, float],  # its top, and there its left or, if it is centred, its middle
        text: str,
        fill: str | tuple[int, ...],
        centred: bool = False,
    ) -> None:
        """Write a line."""
        runs = self._runs(text)
        if runs == [(self.usual, text)]:
            draw.text(at, text, fill=fill, font=self.usual, anchor="ma" if centred else "la")
        else:
            self._draw_runs(draw, (at[0] - self.getlength(text) / 2 if centred else at[0], at[1]), runs, fill)
        self.missing |= {script for char in text if (script := missing_script(char))}

    def _draw_runs(
        self, draw: ImageDraw.ImageDraw, at: tuple[float, float], runs: list[Run], fill: str | tuple[int, ...]
    ) -> None:
        left = at[0]
        for font, part in runs:
            draw.text((left, at[1] + self.ascent), part, fill=fill, font=font, anchor="ls")
            left += font.getlength(part)

    def tell(self) -> None:
        """Say what was drawn as boxes."""
        tell(self.missing)

    def _runs(self, text: str) -> list[Run]:
        """All in one of our fonts if it has all of it, else in parts; spaces and marks stay with what is before."""
        for path in (None, bundled()):
            if all(has(path, char) for char in text):
                return [(self.usual if path is None else opened(path, self.size), text)]
        parts: list[tuple[str | None, str]] = []
        for char in text:
            wanted = font_with(char)
            if parts and (wanted == parts[-1][0] or (not char.isalnum() and has(parts[-1][0], char))):
                parts[-1] = parts[-1][0], parts[-1][1] + char
            else:
                parts.append((wanted, char))
        return [(self.usual if path is None else opened(path, self.size), part) for path, part in parts]


@contextmanager
def charted(texts: Iterable[str]) -> Iterator[None]:
    """Within it, charts of matplotlib find a font for each of these texts' characters, where this machine has one."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties

    chars = set().union(*texts)
    others = {path for char in chars if (path := font_with(char)) not in (None, bundled())}
    families = ["DejaVu Sans", *(FontProperties(fname=path).get_name() for path in sorted(filter(None, others)))]
    with warnings.catch_warnings(), rc_context({"font.family": families}):
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)  # told by `tell`
        yield
    tell({script for char in chars if (script := missing_script(char))})


def tell(scripts: set[str]) -> None:
    """One line about what could not be drawn, unless it was said before."""
    if scripts - _told:
        names = ", ".join(sorted(scripts))
        say("captions", f"no font here has {names}: images show boxes instead; install one, such as Noto's")
        _told.update(scripts)


def missing_script(char: str) -> str:
    """The script of a character that no font has, such as "Hangul"; empty where some font has it."""
    if char.isspace() or unicodedata.category(char)[0] in "CM" or has(font_with(char), char):
        return ""
    return unicodedata.name(char, "?").split()[0].title().replace("Cjk", "CJK") if char.isalpha() else "some symbols"


@lru_cache(maxsize=4096)
def font_with(char: str) -> str | None:
    """File of the font for a character; None: Pillow's own, also where no font has it."""
    if has(None, char):
        return None
    return next((path for path in (bundled(), *system_fonts()) if has(path, char)), None)


@lru_cache(maxsize=65536)
def has(path: str | None, char: str) -> bool:
    """Whether a font has a character."""
    codes = coverage(path)
    at = bisect_left(codes, ord(char))
    return at < len(codes) and codes[at] == ord(char)


@cache
def coverage(path: str | None) -> np.ndarray:
    """Numbers of all characters of a font, ascending; none where it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        if path is None:
            font = FT2Font(io.BytesIO(usual(10).font_bytes))
        else:
            ImageFont.truetype(path, 10)  # of bitmaps of one size alone there is no other
            font = FT2Font(path)
        return np.array(sorted(font.get_charmap()), dtype=np.int64)
    except Exception:  # fonts of a system may be broken, or of a kind that either library does not read
        return np.zeros(0, dtype=np.int64)


def usual(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the basic Latin letters."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has it where a size is asked for"
    return font


@lru_cache(maxsize=1)
def bundled() -> str:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic …"""
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@lru_cache(maxsize=1)
def system_fonts() -> list[str]:
    """Files of this machine's fonts, upright ones of usual weight first."""
    from matplotlib.font_manager import FontEntry, fontManager

    def strangeness(font: FontEntry) -> tuple[bool, int, str]:
        weight = font.weight if isinstance(font.weight, int) else REGULAR
        return font.style != "normal", abs(weight - REGULAR), font.fname

    usable = [font for font in fontManager.ttflist if DRAWS_BOXES not in font.name.replace(" ", "").lower()]
    return list(dict.fromkeys(font.fname for font in sorted(usable, key=strangeness)))


@lru_cache(maxsize=64)
def opened(path: str, size: float) -> ImageFont.FreeTypeFont:
    """A font in one size."""
    return ImageFont.truetype(path, size)
