"""Pictures: bytes from anywhere → RGB → uint8 pixels of the wanted shape → a tensor in [-1, 1]."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor

from conf.errors import UserError
from conf.schema import Crop, ImageFormat

if TYPE_CHECKING:
    import torch

# Formats that open_image may decode: the others of Pillow are rare, or run external programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

# Every picture comes in through open_image, which has a limit of its own (max_pixels), lower or higher than Pillow's.
Image.MAX_IMAGE_PIXELS = None

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation → the operation that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture that cannot or must not be decoded; the message is the reason."""


def parse_color(name: str) -> tuple[int, int, int]:
    """A colour name or #rrggbb as 0–255; raises ValueError for anything else."""
    color = ImageColor.getrgb(name)
    if len(color) != 3:
        raise ValueError(f"{name!r} has an alpha channel")
    return color


def open_image(data: bytes, max_pixels: int, background: str = "white") -> Image.Image:
    """Decode a picture to upright RGB, transparent pixels over `background`; of an animation the first frame.

    The size is checked before a pixel is decoded. Raises ImageError with the reason when the picture has more than
    `max_pixels`, is truncated, or is of a format or mode without a defined meaning.
    """
    behind = parse_color(background)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # a hostile header makes Pillow's parsers raise nearly anything
        raise ImageError("not a readable picture" if data else "empty file") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than max_pixels={max_pixels}")
    try:
        return _rgb(_upright(image), behind)
    except ImageError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"broken picture: {reason}") from error


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scale so that the shorter side has `shorter_side` pixels; never enlarges."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a picture that training sees, in pixels of the picture."""

    left: int
    top: int
    width: int
    height: int
    flipped: bool = False  # mirrored left to right


def cut_of(
    width: int,
    height: int,
    crop: Crop = Crop.center,
    flip: bool = False,  # mirror with probability 1/2
    rng: np.random.Generator | None = None,  # needed by a random crop or a flip
    aspect: float = 1.0,  # width / height of the cut
) -> Cut:
    """One of the largest parts of a picture that have this aspect."""
    wide = min(width, max(1, round(height * aspect)))
    high = min(height, max(1, round(width / aspect)))
    left, top = (width - wide) // 2, (height - high) // 2
    if crop is Crop.random:
        assert rng is not None, "a random crop needs rng"
        offset = int(rng.integers(max(width - wide, height - high) + 1))
        left, top = (offset, 0) if width - wide > height - high else (0, offset)
    if flip:
        assert rng is not None, "a flip needs rng"
    return Cut(left, top, wide, high, flipped=flip and rng is not None and bool(rng.random() < 0.5))


def to_pixels(image: Image.Image, width: int, height: int, cut: Cut) -> np.ndarray:
    """A part of an RGB picture, scaled to uint8 `[height, width, 3]`.

    It is cut out and scaled in one operation, so an extreme aspect ratio costs no memory.
    """
    box = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.height)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))  # [H, W, 3]
    return np.ascontiguousarray(pixels[:, ::-1] if cut.flipped else pixels)


def to_tensor(pixels: np.ndarray) -> "torch.Tensor":
    """uint8 `[H, W, 3]` → float32 `[3, H, W]` in [-1, 1]."""
    import torch  # here, so that the processes that build shards start without it

    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0  # [3, H, W]
    return torch.from_numpy(np.ascontiguousarray(scaled))


def encode_image(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """RGB picture → file contents; `quality` (1–100) counts for jpg and webp.

    Raises ImageError when the format cannot hold the picture (webp: at most 16,383 pixels along a side).
    """
    options: dict[ImageFormat, dict[str, Any]] = {
        ImageFormat.png: {"format": "PNG"},
        ImageFormat.jpg: {"format": "JPEG", "quality": quality, "subsampling": "4:4:4"},
        ImageFormat.webp: {"format": "WEBP", "quality": quality},
    }
    buffer = io.BytesIO()
    try:
        image.save(buffer, **options[image_format])
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be stored as {image_format.value}: {error}") from error
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block does not make the pixels unusable
        orientation = 1
    operation = _UPRIGHT.get(orientation)
    return image if operation is None else image.transpose(operation)


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey: 0–65535 → 0–255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
    return image.convert("RGB")
