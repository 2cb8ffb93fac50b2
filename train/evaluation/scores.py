"""From the features of pictures to the metrics that compare them with real ones."""

import torch

from train.engine.journal import say
from train.evaluation.chunks import Chunks
from train.evaluation.extractors import LOGITS, Extractor
from train.evaluation.frechet import covariance_root, frechet_distance, sample_size_floor, statistics_of
from train.evaluation.metrics import frechet_interval, inception_score, kernel_distance, nearest_share, precision_recall
from train.evaluation.reference import Reference

KERNEL_FEATURES = 50_000  # pictures of each set, at even distances, that the kernel distance draws its subsets from
MANIFOLD_FEATURES = 10_000  # likewise that span the manifolds of precision and recall
NEIGHBOURS = 3


def distances(extractor: Extractor, pictures: Chunks, reference: Reference, replicates: int) -> dict[str, float]:
    """The Fréchet distance with its interval and floor; where features of real pictures are there, the other metrics.

    `NAME_low` and `NAME_high` enclose 95 % of what other pictures of the same model would give (`replicates` of the
    bootstrap, 0: none), `NAME_floor` is the part of the value that the number of pictures alone explains.
    """
    name = extractor.metric
    statistics = statistics_of((features for (features,) in pictures.columns(extractor.name)), extractor.size)
    result = {name: frechet_distance(statistics, reference)}
    if replicates > 0:
        features = pictures.whole(extractor.name)
        low, high = frechet_interval(features, reference.mean, covariance_root(reference.covariance), replicates)
        result |= {f"{name}_low": low, f"{name}_high": high}
    if reference.count is not None:
        result[f"{name}_floor"] = sample_size_floor(reference, reference.count, statistics.count)
        warn_of_bias(extractor, result, min(statistics.count, reference.count))
    return result | from_features(extractor, pictures, reference)


def from_features(extractor: Extractor, pictures: Chunks, reference: Reference) -> dict[str, float]:
    """Inception Score, kernel distance, precision and recall, and whose pictures are the nearest."""
    result: dict[str, float] = {}
    logits = [column for (column,) in pictures.columns(LOGITS)] if extractor.metric == "fid" else []
    if logits:
        result["inception_score"], result["inception_score_std"] = inception_score(torch.cat(logits))
    if reference.features is None:
        return result
    kernel = "kid" if extractor.metric == "fid" else extractor.named("kd")
    mine, theirs = (part.whole(extractor.name, KERNEL_FEATURES) for part in (pictures, reference.features))
    result[kernel], result[f"{kernel}_std"] = kernel_distance(mine, theirs)
    mine, theirs = (part.whole(extractor.name, MANIFOLD_FEATURES) for part in (pictures, reference.features))
    precision, recall = precision_recall(mine, theirs, NEIGHBOURS)
    result |= {extractor.named("precision"): precision, extractor.named("recall"): recall}
    if reference.others is not None and reference.others.features is not None:
        others = reference.others.features.whole(extractor.name, MANIFOLD_FEATURES)
        result[extractor.named("nearest")] = nearest_share(mine, theirs, others)
    return result


def warn_of_bias(extractor: Extractor, result: dict[str, float], fewest: int) -> None:
    """Say how much of a distance is bias, where fewer pictures than features make it large."""
    name = extractor.metric
    if fewest < extractor.size:
        say(
            "evaluation",
            f"{name}={result[name]:.1f} rests on {fewest} pictures for {extractor.size} features: perfect pictures "
            f"would score about {result[f'{name}_floor']:.1f}; compare it only with equal sample sizes",
        )
