"""Low-resolution images for super-resolution, and the trivial way back.

Images are [B, 3, H, W] in [-1, 1]; H and W are multiples of the factor. Two ways lead down: bicubic, and a chain of
damages like that of BSRGAN (Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image
Super-Resolution", arXiv:2103.14006) with the bounds that latent diffusion used for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, pi, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZES = ("bilinear", "bicubic", "area")


@dataclass(frozen=True, slots=True)
class Strength:
    """How far the chain may go; what it does to one image is drawn evenly within these bounds."""

    blurs: int  # how often
    blur: float  # share of the paper's largest width
    noise: tuple[int, int]  # standard deviation, in levels of 255
    quality: tuple[int, int]  # of JPEG, 0 to 100


BSR = Strength(blurs=2, blur=1.0, noise=(2, 25), quality=(30, 95))
BSR_LIGHT = Strength(blurs=1, blur=0.25, noise=(1, 2), quality=(80, 95))


def bicubic(low: Tensor, factor: int) -> Tensor:
    """Enlarge [B, 3, h, w] to [B, 3, f·h, f·w]: the baseline of super-resolution (Catmull-Rom, as in Pillow)."""
    return _bicubic(low, (low.shape[2] * factor, low.shape[3] * factor))


def shrink_tensor(images: Tensor, factor: int) -> Tensor:
    """[B, 3, H, W] to [B, 3, H/f, W/f] without aliasing, bicubic."""
    return _bicubic(images, (images.shape[2] // factor, images.shape[3] // factor))


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def degrade(images: Tensor, factor: int, strength: Strength, generators: Sequence[np.random.Generator]) -> Tensor:
    """[B, 3, H, W] to [B, 3, H/f, W/f], each image blurred, shrunk, disturbed and compressed in an order of its own.

    Left out of the paper are a camera's sensor and noise that is correlated between channels.

    Args:
        images: on any device; the work is done on the CPU.
        factor: f.
        strength: BSR, or BSR_LIGHT, which leaves most of the details.
        generators: one per image, from which all its chance is drawn.
    """
    pairs = zip(images.float().cpu().split(1), generators, strict=True)
    return torch.cat([_degraded(image, factor, strength, generator) for image, generator in pairs]).to(images)


def _degraded(x: Tensor, factor: int, strength: Strength, random: np.random.Generator) -> Tensor:
    """One image [1, 3, H, W]: the steps in random order, of which the second to shrink makes the final size."""
    size = (x.shape[2] // factor, x.shape[3] // factor)
    if factor % 2 == 0 and random.random() < 0.25:
        x, factor = _resized(x, (x.shape[2] // 2, x.shape[3] // 2), random), factor // 2
    shrunk = False
    for step in random.permutation(["blur"] * strength.blurs + ["shrink", "shrink", "noise", "jpeg"]):
        match step:
            case "blur":
                x = _blurred(x, factor, strength.blur, random)
            case "shrink" if shrunk:
                x = _resized(x, size, random)
            case "shrink":
                x, shrunk = _shrunk(x, factor, random), True
            case "noise":
                x = _noisy(x, strength.noise, random)
            case "jpeg":
                x = _compressed(x, strength.quality, random)
    return _compressed(x, strength.quality, random)  # as an image from the web would be


def _blurred(x: Tensor, factor: int, share: float, random: np.random.Generator) -> Tensor:
    """A Gaussian, as often isotropic as not; edges are continued."""
    if random.random() < 0.5:
        return _filtered(x, np.eye(2) * random.uniform(0.01, share * (2 + 0.2 * factor)) ** 2)
    angle = random.uniform(0, pi)
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return _filtered(x, axes @ np.diag(random.uniform(0.01, share * (4 + factor), size=2)) @ axes.T)


def _shrunk(x: Tensor, factor: int, random: np.random.Generator) -> Tensor:
    """Three times of four to any size down to half of the final one, else every f-th pixel of a blur."""
    if random.random() < 0.75:
        scale = random.uniform(1, 2 * factor)
        return _resized(x, (ceil(x.shape[2] / scale), ceil(x.shape[3] / scale)), random)
    x = _filtered(x, np.eye(2) * random.uniform(0.1, 0.6 * factor) ** 2, shift=(factor - 1) / 2)
    return x[..., ::factor, ::factor]


def _resized(x: Tensor, size: tuple[int, int], random: np.random.Generator) -> Tensor:
    return F.interpolate(x, size, mode=RESIZES[random.integers(len(RESIZES))]).clamp(-1, 1)


def _filtered(x: Tensor, covariance: np.ndarray, shift: float = 0.0) -> Tensor:
    """Gaussian filter of [1, C, H, W]; covariance [2, 2] in pixels²; its centre lies `shift` pixels right and below."""
    radius = ceil(3 * sqrt(np.linalg.eigvalsh(covariance)[-1]) + shift)
    line = np.arange(-radius, radius + 1) - shift
    offsets = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)  # [k, k, 2]
    exponents = np.einsum("...i,ij,...j", offsets, np.linalg.inv(covariance), offsets)  # [k, k]
    kernel = torch.from_numpy(np.exp(-exponents / 2)).to(x)
    padded = F.pad(x.transpose(0, 1), [radius] * 4, mode="replicate")  # [C, 1, H+2r, W+2r]
    return F.conv2d(padded, (kernel / kernel.sum())[None, None]).transpose(0, 1)


def _noisy(x: Tensor, levels: tuple[int, int], random: np.random.Generator) -> Tensor:
    """Gaussian noise, as often grey as coloured."""
    deviation = random.integers(*levels, endpoint=True) / 127.5
    channels = int(random.choice([1, x.shape[1]]))
    noise = random.standard_normal((1, channels, *x.shape[2:]), dtype=np.float32)
    return (x + deviation * torch.from_numpy(noise)).clamp(-1, 1)


def _compressed(x: Tensor, quality: tuple[int, int], random: np.random.Generator) -> Tensor:
    """Through JPEG and back."""
    pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(random.integers(*quality, endpoint=True)))
    read = np.array(Image.open(file), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(read).permute(2, 0, 1)[None]
