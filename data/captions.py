"""Captions: one spelling for each, and which of them training never sees."""

import hashlib
import unicodedata
from dataclasses import dataclass


def clean_caption(text: str) -> str:
    """NFC, white space and control characters collapsed to single spaces; may be empty."""
    printable = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    encodable = printable.encode("utf-8", "replace").decode()  # JSON may smuggle in lone surrogates
    return " ".join(unicodedata.normalize("NFC", encodable).split())


def caption_rank(caption: str) -> float:
    """A caption's place in [0, 1), uniform over captions; those below `heldout_fraction` are held out.

    It depends on nothing but the text (letter case aside), so that a held-out caption is never trained on, whichever
    source or seed it comes from.
    """
    digest = hashlib.sha256(caption.casefold().encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True, slots=True)
class Border:
    """Where training ends and the held-out side begins."""

    fraction: float  # ranks below it are held out
    by_key: bool = False  # each sample has a rank of its own, because nearly all captions are the same

    def rank(self, caption: str, key: str) -> float:
        """A sample's place in [0, 1)."""
        return caption_rank(f"{caption}/{key}" if self.by_key else caption)

    def side(self, caption: str, key: str) -> str:
        """Where a sample goes."""
        return "heldout" if self.rank(caption, key) < self.fraction else "train"
