"""Real images as an extractor sees them: what a distance compares with, measured once and kept.

    statistics_dir/<extractor>/<digest of the facts>/    features of each image (`FeatureCache`), statistics.safetensors

The facts are the images' manifest, their preprocessing and the extractor; other facts mean another folder, so what is
kept can never be of other images. `statistics.safetensors` carries them along when it is copied to another machine.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_path
from conf.schema import ImageConfig
from conf.schema.evaluation import require_enough
from data.image_dataset import ImageDataset
from train.engine.runtime import Runtime
from train.evaluation.extractors import INCEPTION, Extractor
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.frechet import statistics_of

SIZE = 64  # images per chunk
STATISTICS = "statistics.safetensors"
FILES = (".npz", ".safetensors")  # of statistics, each of one extractor


@dataclass(frozen=True, slots=True)
class Reference:
    """Statistics of a set of images, and their features where those are there."""

    mean: Tensor  # [D] float64
    covariance: Tensor  # [D, D] float64
    count: int | None  # images; None: the file does not say
    digest: str  # of the data set's manifest, or of the file
    features: FeatureCache | None = None  # None: of a file
    others: "Reference | None" = None  # further images, which those of a model should be less like


def reference_of(
    source: str, extractor: Extractor, images: ImageConfig, statistics_dir: Path, runtime: Runtime
) -> Reference:
    """Measure a folder of image shards, or take what was measured: here, or in a file of statistics; collective.

    Args:
        source: the folder; or a `statistics.safetensors`; or an .npz with `mu` and `sigma` of Inception's features.

    Raises:
        UserError: too few images, or a file that is damaged or of another extractor or preprocessing.
    """
    if source.endswith(".npz"):
        return from_npz(source, extractor)
    if source.endswith(".safetensors"):
        return from_file(Path(source), extractor, reference_facts("", images, extractor))
    dataset = ImageDataset(source, images, seed=0)
    require_enough(f"reference={source} holds {dataset.samples}", dataset.samples, None)
    facts = reference_facts(dataset.digest, images, extractor)
    cache = FeatureCache(statistics_dir / extractor.name, facts, dataset.samples, SIZE)
    path = cache.folder / STATISTICS

    def measure(numbers: range) -> dict[str, Tensor]:
        return extractor(dataset.batch_at(numbers)["image"])

    cache.fill(measure, runtime, "reference", "measuring real images")
    if runtime.is_main and not path.is_file():
        statistics = statistics_of((features for (features,) in cache.columns(extractor.name)), extractor.size)
        tensors = {"mean": statistics.mean, "covariance": statistics.covariance}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"facts": json.dumps(facts), "count": str(statistics.count)})
    runtime.barrier()
    found = from_file(path, extractor, facts)
    return Reference(found.mean, found.covariance, found.count, dataset.digest, cache)


def reference_facts(digest: str, images: ImageConfig, extractor: Extractor) -> dict[str, Any]:
    """All that the features of real images depend on."""
    facts = {"pictures": digest, "resolution": images.resolution, "crop": "center", "extractor": extractor.facts()}
    return facts | images.other_filter()


def from_file(path: Path, extractor: Extractor, facts: dict[str, Any]) -> Reference:
    """Statistics that this module kept; refused where they are of other facts, of which no images means any."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
        found, count = dict(json.loads(metadata["facts"])), int(metadata["count"])
    except FileNotFoundError:
        raise UserError(f"reference={path}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"reference={path}: is no statistics file of this program ({type(error).__name__}); delete it, or point "
            "reference at a folder of image shards"
        ) from error
    wanted = facts if facts["pictures"] else facts | {"pictures": found["pictures"]}
    for field, value in wanted.items():
        if found.get(field) != value:
            raise UserError(
                f"reference={path}: its {field} is {found.get(field)}, this evaluation's is {value}; make them "
                "equal, or point reference at a folder of image shards"
            )
    return Reference(mean, covariance, count, found["pictures"])


def from_npz(source: str, extractor: Extractor) -> Reference:
    """`mu` and `sigma` of Inception's features as most FID programs keep them; of which images, only the user knows.

    Raises:
        UserError: not such a file, or the extractor is another one.
    """
    if extractor.name != INCEPTION:
        raise UserError(f"reference={source}: holds statistics of Inception's features; set inception=PATH")
    try:
        content = Path(source).read_bytes()
        with np.load(source, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
    except FileNotFoundError:
        raise UserError(f"reference={source}: no such file") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile) as error:  # TypeError: a lone array
        raise UserError(f"reference={source}: is no .npz with mu and sigma ({type(error).__name__})") from error
    if mean.shape != (extractor.size,) or covariance.shape != (extractor.size, extractor.size):
        raise UserError(f"reference={source}: is of {mean.numel()} features, the FID has {extractor.size}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"reference={source}: has numbers that are not finite; make or fetch it again")
    return Reference(mean, covariance, None, hashlib.sha256(content).hexdigest())
