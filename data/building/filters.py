"""Which sound samples a build leaves out: too small, too long, badly scored, or copies of others."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

from PIL import Image

from conf.schema import FilterConfig

HASH_BITS = 64


class Dropped(Exception):
    """A sample that a filter leaves out.

    Args:
        filter_name: the option's name, and the JSON field's where there is one.
    """

    def __init__(self, filter_name: str, reason: str) -> None:
        super().__init__(reason)
        self.filter_name, self.reason = filter_name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filter_name, self.reason)


def check_texts(cfg: FilterConfig, caption: str, meta: Mapping[str, Any]) -> None:
    """Filters that need no pixels; raises Dropped."""
    length = len(caption)
    if length < cfg.min_caption:
        raise Dropped("min_caption", f"a caption of {length} characters")
    if cfg.max_caption and length > cfg.max_caption:
        raise Dropped("max_caption", f"a caption of {length} characters")
    for option, limits in (("min_score", cfg.min_score), ("max_score", cfg.max_score)):
        for field, limit in limits.items():
            value = _number(meta.get(field))
            if value is None:
                raise Dropped(f"{option}.{field}", f"no number in {field}")
            if value < limit if option == "min_score" else value > limit:
                raise Dropped(f"{option}.{field}", f"{field} is {value:g}")


def check_size(cfg: FilterConfig, width: int, height: int) -> None:
    """Filters of the image's shape; raises Dropped."""
    shorter, longer = sorted((width, height))
    if shorter < cfg.min_side:
        raise Dropped("min_side", f"{width} x {height} pixels")
    if cfg.max_aspect and longer > cfg.max_aspect * shorter:
        raise Dropped("max_aspect", f"{width} x {height} pixels")


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay nearly the same when an image is scaled, compressed or slightly toned."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


class NearDuplicates:
    """Images whose perceptual hash differs in at most `distance` bits from one that was kept before.

    The hash is cut into distance + 1 bands: two hashes that near each other agree in one of them at least.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        edges = [HASH_BITS * band // (distance + 1) for band in range(distance + 2)]
        self.bands = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]
        self.tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in self.bands]

    def find(self, value: int) -> int | None:
        """The kept hash that this one repeats, if any."""
        for (low, mask), table in zip(self.bands, self.tables, strict=True):
            for kept in table.get(value >> low & mask, ()):
                if (kept ^ value).bit_count() <= self.distance:
                    return kept
        return None

    def keep(self, value: int) -> None:
        """Remember an image."""
        for (low, mask), table in zip(self.bands, self.tables, strict=True):
            table[value >> low & mask].append(value)


def _number(value: Any) -> float | None:
    """Scores are numbers, or, in tables of text, numbers in text."""
    try:
        number = None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or not isfinite(number) else number
