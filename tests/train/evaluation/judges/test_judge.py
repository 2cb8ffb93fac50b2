"""Judges of boxes and of semantic maps: they find what is there, only there, and are wrong about other images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import ImageConfig
from data.labels import UNLABELLED, Box, Labels
from data.order import rng
from train.engine.runtime import Runtime
from train.evaluation.judges import judge as module
from train.evaluation.judges.boxes import TOUCHED, BoxJudge, crops, empty_box
from train.evaluation.judges.judge import accuracy, cached_judge, train_judge
from train.evaluation.judges.segments import Segmenter, SegmentJudge

CPU = torch.device("cpu")
SHADES = torch.tensor([[0.9, -0.7, -0.7], [-0.7, 0.9, -0.7]])  # of the two classes


class Canvases:
    """32 x 32 pixels, grey, with a red or a green rectangle (classes 0 and 1) in the left or the right half."""

    def __init__(self, samples: int, first: int = 0) -> None:
        self.samples, self.first = samples, first

    def at(self, index: int) -> dict[str, Any]:
        position = self.first + index
        random = rng(0, position, "canvas")
        left, top = int(random.integers(0, 5)) + 16 * (position // 2 % 2), int(random.integers(0, 16))
        width, height = (int(side) for side in random.integers(10, 13, 2))
        image, segments = torch.zeros(3, 32, 32), np.zeros((32, 32), np.uint8)
        window = np.s_[top : top + height, left : left + width]
        image[:, *window] = SHADES[position % 2][:, None, None]
        segments[window] = 1 + position % 2
        image += 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(position))
        box = Box((left / 32, top / 32, (left + width) / 32, (top + height) / 32), position % 2)
        labels = Labels(boxes=(box,), segments=segments)
        return {"image": image, "key": f"{position:09d}", "meta": {"boxes": 1}, "position": position, "labels": labels}


def trained_on(dataset: Any, kind: Any, steps: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "steps", steps)
        patch.setattr(kind, "batch", 16)
        return train_judge(kind, dataset, 0, CPU)


@pytest.fixture(scope="module")
def boxes() -> BoxJudge:
    judge: BoxJudge = trained_on(Canvases(120), BoxJudge, 60)
    return judge


@pytest.fixture(scope="module")
def segments() -> SegmentJudge:
    judge: SegmentJudge = trained_on(Canvases(120), SegmentJudge, 60)
    return judge


def some(count: int = 40) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    items = [Canvases(count, first=1000).at(i) for i in range(count)]
    return torch.stack([item["image"] for item in items]), items


def test_object_is_found_in_its_box_and_nothing_elsewhere(boxes: BoxJudge) -> None:
    found = accuracy(boxes, Canvases(70, first=1000), CPU)  # type: ignore[arg-type]
    assert found.keys() == {"probe/accuracy/box", "probe/accuracy/empty_box"}
    assert min(found.values()) > 0.97


def test_object_of_another_class_or_place_is_not_found(boxes: BoxJudge) -> None:
    images, items = some()
    for other in (1, 2):  # the other class in the same half, the same class in the other half
        assert boxes.scores(boxes.correct(images.roll(other, 0), items))["box"] < 0.1
    blank = boxes.scores(boxes.correct(torch.zeros_like(images), items))
    assert blank["box"] < 0.1 and blank["empty_box"] > 0.9


def test_empty_boxes_hold_no_object() -> None:
    taken = (Box((0.1, 0.1, 0.5, 0.9), 0),)
    drawn = [empty_box(taken, rng(0, i, "test")) for i in range(50)]
    corners = torch.tensor([corners for corners in drawn if corners is not None])
    assert len(corners) > 40 and corners.min() >= 0 and corners.max() <= 1
    common = torch.minimum(corners[:, 2:], torch.tensor([0.5, 0.9])) - corners[:, :2].clamp(min=0.1)
    assert (common.clamp(min=0).prod(1) <= (TOUCHED + 1e-6) * (corners[:, 2:] - corners[:, :2]).prod(1)).all()
    assert empty_box((Box((0.0, 0.0, 1.0, 1.0), 0),), rng(0, 0, "test")) is None


def test_canvas_that_is_full_has_no_empty_box(boxes: BoxJudge) -> None:
    image, item = torch.zeros(1, 3, 32, 32), {"position": 0, "labels": Labels(boxes=(Box((0.0, 0.0, 1.0, 1.0), 0),))}
    columns = boxes.correct(image, [item])
    assert columns["empty_box"].tolist() == [[0, 0]] and columns["box"][0, 1] == 1
    assert boxes.scores(columns).keys() == {"box"}


def test_crop_is_the_box_with_its_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.evaluation.judges.boxes.MARGIN", 0.25)
    image = (
        torch.arange(64 * 64.0).reshape(1, 1, 64, 64).expand(2, 3, 64, 64) + torch.tensor([0, 9e3])[:, None, None, None]
    )
    # 16 to 32 across and 24 to 56 down, a quarter more on each side: 12 to 36 and 16 to 64
    cut = crops(image, torch.tensor([1]), torch.tensor([[0.25, 0.375, 0.5, 0.875]]))
    wanted = F.interpolate(image[1:, :, 16:64, 12:36], size=(32, 32), mode="bilinear", align_corners=False)
    assert (cut - wanted)[..., 1:-1, 1:-1].abs().max() < 0.1  # at the rim the crop sees the neighbour pixels


def test_segments_are_read_on_images_never_seen(segments: SegmentJudge) -> None:
    found = accuracy(segments, Canvases(70, first=1000), CPU)  # type: ignore[arg-type]
    assert found.keys() == {"probe/accuracy/pixel", "probe/accuracy/segment"}
    assert min(found.values()) > 0.97


def test_large_background_hides_nothing_in_the_mean_of_classes(segments: SegmentJudge) -> None:
    images, items = some()
    blank = segments.scores(segments.correct(torch.zeros_like(images), items))
    assert blank["pixel"] > 0.8 and blank["segment"] < 0.4  # one class of three
    other = segments.scores(segments.correct(images.roll(1, 0), items))
    assert other["segment"] < 0.5


def test_pixels_without_a_class_do_not_count_and_unknown_classes_are_wrong(segments: SegmentJudge) -> None:
    images, items = some(2)
    asked = np.zeros((32, 32), np.uint8)
    asked[:8], asked[8:16] = UNLABELLED, 77
    column = segments.correct(torch.zeros_like(images), [item | {"labels": Labels(segments=asked)} for item in items])
    totals = column["pixel"].sum(0)
    assert totals[:, 1].tolist() == [2 * 16 * 32, 0, 0, 2 * 8 * 32] and totals[3, 0] == 0


def test_rare_classes_are_counted_for_the_loss() -> None:
    asked = np.array([[0, 0, 2], [0, UNLABELLED, 2]], np.uint8)
    assert SegmentJudge.facts_of([{"labels": Labels(segments=asked)}] * 2) == [6, 0, 4]


def test_segmenter_takes_any_even_size() -> None:
    network = Segmenter(5).eval()
    assert network(torch.zeros(1, 3, 38, 54)).shape == (1, 5, 38, 54)


def test_samples_without_labels_are_refused_in_one_line() -> None:
    bare = {"key": "7", "meta": {}, "labels": Labels()}
    for kind, message in ((BoxJudge, "has no boxes"), (SegmentJudge, r"has no seg\.png")):
        with pytest.raises(UserError, match=rf"^judges=\[\w+\]: sample '7' {message}") as refused:
            kind.require(bare)
        assert "\n" not in str(refused.value)


def test_judge_is_trained_once_and_read_back_alike(
    scenes: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentJudge, "steps", 2)
    given = SegmentJudge, f"{scenes.folder}/shards/train", ImageConfig(resolution=32), 0, tmp_path, runtime
    first = cached_judge(*given)
    monkeypatch.setattr(module, "train_judge", lambda *_: pytest.fail("was trained again"))
    again = cached_judge(*given)
    assert again.facts == first.facts and not again.training
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
