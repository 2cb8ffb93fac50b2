"""Captions: how text is read, one spelling for each caption, and which of them training never sees."""

import codecs
import hashlib
import re
import unicodedata
from dataclasses import dataclass

from conf.errors import UserError

# Byte-order marks; that of UTF-32 begins as that of UTF-16 does.
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # Unicode's categories Cc, Zl and Zp
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f]")


def decode_text(content: bytes | bytearray | memoryview) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark; raises UserError for anything else."""
    plain = bytes(content)
    if plain.isascii() and not _NO_TEXT.search(text := plain.decode("ascii")):  # nearly all of them
        return text
    start = plain[:4]
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
    try:
        text = str(content, encoding)
    except UnicodeDecodeError:
        raise UserError("not UTF-8, nor UTF-16 with a byte-order mark") from None
    if len(_NO_TEXT.findall(text)) * 3 > len(text):  # Latin or Cyrillic letters in UTF-16 are, byte by byte, ASCII
        raise UserError("not UTF-8 but UTF-16 without a byte-order mark: save it as UTF-8")
    return text


def clean_caption(text: str) -> str:
    """NFC without a byte-order mark, white space and control characters collapsed to single spaces; may be empty.

    It is empty, too, where nothing can be seen, as of a zero-width space; inside words such characters have a meaning.
    """
    encodable = _CONTROLS.sub(" ", text).encode("utf-8", "replace").decode()  # JSON may smuggle in lone surrogates
    cleaned = " ".join(unicodedata.normalize("NFC", encodable).split()).lstrip("\ufeff ")
    seen = any(unicodedata.category(character) not in ("Cf", "Zs") for character in cleaned)
    return cleaned if seen else ""


def caption_rank(caption: str) -> float:
    """A caption's place in [0, 1), uniform over captions; those below `heldout_fraction` are held out.

    It depends on nothing but the text (letter case aside), so that a held-out caption is never trained on, whichever
    source or seed it comes from.
    """
    digest = hashlib.sha256(caption.casefold().encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True, slots=True)
class Border:
    """The border between training and the held-out side."""

    fraction: float  # ranks below it are held out
    by_key: bool = False  # each sample has a rank of its own, because nearly all captions are the same

    def rank(self, caption: str, key: str) -> float:
        """A sample's place in [0, 1)."""
        return caption_rank(f"{caption}/{key}" if self.by_key else caption)

    def side(self, caption: str, key: str) -> str:
        """Side that a sample goes to."""
        return "heldout" if self.rank(caption, key) < self.fraction else "train"
