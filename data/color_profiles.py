"""Colour profiles: the colours of a file as a screen shows them, in sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MODES = {
    "RGB": "RGB",
    "GRAY": "L",
    "CMYK": "CMYK",
    "Lab": "LAB",
}  # space of a profile → mode of its pixels
UNSEEN = 2  # of 255: a profile that changes no colour by more is sRGB itself, and leaves the pixels as they are


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Pixels without alpha (L, RGB, CMYK, LAB …) as RGB; a profile that is broken or not of such pixels is ignored."""
    if profile is None and image.mode == "LAB":
        profile = _lab()
    if profile is not None and (mode := _mode_of(profile)):
        fits = image.mode == mode or (mode in ("L", "RGB") and image.mode in ("1", "L"))
        if fits and (transform := _transform(profile, mode)) is not None:
            return ImageCms.applyTransform(image.convert(mode), transform) or image
    return image.convert("RGB")


@lru_cache(maxsize=64)
def _mode_of(profile: bytes) -> str | None:
    """Mode of the pixels that a profile is of; None where it cannot be read."""
    try:
        return MODES.get(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip())
    except Exception:  # whatever a damaged profile makes of it
        return None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None where nobody would see it, or where the profile is of another kind than those of devices."""
    try:
        source, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, screen, mode, "RGB")
        if mode in ("CMYK", "LAB"):
            return transform
        samples = _samples(mode)
        after = ImageCms.applyTransform(samples, transform)
    except Exception:  # as above
        return None
    change = np.asarray(after, dtype=int) - np.asarray(samples.convert("RGB"), dtype=int)
    return transform if np.abs(change).max() > UNSEEN else None


def _samples(mode: str) -> Image.Image:
    """Colours all over the space, as an image."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))


@lru_cache(maxsize=1)
def _lab() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
