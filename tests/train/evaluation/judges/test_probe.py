"""Probes: they read what an image shows, they are measured on images that they never saw, and know their limits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from data.labels import Labels
from train.evaluation.judges.judge import accuracy, soften, train_judge
from train.evaluation.judges.probe import ATTRIBUTES, CaptionProbe, ClassProbe

CPU = torch.device("cpu")
SHADES = {"dark": -0.8, "grey": 0.0, "light": 0.8}
KINDS = ["bar", "dot"]


class Toys:
    """Squares: the kind is a shape, `color` the shade of its left half, `background` that of its right half."""

    def __init__(self, samples: int, first: int = 0) -> None:
        self.samples, self.first = samples, first

    def at(self, index: int) -> dict[str, Any]:
        number = self.first + index
        kind, color, background = KINDS[number % 2], list(SHADES)[number // 2 % 3], list(SHADES)[number // 6 % 3]
        image = torch.empty(3, 16, 16)
        image[:, :, :8], image[:, :, 8:] = SHADES[color], SHADES[background]
        image[:, 6:10, 6:10] = 1.0 if kind == "dot" else image[:, 6:10, 6:10]
        noise = 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(number))
        meta = {"kind": kind, "color": color, "background": background}
        labels = Labels(class_id=10 + KINDS.index(kind))
        return {"image": image + noise, "key": f"{number:09d}", "meta": meta, "labels": labels}


def trained_on(dataset: Any, kind: Any = CaptionProbe, steps: int = 120, seed: int = 0) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "steps", steps)
        return train_judge(kind, dataset, seed, CPU)


@pytest.fixture(scope="module")
def trained() -> CaptionProbe:
    probe: CaptionProbe = trained_on(Toys(180))
    return probe


def test_what_is_easy_to_see_is_read_on_images_never_seen(trained: CaptionProbe) -> None:
    found = accuracy(trained, Toys(90, first=1000), CPU)  # type: ignore[arg-type]
    assert found.keys() == {f"probe/accuracy/{name}" for name in ATTRIBUTES}
    assert min(found.values()) > 0.97


def test_images_of_something_else_are_not_taken_as_right(trained: CaptionProbe) -> None:
    items = [Toys(90).at(i) for i in range(90)]
    images = torch.stack([item["image"] for item in items])
    shifted = [items[(i + 1) % 90] for i in range(90)]  # every kind is then the other one
    assert trained.correct(images, shifted)["kind"].float().mean() < 0.05
    blank = trained.correct(torch.zeros_like(images), items)
    assert blank["background"].float().mean() < 0.5


def test_word_that_training_never_saw_counts_as_wrong(trained: CaptionProbe) -> None:
    item = Toys(1).at(0)
    right = trained.correct(item["image"][None], [item | {"meta": item["meta"] | {"kind": "ring"}}])
    assert not right["kind"].item() and right["color"].item()


def test_accuracy_is_the_share_read_rightly(trained: CaptionProbe) -> None:
    class HalfWrong(Toys):
        def at(self, index: int) -> dict[str, Any]:
            item = super().at(index)
            return item | {"meta": item["meta"] | ({"kind": "ring"} if index % 2 else {})}

    found = accuracy(trained, HalfWrong(90, first=500), CPU)  # type: ignore[arg-type]
    assert found["probe/accuracy/kind"] == pytest.approx(0.5, abs=0.03)
    assert found["probe/accuracy/color"] > 0.97


def test_class_is_read_by_its_number() -> None:
    probe = trained_on(Toys(60), ClassProbe, steps=40)
    assert probe.facts == {"class": [10, 11]}
    items = [Toys(20, first=300).at(i) for i in range(20)]
    images = torch.stack([item["image"] for item in items])
    found = probe.scores(probe.correct(images, items)), probe.scores(probe.correct(images.roll(1, 0), items))
    assert found[0]["class"] > 0.95 and found[1]["class"] < 0.05


def test_data_without_attributes_is_refused_in_one_line() -> None:
    class Plain(Toys):
        def at(self, index: int) -> dict[str, Any]:
            item = super().at(index)
            return item | ({"meta": {}, "labels": Labels()} if index == 7 else {})

    for kind, message in (
        (CaptionProbe, r"^prompt_following=true: sample '000000007' names no kind .*=false$"),
        (ClassProbe, r"^judges=\[classes\]: sample '000000007' has no class_id .*with classes$"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            trained_on(Plain(12), kind)
        assert "\n" not in str(refused.value)


def test_classes_stand_for_the_words_in_order() -> None:
    items = [Toys(18).at(i) for i in range(18)]
    words = CaptionProbe.facts_of(items)
    assert words == {"kind": ["bar", "dot"], "background": sorted(SHADES), "color": sorted(SHADES)}


def test_half_of_a_batch_is_blurred() -> None:
    images: Tensor = torch.zeros(8, 3, 16, 16)
    images[:, :, ::2] = 1.0
    sharp, soft = soften(images, torch.Generator().manual_seed(0)).chunk(2)
    assert (sharp - images[:4]).abs().mean() < 0.06
    assert soft.std() < 0.6 * sharp.std()


def test_probe_is_a_function_of_its_seed() -> None:
    first, same, other = (trained_on(Toys(24), steps=3, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["network.body.0.weight"], other["network.body.0.weight"])
