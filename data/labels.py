"""Labels of an image: its class, boxes around what it shows, and a map with the class of each pixel.

They lie in the sample's JSON as `class` (a name), `class_id` and `boxes`, a list of {"box": [x0, y0, x1, y1], "class":
name, "class_id": number} with corners in fractions of width and height, and beside the image as `KEY.seg.png`. The
manifest says what the numbers mean. Names may be missing, numbers may not.
"""

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from conf.errors import UserError
from data.images import Cut, ImageError, Unfit, open_indices

MAP = "seg.png"  # extension of the map: 8 bits, a class for each pixel of the image
UNLABELLED = 255  # in a map: no class
GROUPS = ("classes", "box_classes", "segments")  # of names, in the manifest
MOST_CLASSES = 65_536  # a larger number is taken for a mistake
NUMBER = re.compile(r"[0-9]{1,9}(\.0*)?")  # a whole one, in text
KEPT_AREA = 0.1  # of a box that a cut must leave, or the box is dropped


class LabelError(UserError):
    """A label that cannot be what it says; the message names the field."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box around an object, with its class."""

    corners: tuple[float, float, float, float]  # left, top, right, bottom, in fractions of width and height
    class_id: int
    class_name: str = ""

    @property
    def area(self) -> float:
        """Share of the image that the box covers."""
        left, top, right, bottom = self.corners
        return (right - left) * (bottom - top)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels of one image; all of them may be missing."""

    class_id: int | None = None
    class_name: str = ""
    boxes: tuple[Box, ...] = ()
    segments: np.ndarray | None = None  # uint8 [H, W]

    def uses(self) -> list["Use"]:
        """Every class that it mentions."""
        found = [] if self.class_id is None else [Use("classes", "class_id", self.class_id, self.class_name)]
        for number, box in enumerate(self.boxes):
            found.append(Use("box_classes", f"boxes[{number}].class_id", box.class_id, box.class_name))
        if self.segments is not None:
            labelled = self.segments[self.segments != UNLABELLED]
            found += [Use("segments", MAP, int(labelled.max()))] if labelled.size else []
        return found


class Use(NamedTuple):
    """A class that a sample mentions."""

    group: str  # of GROUPS
    field: str
    number: int
    name: str = ""


@dataclass(slots=True)
class Vocabulary:
    """Names of a data set's classes, by number in each group; "" where none is known."""

    groups: dict[str, dict[int, str]] = field(default_factory=lambda: {group: {} for group in GROUPS})
    numbers: dict[tuple[str, str], int] = field(default_factory=dict)  # by group and name

    @classmethod
    def of(cls, names: Mapping[str, Iterable[str]]) -> "Vocabulary":
        """Lists of names, as in a manifest's provenance under "labels"."""
        vocabulary = cls()
        vocabulary.learn(Use(group, group, *entry) for group in GROUPS for entry in enumerate(names.get(group, ())))
        return vocabulary

    def uses(self) -> list[Use]:
        """Every class with its name, for another vocabulary to learn."""
        return [Use(group, group, *entry) for group, names in self.groups.items() for entry in names.items()]

    def as_dict(self) -> dict[str, list[str]]:
        """The list of names of each group that has classes; as long as the largest number asks for."""
        known = {group: names for group, names in self.groups.items() if names}
        return {group: [names.get(i, "") for i in range(max(names) + 1)] for group, names in known.items()}

    def learn(self, uses: Iterable[Use]) -> None:
        """Add what a sample mentions; raises LabelError, and adds nothing, where it contradicts what is known."""
        uses = list(uses)
        for use in uses:
            self._compare(use)
        for use in uses:
            names = self.groups[use.group]
            names[use.number] = use.name or names.get(use.number, "")
            if use.name:
                self.numbers[use.group, use.name] = use.number

    def check(self, uses: Iterable[Use]) -> None:
        """Raises LabelError for a class that the data set does not have, or has under another name."""
        for use in uses:
            count = max(self.groups[use.group], default=-1) + 1
            if use.number >= count:
                raise LabelError(f"{use.field}: {use.number} is out of range, the data set has {count} {use.group}")
            self._compare(use)

    def _compare(self, use: Use) -> None:
        known = self.groups[use.group].get(use.number, "")
        if use.name and known and use.name != known:
            raise LabelError(f"{use.field}: {use.number} is '{known}' in this data set, not '{use.name}'")
        number = self.numbers.get((use.group, use.name), use.number)
        if number != use.number:
            raise LabelError(f"{use.field}: '{use.name}' is {number} in this data set, not {use.number}")


def to_json(labels: Labels) -> dict[str, Any]:
    """The fields of the sample's JSON."""
    fields: dict[str, Any] = {} if labels.class_id is None else _class_fields(labels.class_id, labels.class_name)
    if labels.boxes:
        fields["boxes"] = [
            {"box": list(box.corners), **_class_fields(box.class_id, box.class_name)} for box in labels.boxes
        ]
    return fields


def encode_map(segments: np.ndarray) -> bytes:
    """uint8 `[H, W]` → contents of `KEY.seg.png`."""
    buffer = io.BytesIO()
    Image.fromarray(segments).save(buffer, "PNG")
    return buffer.getvalue()


def decode_map(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Contents of `KEY.seg.png` → uint8 `[H, W]`; `size` (width, height) is the image's. Raises LabelError."""
    try:
        return open_indices(content, size)
    except Unfit as error:
        raise LabelError(f"{MAP}: {error}") from error
    except ImageError as error:
        raise LabelError(f"{MAP}: {'broken' if 'broken' in str(error) else 'not a readable'} PNG") from error


def shrink_map(segments: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map uint8 `[H, W]` as large as its image was made: the nearest pixel of each."""
    if segments.shape == size[::-1]:
        return segments
    return np.asarray(Image.fromarray(segments).resize(size, Image.Resampling.NEAREST))


def read_labels(meta: Mapping[str, Any], segments: bytes | np.ndarray | None, size: tuple[int, int]) -> Labels:
    """The labels of a sample: fields of its JSON, and its map as a file or as drawn.

    Args:
        meta: a `class` without `class_id` is no label.
        size: width and height of the image.

    Raises:
        LabelError: naming the field; also where the sample contradicts itself.
    """
    class_id = None if meta.get("class_id") is None else _class_id(meta["class_id"], "class_id")
    name = "" if class_id is None else _class_name(meta, "class")
    entries = meta.get("boxes") or []
    if not isinstance(entries, list):
        raise LabelError("boxes: not a list")
    boxes = tuple(_box(entry, f"boxes[{number}]") for number, entry in enumerate(entries))
    if isinstance(segments, bytes):
        segments = decode_map(segments, size)
    labels = Labels(class_id, name, boxes, segments)
    own = Vocabulary()
    for use in labels.uses():
        own.learn([use])
    return labels


def cut_labels(labels: Labels, cut: Cut, width: int, height: int, size: tuple[int, int]) -> Labels:
    """The labels of what a `Cut` leaves of an image, as `data.images.to_pixels` treats its pixels.

    Boxes are clipped, and dropped where less than a tenth of their area is left; the map takes the nearest pixel.

    Args:
        width: pixels of the cut when it is scaled, as is `height`.
        size: width and height of the image, before.
    """
    clipped = [(box, _clipped(box, cut, size)) for box in labels.boxes]
    scale = cut.width * cut.height / (size[0] * size[1])  # share of the image that the cut is
    boxes = tuple(after for box, after in clipped if after.area * scale >= KEPT_AREA * box.area and after.area > 0)
    segments = labels.segments
    if segments is not None:
        corners = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.height)
        segments = np.asarray(Image.fromarray(segments).resize((width, height), Image.Resampling.NEAREST, box=corners))
        segments = np.ascontiguousarray(segments[:, ::-1] if cut.flipped else segments)
    return Labels(labels.class_id, labels.class_name, boxes, segments)


def _clipped(box: Box, cut: Cut, size: tuple[int, int]) -> Box:
    """A box in fractions of the cut; without area where it lies outside."""

    def along(start: float, stop: float, offset: int, extent: int, whole: int) -> tuple[float, float]:
        low, high = ((end * whole - offset) / extent for end in (start, stop))
        return min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)

    x0, y0, x1, y1 = box.corners
    left, right = along(x0, x1, cut.left, cut.width, size[0])
    top, bottom = along(y0, y1, cut.top, cut.height, size[1])
    if cut.flipped:
        left, right = 1 - right, 1 - left
    return Box((left, top, right, bottom), box.class_id, box.class_name)


def _class_fields(number: int, name: str) -> dict[str, Any]:
    return {"class": name, "class_id": number} if name else {"class_id": number}


def _box(entry: Any, place: str) -> Box:
    if not isinstance(entry, dict):
        raise LabelError(f"{place}: not an object with box and class_id")
    corners = entry.get("box")
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        raise LabelError(f"{place}.box: not [x0, y0, x1, y1]")
    if not all(0 <= corner <= 1 for corner in corners):
        shown = f"{corners}"[:60]
        raise LabelError(f"{place}.box: {shown} leaves the image; corners are fractions of its width and height")
    x0, y0, x1, y1 = map(float, corners)
    if x1 <= x0 or y1 <= y0:
        raise LabelError(f"{place}.box: {corners} has no area; it is [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    number = _class_id(entry.get("class_id"), f"{place}.class_id")
    return Box((x0, y0, x1, y1), number, _class_name(entry, f"{place}.class"))


def _class_name(entry: Mapping[str, Any], place: str) -> str:
    name = entry.get("class") or ""
    if not isinstance(name, str):
        raise LabelError(f"{place}: not text")
    return name


def _class_id(value: Any, place: str) -> int:
    """Numbers, or, in tables of text, numbers in text; tables make 1.0 of 1 where another row has none."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise LabelError(f"{place}: {repr(value)[:40]} is not a whole number")
    if not 0 <= value < MOST_CLASSES:
        raise LabelError(f"{place}: {str(value)[:40]} is not in 0 to {MOST_CLASSES - 1}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
