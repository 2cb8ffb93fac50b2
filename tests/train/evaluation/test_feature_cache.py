"""Measurements in chunks: the same on any number of processes, none counted twice, none lost to a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.engine.runtime import Runtime
from train.evaluation.extractors import Extractor
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.reference import Reference
from train.evaluation.run import metrics_of

TOTAL, SIZE, FEATURES = 100, 7, 12


def features_of(numbers: range) -> dict[str, Tensor]:
    """A pure function of each image's number."""
    rows = [torch.randn(FEATURES, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return {"toy": torch.stack(rows)}


def ranks(runtime: Runtime, world: int) -> list[Runtime]:
    """Processes that see each other's files and, since they run one after the other, agree on what rank 0 saw."""
    facts = {name: getattr(runtime, name) for name in ("local_rank", "device", "precision", "accelerator")}
    first: list[Any] = []

    class One(Runtime):
        def gather_objects(self, value: Any) -> list[Any]:
            if self.rank == 0:
                first.append(value)
            return first[-1:]

        def barrier(self) -> None:
            pass

    return [One(rank=rank, world=world, **facts) for rank in range(world)]


class Toys:
    """A subject whose images are their features."""

    total, prefix, baselines = TOTAL, "", ()
    facts: dict[str, Any] = {}  # noqa: RUF012
    extractors = [  # noqa: RUF012
        Extractor(name="toy", size=FEATURES, weights_sha256="", resize="", network=lambda x: {"toy": x})
    ]

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        return {}


def metrics(root: Path, runtime: Runtime, world: int, reference: Reference) -> dict[str, float]:
    chunks = FeatureCache(root, {}, TOTAL, SIZE)
    for rank in ranks(runtime, world):
        chunks.fill(features_of, rank, "test")
    return metrics_of(Toys(), chunks, {"toy": reference}, replicates=5)  # type: ignore[arg-type]


def test_three_processes_give_the_numbers_of_one(runtime: Runtime, tmp_path: Path) -> None:
    """100 images are not divisible by three processes, nor by the chunk."""
    real = FeatureCache(tmp_path / "real", {}, 90, SIZE)
    real.fill(lambda numbers: features_of(range(numbers.start + 1000, numbers.stop + 1000)), runtime, "test")
    vectors = real.whole("toy").double()
    reference = Reference(vectors.mean(dim=0), vectors.T.cov(), 90, "digest", real)
    one, three = (metrics(tmp_path / str(world), runtime, world, reference) for world in (1, 3))
    assert three == one  # bit for bit
    names = ["fd_toy", "fd_toy_low", "fd_toy_high", "fd_toy_floor", "kd_toy", "kd_toy_std"]
    assert set(one) == {f"eval/{name}" for name in [*names, "precision_toy", "recall_toy"]}
    assert one["eval/fd_toy_low"] < one["eval/fd_toy"] < one["eval/fd_toy_high"]


def test_each_image_is_measured_once_by_one_process(runtime: Runtime, tmp_path: Path) -> None:
    measured: list[list[int]] = []
    chunks = FeatureCache(tmp_path, {}, TOTAL, SIZE)
    for rank in ranks(runtime, 3):
        mine: list[int] = []
        chunks.fill(lambda numbers, mine=mine: mine.extend(numbers) or features_of(numbers), rank, "test")  # type: ignore[misc]
        measured.append(mine)
    assert sorted(number for mine in measured for number in mine) == list(range(TOTAL))
    assert max(map(len, measured)) - min(map(len, measured)) <= SIZE
    assert torch.equal(chunks.whole("toy"), features_of(range(TOTAL))["toy"])


def test_next_start_measures_only_what_is_missing(runtime: Runtime, tmp_path: Path) -> None:
    def until_killed(numbers: range) -> dict[str, Tensor]:
        if numbers.start == 5 * SIZE:
            raise KeyboardInterrupt
        return features_of(numbers)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, {"steps": 4}, TOTAL, SIZE).fill(until_killed, runtime, "test")
    again = FeatureCache(tmp_path, {"steps": 4}, TOTAL, SIZE)
    assert again.fill(features_of, runtime, "test") == TOTAL - 5 * SIZE
    assert torch.equal(again.whole("toy"), features_of(range(TOTAL))["toy"])
    assert FeatureCache(tmp_path, {"steps": 5}, TOTAL, SIZE).missing() == again.ranges  # those are other images
    again.remove()
    assert not tmp_path.exists()


def test_part_of_a_column_is_spread_over_all_images(runtime: Runtime, tmp_path: Path) -> None:
    chunks = FeatureCache(tmp_path, {}, TOTAL, SIZE)
    chunks.fill(lambda numbers: {"number": torch.tensor(numbers)}, runtime, "test")
    assert chunks.whole("number", 4).tolist() == [0, 33, 66, 99]
    assert chunks.whole("number", 1000).tolist() == list(range(TOTAL))


def test_column_of_the_first_chunks_alone(runtime: Runtime, tmp_path: Path) -> None:
    def measure(numbers: range) -> dict[str, Tensor]:
        return features_of(numbers) | ({"image": torch.tensor(numbers)} if numbers.start < 10 else {})

    chunks = FeatureCache(tmp_path, {}, TOTAL, SIZE)
    chunks.fill(measure, runtime, "test")
    assert [column.tolist() for (column,) in chunks.columns("image")] == [list(range(7)), list(range(7, 14))]
