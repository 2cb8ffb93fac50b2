"""Mean and covariance of features for the Fréchet distance: ours against torch-fidelity's way with the same network.

Both go through EfficientNet-Lite0 with batches of the same 64-pixel images, each in a process of its own. Ours keeps
features in files, as the evaluation does, and adds up statistics batch by batch; torch-fidelity keeps all features.
"""

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _compare import Comparison, main
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_input_id_to_statistics
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from models.features import EfficientNetFeatures
from train.evaluation.extractors import efficientnet
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.frechet import statistics_of

IMAGES, BATCH, SIDE, THREADS = 10_000, 64, 64, 2
NAME, LAYER = "efficientnet-lite0", "descriptor"
SPAWN = multiprocessing.get_context("spawn")


class Images(Dataset[Tensor]):
    """Smooth colours, different in each image: uint8 [3, SIDE, SIDE], as torch-fidelity expects them."""

    def __init__(self, count: int) -> None:
        coarse = torch.rand(64, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic").clamp(0, 1)
        self.count, self.base = count, (smooth * 255).to(torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        return self.base[index % len(self.base)].roll(index // len(self.base), dims=2)


class PeerExtractor(FeatureExtractorBase):
    """The same network and preprocessing, as torch-fidelity wants an extractor."""

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        super().__init__(name, features_list)
        self.network = EfficientNetFeatures()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.network.descriptor(pixels.float() / 127.5 - 1),)


def ours() -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """A function from a number of images to their mean and covariance."""
    extractor = efficientnet()

    def statistics(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = Images(count)
        with tempfile.TemporaryDirectory() as folder:
            chunks = FeatureCache(Path(folder), {}, count, BATCH)
            for batch in chunks.missing():
                chunks.write(batch, extractor(torch.stack([images[i] for i in batch]).float() / 127.5 - 1))
            found = statistics_of((column for (column,) in chunks.columns(extractor.name)), extractor.size)
        return found.mean.numpy(), found.covariance.numpy()

    return statistics


def peer() -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """The same by torch-fidelity, nothing cached."""
    register_feature_extractor(NAME, PeerExtractor)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # it asks for four, whatever there is
    options = {"cuda": False, "batch_size": BATCH, "cache": False, "verbose": False}
    extractor = create_feature_extractor(NAME, [LAYER], **options)

    def statistics(count: int) -> tuple[np.ndarray, np.ndarray]:
        found = fid_input_id_to_statistics(1, extractor, LAYER, input1=Images(count), **options)
        return found["mu"], found["sigma"]

    return statistics


@dataclass(frozen=True, slots=True)
class Cost:
    seconds: float
    bytes: float  # by which the process grew at most


def measure(make: Callable[[], Callable[[int], Any]]) -> Cost:
    """In a process of its own, after a warm-up."""
    multiprocessing.set_start_method("fork", force=True)  # of torch-fidelity's loaders, as it is in a plain command
    torch.set_num_threads(THREADS)
    statistics = make()
    statistics(2 * BATCH)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    before, started = memory("VmRSS"), time.perf_counter()
    statistics(IMAGES)
    return Cost(time.perf_counter() - started, memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes of this process, from the kernel."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def comparisons() -> Iterator[Comparison]:
    """Seconds, and the growth in bytes of the same runs."""
    for mine, theirs in zip(ours()(2 * BATCH), peer()(2 * BATCH), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    latest: dict[str, Cost] = {}

    def run(side: Callable[[], Any]) -> float:
        with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
            latest[side.__name__] = pool.submit(measure, side).result()
        return latest[side.__name__].seconds

    name = f"statistics_of_{IMAGES}_images"
    yield Comparison(
        name=name, ours=partial(run, ours), peer=partial(run, peer), unit="s", bar=1.0, lower_is_better=True, pairs=3
    )
    yield Comparison(
        name=f"{name}_memory",
        ours=lambda: latest["ours"].bytes,
        peer=lambda: latest["peer"].bytes,
        unit="bytes",
        bar=1.0,
        lower_is_better=True,
        pairs=1,
    )


if __name__ == "__main__":
    main(comparisons())
