"""Random images, whole and damaged: what comes out is an upright RGB image, or one line that says why not."""

import io
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.images import FORMATS, ImageError, open_image, open_indices, open_mask, size_of

IMAGES = 500
LIMIT = 10_000
MODES = {  # of each format, those that Pillow writes
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "DIB": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "LAB", "I", "F", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "AVIF": ("L", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "ICO": ("RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "PCX": ("1", "L", "P", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
}
PROFILES = [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    b"",
    b"not a profile" * 20,
]


def drawn(random: np.random.Generator, mode: str) -> Image.Image:
    """Noise of a small size, as often as not of extreme values alone."""
    width, height = (int(side) for side in random.integers(9 if mode.startswith("RGB") else 1, 40, 2))
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels = np.where(pixels < 128, 0, 255).astype(np.uint8) if random.random() < 0.3 else pixels
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    if mode == "I":
        return Image.fromarray(pixels.view(np.int32)[..., 0])
    if mode == "F":
        return Image.fromarray(pixels.view(np.int32)[..., 0].view(np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), pixels[..., :3].tobytes())
    image = Image.fromarray(pixels)
    return image.convert("RGB").convert(mode) if mode in ("P", "PA", "CMYK") else image.convert(mode)


def metadata(random: np.random.Generator, mode: str, format: str) -> dict[str, object]:
    """Orientation (also one that there is not), colour profile and transparent colour."""
    options: dict[str, object] = {}
    exif = Image.Exif()
    exif[0x0112] = int(random.integers(0, 12))
    choices = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000")
    if format in choices and random.random() < 0.5:
        options["icc_profile"] = PROFILES[random.integers(len(PROFILES))]
    if format in choices[:5] and random.random() < 0.5:
        options["exif"] = exif if format in choices[3:] or random.random() < 0.7 else b"Exif\0\0" + random.bytes(30)
    if format in ("PNG", "GIF") and random.random() < 0.4 and mode in ("L", "P", "RGB", "I;16"):
        options["transparency"] = (1, 2, 3) if mode == "RGB" else int(random.integers(256))
    if format == "PNG" and mode == "P" and random.random() < 0.5:
        options["bits"] = 8
    return options


def damaged(random: np.random.Generator, data: bytes) -> bytes:
    """Cut off, with other bytes, repeated, or with something else before or behind it."""
    kind, at = random.integers(6), int(random.integers(len(data) + 1))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + random.bytes(int(random.integers(1, 40))) + data[at:]
    if kind == 2:
        return data + random.bytes(30)
    if kind == 3:
        return data[at:] + data[:at]
    content = bytearray(data)
    for _ in range(int(random.integers(1, 12))):
        near = len(content) if kind == 4 else min(len(content), 64)  # as often as not in the header
        content[random.integers(near)] = int(random.integers(256))
    return bytes(content)


def inputs(seed: int) -> Iterator[tuple[str, bytes, bool]]:
    """(what it is, contents, whether it is whole)."""
    random, pairs = np.random.default_rng(seed), [(f, mode) for f, modes in MODES.items() for mode in modes]
    for number in range(IMAGES):
        format, mode = pairs[number % len(pairs)]
        buffer = io.BytesIO()
        options = metadata(random, mode, format) | ({"sizes": [(9, 9)]} if format == "ICO" else {})
        drawn(random, mode).save(buffer, format, **options)
        whole = random.random() < 0.35
        yield f"{format} {mode}", buffer.getvalue() if whole else damaged(random, buffer.getvalue()), whole
    for length in (0, 1, 2, 3, 8, 26, 200):
        yield "bytes", random.bytes(length), False
        yield "zeros", bytes(length), False


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged metadata, as the program ignores them
@pytest.mark.filterwarnings("ignore::Warning:PIL")
@pytest.mark.parametrize("seed", [0, 1])
def test_an_image_comes_out_or_one_line(seed: int) -> None:
    outcomes = Counter[str]()
    for what, data, whole in inputs(seed):
        try:
            image = open_image(data, LIMIT)
        except ImageError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(error), what
            assert not whole or what in ("TIFF I", "TIFF F"), f"{what}: {error}"
        else:
            outcomes["whole" if whole else "damaged, read"] += 1
            assert image.mode == "RGB" and image.info == {} and 0 < image.width * image.height <= LIMIT, what
            if whole:
                assert size_of(data) == image.size, what
        for reader in (open_mask, open_indices):
            try:
                pixels = reader(data, (20, 20))
            except ImageError as error:
                assert "\n" not in str(error) and str(error), what
            else:
                assert pixels.shape == (20, 20), what
    assert outcomes["whole"] > 120 and outcomes["damaged, read"] > 50 and outcomes["refused"] > 100, outcomes


def test_every_format_that_is_read_is_tried() -> None:
    assert set(MODES) == set(FORMATS)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_masks_and_numbers_of_any_whole_image_have_its_size(mode: str) -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        image, buffer = drawn(random, mode), io.BytesIO()
        image.save(buffer, "PNG")
        try:
            assert open_mask(buffer.getvalue(), image.size).shape == image.size[::-1]
        except ImageError as error:  # noise beside transparent pixels
            assert mode in ("LA", "RGBA") and "partly transparent" in str(error)
        try:
            assert open_indices(buffer.getvalue(), image.size).shape == image.size[::-1]
        except ImageError as error:
            assert mode in ("LA", "RGB", "RGBA", "I;16") and "not 8 bits" in str(error)
