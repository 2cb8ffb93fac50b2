"""Frozen networks that turn images into features: Inception-V3, EfficientNet-Lite0, CLIP.

A Fréchet distance is called FID on Inception's features alone; on others it bears their name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError
from conf.files import sha256
from models.features import DESCRIPTOR_SIZE, EfficientNetFeatures, weights_sha256

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION, LOGITS = "inception", "inception_logits"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network, and what must be known to compare its numbers."""

    name: str  # inception, efficientnet, clip: of its column of features
    size: int  # features per image
    weights_sha256: str
    resize: str  # what happens to an image before it enters the network
    network: Callable[[Tensor], dict[str, Tensor]]  # uint8 [B, 3, H, W] to columns, [B, size] under its name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Columns of images [B, 3, H, W] in [-1, 1], rounded to 8 bits first as a saved image is; on the CPU."""
        pixels = (images.float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return {name: column.float().cpu() for name, column in self.network(pixels).items()}

    @property
    def metric(self) -> str:
        """Name of the Fréchet distance on these features."""
        return "fid" if self.name == INCEPTION else f"fd_{self.name}"

    def named(self, metric: str) -> str:
        """Name of another metric on these features: its own on Inception's, else with the network's."""
        return metric if self.name == INCEPTION else f"{metric}_{self.name}"

    def facts(self) -> dict[str, str]:
        """What a protocol says of this network."""
        return {"sha256": self.weights_sha256, "resize": self.resize}


def efficientnet(device: torch.device | str = "cpu") -> Extractor:
    """976 features of EfficientNet-Lite0; needs no download.

    Raises:
        UserError: its packages are not installed.
    """
    features = EfficientNetFeatures().to(device)
    return Extractor(
        name="efficientnet",
        size=DESCRIPTOR_SIZE,
        weights_sha256=weights_sha256(),
        resize="bilinear to 128 pixels, larger pictures to 224",
        network=lambda pixels: {"efficientnet": features.descriptor(pixels.to(device).float() / 127.5 - 1)},
    )


def inception(weights: str, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's Inception-V3: 2,048 pooled features for the FID, and logits for the Inception Score.

    Nothing is downloaded.

    Args:
        weights: path of `weights-inception-2015-12-05-6726825d.pth`.
        device: where to compute.

    Raises:
        UserError: the file is missing or another one.
    """
    if not Path(weights).is_file():
        raise UserError(
            f"inception={weights}: no such file; put {INCEPTION_FILE} (from torch-fidelity's releases on GitHub) "
            "there, or leave inception unset for fd_efficientnet alone"
        )
    digest = sha256(Path(weights))
    if not digest.startswith(Path(INCEPTION_FILE).stem.rsplit("-", 1)[1]):
        raise UserError(f"inception={weights}: is not {INCEPTION_FILE} (its SHA-256 begins with {digest[:8]})")
    try:  # torch-fidelity unpickles without restriction: first make sure that the file holds tensors alone
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise UserError(f"inception={weights}: is damaged ({type(error).__name__}); replace it") from error
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    outputs = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=weights)
    network = network.to(device)
    return Extractor(
        name=INCEPTION,
        size=2048,
        weights_sha256=digest,
        resize="bilinear to 299 pixels as TensorFlow 1 does",
        network=lambda pixels: dict(zip((INCEPTION, LOGITS), network(pixels.to(device)), strict=True)),
    )
