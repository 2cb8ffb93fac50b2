"""Fréchet distance between two sets of features.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6: both sets' features are taken as Gaussians, and
FD = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from conf.errors import UserError

ROWS = 1024  # vectors added at a time
LARGE = 100_000  # vectors whose own part in the bias is not worth the minutes that drawing them takes


class Gaussian(Protocol):
    """All that the distance knows of a set of features."""

    @property
    def mean(self) -> Tensor:
        """[D] float64."""

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64."""


class FeatureStatistics:
    """Mean and covariance of feature vectors, added in batches, in float64 on the CPU.

    Squares are summed around the running mean (Chan et al. 1983, eq. 2.1): features far from zero lose no digits.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)  # [D]
        self.scatter = torch.zeros(size, size, dtype=torch.float64)  # [D, D], sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Add a batch of features [B, D]; B = 0 adds nothing.

        Raises:
            UserError: a feature is not a finite number.
        """
        x = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise UserError("features of an image are not finite: the images contain NaN or infinity")
        if not len(x):
            return
        total, mean = self.count + len(x), x.mean(dim=0)
        centred, delta = x - mean, mean - self.mean  # [B, D], [D]
        self.scatter.addmm_(centred.T, centred).addr_(delta, delta, alpha=self.count * len(x) / total)  # in place
        self.mean += delta * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D].

        Raises:
            UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images on each side, not {self.count}: raise samples")
        return self.scatter / (self.count - 1)


def statistics_of(batches: Iterable[Tensor], size: int) -> FeatureStatistics:
    """Statistics over batches of features [B, size], of which some are put together: each costs size^2 additions."""
    statistics, waiting = FeatureStatistics(size), list[Tensor]()
    for features in batches:
        waiting.append(features)
        if sum(map(len, waiting)) >= ROWS:
            statistics.update(torch.cat(waiting))
            waiting.clear()
    if waiting:
        statistics.update(torch.cat(waiting))
    return statistics


def covariance_root(covariance: Tensor) -> Tensor:
    """A [D, r] with A A^T the covariance [D, D] and r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(covariance.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Fréchet distance of the two Gaussians; 0 or more.

    With S = A A^T the trace of (S1 S2)^(1/2) is the sum of the singular values of A1^T A2. That needs no root of a
    product that is not symmetric, and stays exact where a covariance is singular: with fewer images than features.
    """
    roots = [covariance_root(one.covariance) for one in (first, second)]  # A  [D, rank]
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()  # tr (S1 S2)^(1/2)
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(float((first.mean - second.mean).square().sum() + spread), 0.0)


def sample_size_floor(reference: Gaussian, reference_count: int, count: int, seed: int = 0) -> float:
    """About the distance that `count` perfect images would have from this reference: the bias of small samples.

    Two sets of `count` and `reference_count` vectors are drawn from the reference's own Gaussian and compared.
    """
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * values.clamp_min(0).sqrt()).T  # [D, D], root^T root = S
    generator = torch.Generator().manual_seed(seed)

    def drawn(total: int) -> FeatureStatistics:
        rows = (min(ROWS, total - start) for start in range(0, total, ROWS))
        normal = (torch.randn(n, len(values), generator=generator, dtype=torch.float64) for n in rows)
        return statistics_of((x @ root for x in normal), len(values))

    return frechet_distance(drawn(count), drawn(reference_count) if reference_count < LARGE else reference)
