"""Distances between images: perceptual losses of the autoencoder, and PSNR and SSIM, of the whole or of a hole.

Images are [B, 3, H, W] in [-1, 1]; every function returns one number per image, [B].
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import Perceptual
from models.features import EfficientNetFeatures
from models.formats.weights import check_names, require_finite
from models.masks import paste_back

VGG_FILE = "vgg16-397923af.pth"


def perceptual_distance(kind: Perceptual, lpips_backbone: str | None = None) -> nn.Module | None:
    """The module behind the option `loss.perceptual`, frozen: (images, references) -> distance [B].

    Args:
        kind: Perceptual.none gives None.
        lpips_backbone: file with torchvision's VGG16 weights; None: torch's hub folder.

    Raises:
        UserError: weights or a package are missing.
    """
    if kind is Perceptual.none:
        return None
    return LpipsDistance(lpips_backbone) if kind is Perceptual.lpips else EfficientNetDistance()


class LpipsDistance(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018, arXiv:1801.03924). Nothing is ever downloaded.

    Raises:
        UserError: the backbone's weights are not there or not readable; says where they belong.
    """

    def __init__(self, backbone: str | None = None) -> None:
        super().__init__()
        path = Path(backbone) if backbone else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
        if not path.is_file():
            raise UserError(
                f"loss.perceptual=lpips needs {VGG_FILE} (torchvision's VGG16 weights) at '{path}': "
                "put it there, or set loss.perceptual=efficientnet, which needs no download"
            )
        weights = _vgg_weights(path)
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision with arguments of an older release
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # lpips names a layer "sliceK.N.weight" where torchvision says "features.N.weight"
        names = {name: f"features.{name.split('.', 1)[1]}" for name in self.network.net.state_dict()}
        check_names(str(path), {names[name]: value for name, value in self.network.net.state_dict().items()}, weights)
        self.network.net.load_state_dict({name: weights[names[name]] for name in names}, strict=True)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "LpipsDistance":
        """Stay in evaluation mode: the heads of LPIPS contain dropout."""
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] of images and references [B, 3, H, W]."""
        return self.network(images, references).flatten(1).mean(dim=1)


def _vgg_weights(path: Path) -> dict[str, Tensor]:
    """The convolutions of torchvision's VGG16; the classifier is left out."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: value for name, value in weights.items() if name.startswith("features.")}
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise UserError(f"'{path}' is not torchvision's {VGG_FILE} ({type(error).__name__}): replace it") from error
    return require_finite(path, found)


class EfficientNetDistance(nn.Module):
    """LPIPS' construction on the early blocks of EfficientNet-Lite0, whose weights need no download.

    At every pixel of a block's output the channels are scaled to unit length; the distance is the squared difference,
    summed over channels and averaged over pixels and blocks (Zhang et al. 2018, eq. 1 with w = 1). Blocks 0, 2 and 4
    see neighbourhoods of 7, 19 and 67 pixels.
    """

    taps = (0, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.features = EfficientNetFeatures(blocks=max(self.taps) + 1)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] of images [B, 3, H, W] to references, which get no gradient; sides are multiples of 8."""
        with torch.no_grad():
            wanted = [F.normalize(x, dim=1, eps=1e-6) for x in self.features(references, self.taps)]
        made = [F.normalize(x, dim=1, eps=1e-6) for x in self.features(images, self.taps)]
        terms = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(made, wanted, strict=True)]  # [B] each
        return torch.stack(terms).mean(dim=0)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB; values outside [-1, 1] are clamped, as a saved image would be."""
    return _decibels(_squared_error(images, references).mean(dim=(1, 2)))


def psnr_inside(images: Tensor, references: Tensor, masks: Tensor) -> Tensor:
    """`psnr` [B] over the pixels of the hole alone; masks bool [B, H, W] are true there, and none is empty."""
    errors = _squared_error(images, references) * masks
    return _decibels(errors.sum(dim=(1, 2)) / masks.sum(dim=(1, 2)))


def distance_inside(distance: nn.Module, images: Tensor, references: Tensor, masks: Tensor) -> Tensor:
    """A perceptual distance [B] of what fills the hole, seen within the reference.

    Divided by the hole's share of the image, so that large and small holes count alike.
    """
    return distance(paste_back(images, references, masks), references) / masks.float().mean(dim=(1, 2))


def _squared_error(images: Tensor, references: Tensor) -> Tensor:
    """Mean over the channels, [B, H, W]."""
    return (images.clamp(-1, 1) - references.clamp(-1, 1)).square().mean(dim=1)


def _decibels(error: Tensor) -> Tensor:
    return 10 * torch.log10(4 / error.clamp_min(1e-10))  # peak = 2; identical images give 106 dB


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity [B] (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean over its inside.

    Raises:
        UserError: a side is shorter than the window.
    """
    if min(images.shape[-2:]) < 11:
        raise UserError(f"images.resolution={min(images.shape[-2:])}: SSIM needs at least 11 pixels")
    x, y = images.clamp(-1, 1).float(), references.clamp(-1, 1).float()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K L)^2 with the range L = 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian filter, one axis after the other, only where the window fits: [B, C, H, W] to [B, C, H-10, W-10]."""
    offsets = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = (window / window.sum()).expand(x.shape[1], 1, 1, 11)
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])
