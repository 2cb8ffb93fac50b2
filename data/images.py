"""Images: bytes from anywhere → RGB → uint8 pixels of the wanted shape → a tensor in [-1, 1]."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageColor
from PIL.IcoImagePlugin import IcoFile

from conf.errors import UserError
from conf.schema import Crop, ImageFormat, ResizeFilter
from data.color_profiles import to_srgb

if TYPE_CHECKING:
    import torch

# Formats that are decoded, with the suffixes of their files. Others of Pillow run external programs (EPS), hold more
# than pixels (PSD) or images that no limit is asked for (ICNS). TGA, which has no signature, is tried last.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "ICO": (".ico",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "TGA": (".tga",),
}
ANY = tuple(FORMATS)
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
USUAL = ("png", "jpg", "jpeg", "webp")
EXTENSIONS = tuple(dict.fromkeys((*USUAL, *(suffix[1:] for suffix in SUFFIXES))))  # in a shard, the first counts
OPAQUE = 128  # of 255, from which on a pixel of a mask counts as drawn
CONTRAST = 1 / 8  # of the range of brightness, below which a mask is of one brightness

# Every image comes in through this module, which has a limit of its own (max_pixels), lower or higher than Pillow's.
Image.MAX_IMAGE_PIXELS = None
# Warnings of broken metadata, which stops nobody from seeing the image.
warnings.filterwarnings("ignore", module=r"PIL\.")

T = TypeVar("T")

_EXIF_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags
_ICON, _PNG = b"\0\0\1\0", b"\x89PNG"  # how files begin
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
    """An image that cannot or must not be decoded; the message is the reason."""


class Unfit(ImageError):
    """A mask or map that can be decoded and is not what it should be; the message says what it is or has."""


def parse_color(name: str) -> tuple[int, int, int]:
    """A colour name or #rrggbb as 0–255; raises ValueError for anything else."""
    color = ImageColor.getrgb(name)
    if len(color) != 3:
        raise ValueError(f"{name!r} has an alpha channel")
    return color


def open_image(data: bytes, max_pixels: int, background: str = "white") -> Image.Image:
    """Decode an image to what the user sees: upright sRGB, transparent pixels over `background`; the first frame.

    The size is checked before a pixel is decoded. Raises ImageError with the reason when the image has more than
    `max_pixels`, is truncated, or is of a format or mode without a defined meaning.
    """
    behind = (*parse_color(background), 255)

    def visible(image: Image.Image, alpha: Image.Image | None, profile: bytes | None) -> Image.Image:
        colors = to_srgb(_eight_bits(image), profile)
        if alpha is not None:
            colors.putalpha(alpha)
            colors = Image.alpha_composite(Image.new("RGBA", colors.size, behind), colors).convert("RGB")
        colors.info.clear()  # or encoders write the profile that was applied, or a colour that is transparent no more
        return colors

    return _decoded(data, max_pixels, lambda image: visible(*_layers(image, data)))


def open_mask(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a mask to bool `[H, W]`, true where it is white to the eye; `size` (width, height) is the image's.

    White is what is brighter than half-way between its darkest and its brightest pixel, so that 0 and 1, 0 and 255, or
    16 bits mean the same; a mask of one brightness is white or black as a whole. Around white shapes, transparent
    pixels are black; around black ones they are white; where both are drawn they are black.

    Raises ImageError; Unfit for another size, and for transparent pixels among other colours.
    """
    return _beside(data, size, lambda image: _white(*_layers(image, data)[:2]))


def open_indices(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode the numbers that a PNG has of each pixel, upright uint8 `[H, W]`: of grey or of its palette, below 256.

    Raises ImageError; Unfit for other pixels, or when the image's `size` (width, height) is another.
    """

    def numbers(image: Image.Image) -> np.ndarray:
        raw = _raw_mode(image)
        image.load()
        values = np.asarray(_turned(image, _orientation(image)))
        if values.ndim != 2 or values.dtype.kind not in "bui" or int(values.max(initial=0)) > 255:
            raise Unfit(f"has pixels of mode {image.mode}, not 8 bits of grey or palette")
        return (values // _step(raw)).astype(np.uint8)

    return _beside(data, size, numbers, ("PNG",))


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of an image as it is seen, of which only the header is read; raises ImageError."""
    with _opened(data, ANY) as image:
        if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
            return image.size  # as it is seen already; and Pillow would decode the whole PNG to look for EXIF behind it
        return image.size[::-1] if 5 <= _orientation(image) <= 8 else image.size


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scale so that the shorter side has `shorter_side` pixels; never enlarges."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of an image that training sees, in pixels of the image."""

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
    """Cut that is one of the largest parts of an image with this aspect."""
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


def to_pixels(
    image: Image.Image, width: int, height: int, cut: Cut, resize: ResizeFilter = ResizeFilter.lanczos
) -> np.ndarray:
    """A part of an RGB image, scaled to uint8 `[height, width, 3]`.

    It is cut out and scaled in one operation, so an extreme aspect ratio costs no memory.
    """
    box = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.height)
    if resize is ResizeFilter.lanczos:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))  # [H, W, 3]
    else:
        pixels = _bicubic(np.array(image.crop(box)), width, height)
    return np.ascontiguousarray(pixels[:, ::-1] if cut.flipped else pixels)


def _bicubic(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pillow's own bicubic filter, up to rounding, by torch's vector code."""
    import torch
    from torch.nn.functional import interpolate

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = interpolate(image, (height, width), mode="bicubic", antialias=True)[0]
    return scaled.permute(1, 2, 0).numpy()


def to_tensor(pixels: np.ndarray) -> "torch.Tensor":
    """uint8 `[H, W, 3]` → uint8 `[3, H, W]`."""
    import torch  # here, so that the processes that build shards start without it

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def in_range(pixels: "torch.Tensor") -> "torch.Tensor":
    """uint8 `[...]` → float32 in [-1, 1], on its device."""
    return pixels.float() / 127.5 - 1.0


def encode_image(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """RGB image → file contents; `quality` (1–100) counts for jpg and webp.

    Raises ImageError when the format cannot hold the image (webp: at most 16,383 pixels along a side).
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


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The header of an image."""
    try:
        if "ICO" in formats and data.startswith(_ICON):  # which Pillow decodes at once, however large the PNG inside
            largest = IcoFile(io.BytesIO(data)).entry[0]
            if data.startswith(_PNG, largest.offset):
                data, formats = data[largest.offset :], ("PNG",)
        return Image.open(io.BytesIO(data), formats=formats)
    except Exception as error:  # a hostile header makes Pillow's parsers raise nearly anything
        raise ImageError("not a readable image" if data else "empty file") from error


def _decoded(data: bytes, max_pixels: int, convert: Callable[[Image.Image], T], formats: tuple[str, ...] = ANY) -> T:
    """Result of `convert` on an image; raises ImageError, and no other error."""
    image = _opened(data, formats)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than max_pixels={max_pixels}")
    try:
        return convert(image)
    except ImageError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"broken image: {reason}") from error


def _beside(
    data: bytes, size: tuple[int, int], convert: Callable[[Image.Image], np.ndarray], formats: tuple[str, ...] = ANY
) -> np.ndarray:
    """Pixels [H, W] of what belongs to an upright image of this size; raises ImageError."""
    with _opened(data, formats) as image:
        found = image.size
    if sorted(found) == sorted(size):  # before a pixel is decoded
        pixels = _decoded(data, size[0] * size[1], convert, formats)
        found = pixels.shape[1], pixels.shape[0]
        if found == size:
            return pixels
    raise Unfit(f"has {found[0]} x {found[1]} pixels, the image {size[0]} x {size[1]}; make them equal")


def _layers(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None, bytes | None]:
    """Upright colours, alpha (L) where there is one, and the colour profile."""
    raw, profile = _raw_mode(image), image.info.get("icc_profile")
    image.load()  # first: of a TIFF, Pillow itself turns the pixels and forgets the orientation
    orientation, alpha = _orientation(image), None
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in ("LA", "RGBA"):
        image, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    elif image.info.get("transparency") is not None:
        alpha = _color_key(image, raw, data)
    image = _full_range(image)
    return _turned(image, orientation), None if alpha is None else _turned(alpha, orientation), profile


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of a PNG lie in its file, such as "L;4"; to be asked before they are decoded."""
    args = image.tile[0].args if image.format == "PNG" and image.tile else ""  # type: ignore[attr-defined]
    return args if isinstance(args, str) else ""


def _step(raw: str) -> int:
    """Pillow multiplies grey of 2 and 4 bits so that it spans 0–255."""
    return {"L;2": 85, "L;4": 17}.get(raw, 1)


def _color_key(image: Image.Image, raw: str, data: bytes) -> Image.Image:
    """Alpha of an image with one transparent colour, which Pillow has as the file says it: before it changed depth."""
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    key = np.array(image.info["transparency"]) & (65535 if raw.endswith("16B") else 255)  # the file has 16 bits always
    if raw == "RGB;16B":  # of which Pillow keeps the high bytes
        low = _opened(data, ("PNG", "ICO"))
        low.tile = [low.tile[0]._replace(args="RGB;16L")]  # type: ignore[attr-defined]
        pixels = pixels.astype(np.uint16) << 8 | np.asarray(low)
    equal = pixels == key * _step(raw)
    hidden = equal.all(axis=2) if equal.ndim == 3 else equal
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _full_range(image: Image.Image) -> Image.Image:
    """16-bit grey as mode I, 0–65535 from black to white; other modes as they are."""
    if not image.mode.startswith("I"):
        return image
    grey, tags = np.asarray(image).astype(np.int64), getattr(image, "tag_v2", {})  # of a TIFF
    most = 4095 if tags.get(_BITS) in (12, (12,)) else 65535
    if grey.min() < 0 or grey.max() > most:
        raise ImageError(f"32-bit pixels beyond 0 to {most} have no defined range")
    grey = most - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # white is zero
    return Image.fromarray((grey * 65535 // most).astype(np.int32))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no defined range")
    return Image.fromarray(((np.asarray(image) + 128) // 257).astype(np.uint8)) if image.mode == "I" else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the pixels unusable
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    operation = _UPRIGHT.get(orientation)
    return image if operation is None else image.transpose(operation)


def _white(image: Image.Image, alpha: Image.Image | None) -> np.ndarray:
    """White pixels of a mask; see `open_mask`."""
    grey = np.asarray(image if image.mode in ("I", "F") else to_srgb(image, None).convert("L"), dtype=np.float64)
    full = {"I": 65535.0, "F": 1.0}.get(image.mode, 255.0)
    if not np.isfinite(grey).all():
        raise Unfit("has pixels that are NaN or infinite")
    drawn = np.asarray(alpha) >= OPAQUE if alpha is not None else np.ones_like(grey, dtype=bool)
    if drawn.all() or not drawn.any():
        return _brighter(grey, full) & drawn
    shown = grey[drawn]
    if np.minimum(shown, full - shown).mean() > full * CONTRAST:
        raise Unfit("is partly transparent, and neither black nor white where it is not: make it black and white")
    white = _brighter(shown, full)
    if not white.any():
        return ~drawn
    drawn[drawn] = white
    return drawn


def _brighter(grey: np.ndarray, full: float) -> np.ndarray:
    low, high = grey.min(), grey.max()
    if high - low > full * CONTRAST or (low == 0 and len(np.unique(grey)) == 2):
        return grey > (low + high) / 2
    return np.full(grey.shape, np.median(grey) >= full / 2)
