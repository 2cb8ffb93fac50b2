"""Real images: measured once, and never taken for others."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import UserError
from conf.schema import ImageConfig
from data.image_dataset import ImageDataset
from train.engine.runtime import Runtime
from train.evaluation.extractors import Extractor
from train.evaluation.reference import STATISTICS, reference_of

IMAGES = ImageConfig(resolution=32)


class Counting:
    """An extractor of six features that counts the images it saw."""

    def __init__(self, name: str = "toy", sha256: str = "a") -> None:
        self.seen = 0
        self.extractor = Extractor(name=name, size=6, weights_sha256=sha256, resize="none", network=self.features)

    def features(self, pixels: Tensor) -> dict[str, Tensor]:
        self.seen += len(pixels)
        values = pixels.float().flatten(1)
        return {self.extractor.name: torch.stack([*values[:, :3].T, *values[:, -3:].T], dim=1)}


def heldout(scenes: Any) -> str:
    return str(scenes.folder / "shards" / "heldout")


def test_images_are_looked_at_once_until_something_changes(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    counting, source = Counting(), heldout(scenes)
    dataset = ImageDataset(source, IMAGES, 0)
    first = reference_of(source, counting.extractor, IMAGES, tmp_path, runtime)
    again = reference_of(source, counting.extractor, IMAGES, tmp_path, runtime)
    assert counting.seen == dataset.samples == first.count == again.count
    assert (first.digest, again.digest) == (dataset.digest, dataset.digest)
    assert torch.equal(first.covariance, again.covariance)
    images = torch.stack([dataset.at(i)["image"] for i in range(dataset.samples)])
    features = counting.extractor(images)["toy"].double()
    torch.testing.assert_close(first.mean, features.mean(dim=0))
    torch.testing.assert_close(first.covariance, features.T.cov())
    reference_of(source, counting.extractor, ImageConfig(resolution=16), tmp_path, runtime)
    reference_of(source, Counting(sha256="b").extractor, IMAGES, tmp_path, runtime)
    reference_of(f"{scenes.folder}/shards/train", counting.extractor, IMAGES, tmp_path, runtime)
    assert len(list(tmp_path.rglob(STATISTICS))) == 4


def test_statistics_travel_as_a_file_and_are_refused_for_another_preprocessing(
    scenes: Any, runtime: Runtime, tmp_path: Path
) -> None:
    counting = Counting()
    here = reference_of(heldout(scenes), counting.extractor, IMAGES, tmp_path / "kept", runtime)
    (kept,) = tmp_path.rglob(STATISTICS)
    shutil.copyfile(kept, tmp_path / "coco.safetensors")
    source = str(tmp_path / "coco.safetensors")
    there = reference_of(source, counting.extractor, IMAGES, tmp_path, runtime)
    assert torch.equal(there.covariance, here.covariance)
    assert (there.count, there.digest, there.features) == (here.count, here.digest, None)
    with pytest.raises(UserError, match=r"^reference=.*: its resolution is 32, this evaluation's is 64; make"):
        reference_of(source, counting.extractor, ImageConfig(resolution=64), tmp_path, runtime)
    with pytest.raises(UserError, match=r"^reference=.*: its extractor is .*'a'.*'b'"):
        reference_of(source, Counting(sha256="b").extractor, IMAGES, tmp_path, runtime)


def test_mu_and_sigma_of_others_serve_the_fid_alone(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.arange(6.0), sigma=np.eye(6))
    found = reference_of(str(path), Counting("inception").extractor, IMAGES, tmp_path, runtime)
    assert found.mean.tolist() == [0, 1, 2, 3, 4, 5] and torch.equal(found.covariance, torch.eye(6).double())
    assert found.count is None and found.features is None
    with pytest.raises(UserError, match=r"holds statistics of Inception's features; set inception=PATH"):
        reference_of(str(path), Counting().extractor, IMAGES, tmp_path, runtime)
    np.savez(path, mu=np.arange(6.0), sigma=np.full((6, 6), np.nan))
    with pytest.raises(UserError, match=r"has numbers that are not finite"):
        reference_of(str(path), Counting("inception").extractor, IMAGES, tmp_path, runtime)
    with path.open("wb") as file:
        np.save(file, np.eye(6))
    with pytest.raises(UserError, match=r"is no \.npz with mu and sigma \(TypeError\)"):
        reference_of(str(path), Counting("inception").extractor, IMAGES, tmp_path, runtime)
    np.savez(path, mu=np.arange(5.0), sigma=np.eye(5))
    with pytest.raises(UserError, match=r"is of 5 features, the FID has 6"):
        reference_of(str(path), Counting("inception").extractor, IMAGES, tmp_path, runtime)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no zip", r"^reference=.*: is no .npz with mu and sigma"),
        ("a.npz", b"", r"^reference=.*: is no .npz with mu and sigma"),
        ("a.npz", None, r"^reference=.*: no such file"),
        ("a.safetensors", b"broken", r"^reference=.*: is no statistics file of this program"),
        ("a.safetensors", None, r"^reference=.*: no such file"),
    ],
)
def test_broken_or_missing_file_is_one_line(
    runtime: Runtime, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        reference_of(str(tmp_path / name), Counting("inception").extractor, IMAGES, tmp_path, runtime)
    assert "\n" not in str(error.value)


def test_pickle_in_an_npz_is_not_loaded(runtime: Runtime, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.array([{"not": "numbers"}], dtype=object), sigma=np.eye(6))
    with pytest.raises(UserError, match=r"is no \.npz"):
        reference_of(str(tmp_path / "a.npz"), Counting("inception").extractor, IMAGES, tmp_path, runtime)


def test_weights_in_another_safetensors_file_are_no_statistics(runtime: Runtime, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is no statistics file of this program"):
        reference_of(str(tmp_path / "model.safetensors"), Counting().extractor, IMAGES, tmp_path, runtime)
