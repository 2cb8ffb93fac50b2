"""What a sample of an image-text shard holds: one reader for builds, trainings and everything that shows data.

Captions lie in `KEY.txt` or as "caption" in `KEY.json`; images have one of the extensions `EXTENSIONS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from conf.errors import UserError
from conf.plain_json import loads
from data.captions import clean_caption, decode_text
from data.images import EXTENSIONS
from data.order import choice
from data.shards.shard import Buffer, described

CAPTION_BYTES = 65536  # a longer caption is taken for a mistake
_JSON_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}


def image_of(record: Mapping[str, Any]) -> bytes:
    """Contents of the image file of a sample; of several the photo, since a .png beside a .jpg is mostly its mask."""
    for name in ("jpg", "jpeg", *EXTENSIONS):
        if name in record:
            return bytes(record[name])
    raise UserError(f"no image: {described(record)}")


def caption_of(record: Mapping[str, Any]) -> str:
    """The caption of a sample as a build would write it; may be empty."""
    if "txt" in record:
        try:
            return caption_in(record["txt"])
        except UserError as error:
            raise UserError(f"its .txt is {error}") from None
    fields = fields_of(record)
    if "caption" not in fields:
        raise UserError(f'no caption: it has no .txt, and no "caption" in a .json; {described(record)}')
    return caption_from(fields["caption"])


def captions_named(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Captions of a sample by name: "caption" is the usual one, others are fields of its .json, as "synthetic.long".

    An image that lacks one has the first in its place, and one that lacks the first has the usual one.
    """
    found = [None if name == "caption" else _field(record, name) for name in names]
    first = caption_of(record) if found[0] is None else caption_from(found[0])
    return [first, *(first if value is None else caption_from(value) for value in found[1:])]


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions of an image by name, of which one is drawn for each position of a training stream.

    The order of the names belongs to the draw, and the first one stands in for those that an image lacks.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float], cached: Sequence[str] = ()) -> Self:
        """Captions by the weights of `stream.captions`.

        Of a latent cache they are all that it has, those that the option does not name with weight 0.
        The cache's order wins over that of the option, so that a run draws the same with the cache and without it.
        """
        names = tuple(cached or weights or ["caption"])
        return cls(names, tuple(weights.get(name, 0.0 if weights else 1.0) for name in names))

    def draw(self, seed: int, position: int) -> int:
        """Number of the one that comes at a position."""
        return choice(seed, position, "caption", self.weights)

    def read(self, record: Mapping[str, Any]) -> list[str]:
        """All of a sample, in the order of their names; raises UserError."""
        return captions_named(record, self.names)


def _field(record: Mapping[str, Any], name: str) -> Any:
    """A field of a sample's .json, also of an object or list in it; None where there is none."""
    value: Any = fields_of(record)
    for part in name.split("."):
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def caption_in(content: Buffer) -> str:
    """The caption that a text file holds; raises UserError."""
    if len(content) > CAPTION_BYTES:
        raise UserError(f"too long for a caption: it has more than {CAPTION_BYTES} bytes")
    return clean_caption(decode_text(content))


def caption_from(value: Any) -> str:
    """The caption that a field of JSON holds; raises UserError."""
    if not isinstance(value, str):
        raise UserError(f'"caption" is not text but {_JSON_NAMES.get(type(value), "an object")}')
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise UserError('"caption" has half of a character (a lone surrogate)') from None
    if size > CAPTION_BYTES:
        raise UserError(f'"caption" is too long: it has more than {CAPTION_BYTES} bytes')
    return clean_caption(value)


def fields_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sample's .json, none where it has none; raises UserError."""
    return fields_in(record["json"]) if "json" in record else {}


def fields_in(content: Buffer) -> dict[str, Any]:
    """The object that a JSON file holds; NaN and infinities, which JSON does not know, are null. Raises UserError."""
    try:
        fields = loads(decode_text(content))
    except UserError as error:
        raise UserError(f"its .json is {error}") from None
    except ValueError as error:
        raise UserError(f"its .json is broken: {error}") from None
    if not isinstance(fields, dict):
        raise UserError("its .json holds no object")
    return fields
