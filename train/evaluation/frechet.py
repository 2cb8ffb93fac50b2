"""Fréchet distance between two sets of pictures: `fid` on Inception-V3, `fd_efficientnet` on EfficientNet-Lite0.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6: both sets' features are taken as Gaussians, and
FD = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Only Inception's is called FID.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError
from models.features import DESCRIPTOR_SIZE, EfficientNetFeatures, weights_sha256

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A frozen network that turns pictures into feature vectors, and what must be known to compare its numbers."""

    metric: str  # name of the distance on these features: fid, fd_efficientnet
    size: int  # features per picture
    weights_sha256: str
    resize: str  # what happens to a picture before it enters the network
    network: Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] to [B, size]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, size] of images [B, 3, H, W] in [-1, 1], rounded to 8 bits first as a saved picture is."""
        return self.network(((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def efficientnet(device: torch.device | str = "cpu") -> Extractor:
    """976 features of EfficientNet-Lite0; needs no download.

    Raises:
        UserError: its packages are not installed.
    """
    features = EfficientNetFeatures().to(device)
    return Extractor(
        metric="fd_efficientnet",
        size=DESCRIPTOR_SIZE,
        weights_sha256=weights_sha256(),
        resize="bilinear to 128 pixels, larger pictures to 224",
        network=lambda pixels: features.descriptor(pixels.to(device).float() / 127.5 - 1),
    )


def inception(weights: str | None, device: torch.device | str = "cpu") -> Extractor:
    """The 2,048 pooled features of torch-fidelity's Inception-V3, those of the FID; nothing is downloaded.

    Args:
        weights: path of `weights-inception-2015-12-05-6726825d.pth`.
        device: where to compute.

    Raises:
        UserError: the file is missing or another one.
    """
    if weights is None or not Path(weights).is_file():
        where = f"there is no file '{weights}'" if weights else "no file is given"
        raise UserError(
            f"the FID needs Inception's weights, but {where}: set inception=PATH to {INCEPTION_FILE} "
            "(of torch-fidelity's releases), or leave inception unset for fd_efficientnet alone"
        )
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    if not digest.startswith(Path(INCEPTION_FILE).stem.rsplit("-", 1)[1]):
        raise UserError(f"inception='{weights}' is not {INCEPTION_FILE} (its SHA-256 begins with {digest[:8]})")
    try:  # torch-fidelity unpickles without restriction: first make sure that the file holds tensors alone
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise UserError(f"inception='{weights}' is damaged ({type(error).__name__}): replace it") from error
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    network = network.to(device)
    return Extractor(
        metric="fid",
        size=2048,
        weights_sha256=digest,
        resize="bilinear to 299 pixels as TensorFlow 1 does",
        network=lambda pixels: network(pixels.to(device))[0],
    )


class FeatureStatistics:
    """Mean and covariance of feature vectors, added in batches and merged over ranks, in float64 on the CPU.

    Squares are summed around the running mean (Chan et al. 1983, eq. 2.1): features far from zero lose no digits.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)  # [D]
        self.scatter = torch.zeros(size, size, dtype=torch.float64)  # [D, D], sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Add a batch of features [B, D]; B = 0 adds nothing.

        Raises:
            ValueError: a feature is not a finite number.
        """
        x = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise ValueError("features of a picture are not finite: the pictures contain NaN or infinity")
        if len(x):
            mean = x.mean(dim=0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the vectors that another one has seen, as if they had been given to `update`."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean  # [D]
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D].

        Raises:
            UserError: fewer than two pictures.
        """
        if self.count < 2:
            raise UserError(
                f"a Fréchet distance needs at least 2 pictures on each side, not {self.count}: raise samples"
            )
        return self.scatter / (self.count - 1)


def collect(extractor: Extractor, batches: Iterable[Tensor]) -> FeatureStatistics:
    """Statistics over batches of images [B, 3, H, W] in [-1, 1]."""
    statistics = FeatureStatistics(extractor.size)
    for images in batches:
        statistics.update(extractor(images))
    return statistics


def merged(shards: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all ranks as one, in their order; there must be at least one."""
    first, *others = shards
    total = FeatureStatistics(len(first.mean))
    for shard in (first, *others):
        total.merge(shard)
    return total


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance of the two Gaussians; 0 or more.

    With S = A A^T the trace of (S1 S2)^(1/2) is the sum of the singular values of A1^T A2. That needs no root of a
    product that is not symmetric, and stays exact where a covariance is singular: with fewer pictures than features.
    """
    roots = []
    for covariance in (first.covariance, second.covariance):
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        roots.append(vectors[:, kept] * values[kept].sqrt())  # A  [D, rank]
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()  # tr (S1 S2)^(1/2)
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(float((first.mean - second.mean).square().sum() + spread), 0.0)


def sample_size_floor(reference: FeatureStatistics, count: int, seed: int = 0) -> float:
    """About the distance that `count` perfect pictures would have from this reference: the bias of small samples.

    Two sets of `count` and `reference.count` vectors are drawn from the reference's own Gaussian and compared.
    """
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * values.clamp_min(0).sqrt()).T  # [D, D], root^T root = S
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for size in (count, reference.count):
        statistics = FeatureStatistics(len(values))
        for start in range(0, size, 4096):
            rows = min(4096, size - start)
            statistics.update(torch.randn(rows, len(values), generator=generator, dtype=torch.float64) @ root)
        drawn.append(statistics)
    return frechet_distance(*drawn)


def compare(extractor: Extractor, generated: FeatureStatistics, reference: FeatureStatistics) -> dict[str, float]:
    """The distance under its metric's name, and `NAME_floor`, the part of it that the sample sizes alone explain.

    Warns:
        UserWarning: fewer pictures than features, so the floor is a large part of the value.
    """
    name = extractor.metric
    result = {
        name: frechet_distance(generated, reference),
        f"{name}_floor": sample_size_floor(reference, generated.count),
    }
    fewest = min(generated.count, reference.count)
    if fewest < extractor.size:
        warnings.warn(
            f"{name}={result[name]:.1f} rests on {fewest} pictures for {extractor.size} features: perfect pictures "
            f"would score about {result[f'{name}_floor']:.1f}; compare it only with equal sample sizes",
            stacklevel=2,
        )
    return result
