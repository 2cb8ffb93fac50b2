"""From features to metrics: Fréchet and kernel distance, Inception Score, precision, recall, CLIP score, intervals."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from train.engine.metric_log import say
from train.evaluation.extractors import LOGITS, Extractor
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.frechet import covariance_root, frechet_distance, sample_size_floor, statistics_of
from train.evaluation.reference import Reference

# -------------------- of feature vectors ------------------------------------------------------------------------------

FIDELITY_SEED = 2020  # of torch-fidelity's random draws
BLOCK = 1024  # feature vectors that are handled together: bounds the memory


def kernel_distance(
    generated: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel distance (KID on Inception's features) and its standard deviation over random subsets.

    Bińkowski et al. 2018 (arXiv:1801.01401): the unbiased MMD^2 of section 4 with k(x, y) = (x.y / D + 1)^3, so that
    it may be a little below 0. Of fewer vectors than `subset_size` the subsets are as large as the smaller set.

    Raises:
        UserError: fewer than two vectors on a side, or one that is not finite.
    """
    fewest = _checked("a kernel distance", 2, generated, reference)
    size, random = min(subset_size, fewest), np.random.RandomState(FIDELITY_SEED)
    distances = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(random.choice(len(features), size, replace=False))].double()
            for features in (generated, reference)
        )
        within = sum(float(k.sum() - k.diagonal().sum()) for k in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        distances.append(within / (size * (size - 1)) - 2 * float(_cubic_kernel(x, y).mean()))
    return float(np.mean(distances)), float(np.std(distances))


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3  # [B1, B2]


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception Score of class logits [N, C] and its standard deviation over the splits.

    Salimans et al. 2016 (arXiv:1606.03498), section 4: exp of the mean over x of KL(p(y|x) || p(y)).

    Raises:
        UserError: fewer images than splits, or a logit that is not finite.
    """
    count = _checked(f"an Inception Score of {splits} splits", splits, logits)
    order = torch.from_numpy(np.random.RandomState(FIDELITY_SEED).permutation(count))
    scores = []
    for split in range(splits):
        chosen = order[split * count // splits : (split + 1) * count // splits]
        log_p = logits[chosen].double().log_softmax(dim=1)  # [B, C]
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(chosen))  # [C]
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated vectors on the reference's manifold, and of reference vectors on the generated one's.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991), eqs. 1 and 2: the manifold of a set is the union of the balls around
    its vectors that reach to the `neighbours`-th nearest other one. Holds BLOCK x BLOCK distances at a time.

    Raises:
        UserError: a set has no vector with so many neighbours, or one that is not finite.
    """
    _checked(f"precision and recall with {neighbours} neighbours", neighbours + 1, generated, reference)
    return _covered(generated, reference, neighbours), _covered(reference, generated, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points within a ball of the manifold's."""
    reach = torch.cat([_reach(x, manifold, neighbours) for x in manifold.split(BLOCK)])  # [N2]
    inside = 0
    for x in points.split(BLOCK):
        balls = zip(manifold.split(BLOCK), reach.split(BLOCK), strict=True)
        hits = [(_squared_distances(x, y) <= radius + _rounding(x, y)).any(dim=1) for y, radius in balls]
        inside += int(torch.stack(hits).any(dim=0).sum())
    return inside / len(points)


def _reach(x: Tensor, manifold: Tensor, neighbours: int) -> Tensor:
    """Squared distances [B] of vectors of the manifold to their `neighbours`-th nearest; the nearest is each itself."""
    nearest = torch.empty(len(x), 0).to(x.device, torch.float64)
    for y in manifold.split(BLOCK):
        nearest = torch.cat([nearest, _squared_distances(x, y)], dim=1)
        nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), largest=False).values  # sorted, [B, neighbours+1]
    return nearest[:, -1]


def nearest_share(generated: Tensor, reference: Tensor, others: Tensor) -> float:
    """Share of generated vectors whose nearest one is of the reference and not of the others.

    Raises:
        UserError: an empty set, or a vector that is not finite.
    """
    _checked("the nearest image", 1, generated, reference, others)
    to_reference, to_others = (
        torch.cat([_squared_distances(x, manifold).amin(dim=1) for x in generated.split(BLOCK)])  # [N]
        for manifold in (reference, others)
    )
    return (to_reference < to_others).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y  [B1, B2], in float64."""
    return (_squared_lengths(x, y) - 2 * x.double() @ y.double().T).clamp_min(0)


def _squared_lengths(x: Tensor, y: Tensor) -> Tensor:
    return x.double().square().sum(dim=1)[:, None] + y.double().square().sum(dim=1)  # [B1, B2]


def _rounding(x: Tensor, y: Tensor) -> Tensor:
    """The most that rounding adds to squared distances: what is equal but for that counts as equal."""
    return _squared_lengths(x, y) * (x.shape[1] * torch.finfo(torch.float64).eps)


def clip_score(image_embeddings: Tensor, text_embeddings: Tensor) -> float:
    """Mean of max(cos, 0) over pairs of embeddings [N, D] of images and their prompts: from 0 to 1.

    Hessel et al. 2021 (arXiv:2104.08718), eq. 1 with w = 1, the scale of MLPerf's target 0.15; the paper has w = 2.5
    and torchmetrics 100.

    Raises:
        UserError: no pair, or an embedding that is not finite.
    """
    _checked("a CLIP score", 1, image_embeddings, text_embeddings)
    cosines = F.cosine_similarity(image_embeddings.double(), text_embeddings.double(), dim=1)  # [N]
    return cosines.clamp_min(0).mean().item()


def frechet_interval(
    features: Tensor,
    reference_mean: Tensor,
    reference_root: Tensor,
    replicates: int = 50,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the Fréchet distance of generated features [N, D] to a fixed reference, by resampling.

    A replicate is the distance of a random half of the features: a mean over N/2 of N without replacement varies as
    much as one over N of endlessly many (McCarthy 1969, half-samples). Draws with replacement (Efron 1979) repeat
    vectors, and with N < D the interval becomes twice as wide as it should be. Fewer vectors lie further away, so the
    interval is the distance of all plus the replicates' quantiles minus their mean: how far other seeds would have
    moved it at this N. What a small N adds to the distance itself (`sample_size_floor`) is no part of it.

    Args:
        features: generated features [N, D].
        reference_mean: [D].
        reference_root: `covariance_root` of the reference's covariance, [D, r].
        replicates: each costs one symmetric eigenproblem of min(N/2, r) rows.
        level: share of the replicates within the interval.
        seed: of the halves.

    Raises:
        UserError: fewer than four vectors, or one that is not finite.
    """
    count = _checked("the interval of a Fréchet distance", 4, features)
    mean, root = (tensor.to(features.device, torch.float64) for tensor in (reference_mean, reference_root))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.ones(1 + replicates, count, dtype=torch.bool)  # first all of them
    for row in chosen[1:]:
        row[torch.randperm(count, generator=generator)[count // 2 :]] = False
    weights = (chosen / chosen.sum(dim=1, keepdim=True, dtype=torch.float64)).to(mean)
    projected, lengths, shifts = [], [], mean.new_zeros(len(chosen), len(mean))  # shifts: mu1 - mu2
    for block, weight in zip(features.split(BLOCK), weights.split(BLOCK, dim=1), strict=True):
        x = block.double() - mean
        projected.append(x @ root)  # [BLOCK, r]
        lengths.append(x.square().sum(dim=1))
        shifts += weight @ x
    variances = weights @ torch.cat(lengths) - shifts.square().sum(dim=1)  # tr S1, divided by N instead of N - 1
    distances = []
    for drawn, shift, variance in zip(chosen.to(mean.device), shifts, variances, strict=True):
        size = int(drawn.sum())
        trace = variance * size / (size - 1) + root.square().sum()  # tr S1 + tr S2
        distances.append(float(shift @ shift + trace - 2 * _overlap(projected, drawn, shift @ root)))
    value, *halves = distances
    low, high = np.quantile(halves, [(1 - level) / 2, (1 + level) / 2], method="weibull") - np.mean(halves)
    return max(value + float(low), 0.0), max(value + float(high), 0.0)


def _overlap(projected: list[Tensor], drawn: Tensor, mean: Tensor) -> Tensor:
    """tr (S1 S2)^(1/2), the sum of the roots of the eigenvalues of A2^T S1 A2.

    Of the vectors times A2, in blocks [BLOCK, r], those that are `drawn` [N] count; `mean` [r] is theirs. Few vectors
    have the same eigenvalues in their products X X^T, a smaller problem than X^T X.
    """
    size = int(drawn.sum())
    rows = (x[chosen] - mean for x, chosen in zip(projected, drawn.split(BLOCK), strict=True))
    if size > len(mean):
        products = sum((x.T @ x for x in rows), mean.new_zeros(()))
    else:
        x = torch.cat(list(rows))
        products = x @ x.T
    return (torch.linalg.eigvalsh(products) / (size - 1)).clamp_min(0).sqrt().sum()


def _checked(metric: str, fewest: int, *sets: Tensor) -> int:
    """The smaller number of vectors; raises UserError if it is below `fewest`, or if a vector is not finite."""
    count = min(map(len, sets))
    if count < fewest:
        raise UserError(f"{metric} needs at least {fewest} images on each side, not {count}: raise samples")
    if not all(torch.isfinite(features).all() for features in sets):
        raise UserError("features of an image are not finite: the images contain NaN or infinity")
    return count


# -------------------- of generated images against real ones -----------------------------------------------------------

KERNEL_FEATURES = 50_000  # images of each set, at even distances, that the kernel distance draws its subsets from
MANIFOLD_FEATURES = 10_000  # likewise that span the manifolds of precision and recall
NEIGHBOURS = 3


def distances(extractor: Extractor, images: FeatureCache, reference: Reference, replicates: int) -> dict[str, float]:
    """The Fréchet distance with its interval and floor; where features of real images are there, the other metrics.

    `NAME_low` and `NAME_high` enclose 95 % of what other images of the same model would give (`replicates` of the
    bootstrap, 0: none), `NAME_floor` is the part of the value that the number of images alone explains.
    """
    name = extractor.metric
    statistics = statistics_of((features for (features,) in images.columns(extractor.name)), extractor.size)
    result = {name: frechet_distance(statistics, reference)}
    if replicates > 0:
        features = images.whole(extractor.name)
        low, high = frechet_interval(features, reference.mean, covariance_root(reference.covariance), replicates)
        result |= {f"{name}_low": low, f"{name}_high": high}
    if reference.count is not None:
        result[f"{name}_floor"] = sample_size_floor(reference, reference.count, statistics.count)
        warn_of_bias(extractor, result, min(statistics.count, reference.count))
    return result | from_features(extractor, images, reference)


def from_features(extractor: Extractor, images: FeatureCache, reference: Reference) -> dict[str, float]:
    """Inception Score, kernel distance, precision and recall, and whose images are the nearest."""
    result: dict[str, float] = {}
    logits = [column for (column,) in images.columns(LOGITS)] if extractor.metric == "fid" else []
    if logits:
        result["inception_score"], result["inception_score_std"] = inception_score(torch.cat(logits))
    if reference.features is None:
        return result
    kernel = "kid" if extractor.metric == "fid" else extractor.named("kd")
    mine, theirs = (part.whole(extractor.name, KERNEL_FEATURES) for part in (images, reference.features))
    result[kernel], result[f"{kernel}_std"] = kernel_distance(mine, theirs)
    mine, theirs = (part.whole(extractor.name, MANIFOLD_FEATURES) for part in (images, reference.features))
    precision, recall = precision_recall(mine, theirs, NEIGHBOURS)
    result |= {extractor.named("precision"): precision, extractor.named("recall"): recall}
    if reference.others is not None and reference.others.features is not None:
        others = reference.others.features.whole(extractor.name, MANIFOLD_FEATURES)
        result[extractor.named("nearest")] = nearest_share(mine, theirs, others)
    return result


def warn_of_bias(extractor: Extractor, result: dict[str, float], fewest: int) -> None:
    """Say how much of a distance is bias, where fewer images than features make it large."""
    name = extractor.metric
    if fewest < extractor.size:
        say(
            "evaluation",
            f"{name}={result[name]:.1f} rests on {fewest} images for {extractor.size} features: perfect images "
            f"would score about {result[f'{name}_floor']:.1f}; compare it only with equal sample sizes",
        )
