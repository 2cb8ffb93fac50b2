"""Weights of words: which words are weighted, and what counts as doing what the weight says."""

from collections import Counter
from typing import Any

import pytest

from data.building.sources.demo import attributes_of, scene
from train.editing.weighted_words import SORTS, weighable, weights_figure, weights_metrics

SCENES = [attributes_of(scene(3, index).attributes) for index in range(200)]


def test_words_that_are_weighted_stand_once_in_their_prompt() -> None:
    found = weighable(SCENES, 20)
    assert Counter(word.sort for word in found) == dict.fromkeys(SORTS, 20)
    assert len({word.attribute for word in found if word.sort == "part"}) == 4
    assert len({word.attribute for word in found if word.sort == "kind"}) >= 2
    for word in found:
        assert f" {word.prompt} ".count(f" {word.value} ") == 1
        assert not word.others.keys() & {word.attribute, word.sort}
        assert word.edit(2.0).weights == {word.value: 2.0}


def row(sort: str, *odds: float, kept: tuple[bool, ...] = (True,), without: float = 0.0) -> dict[str, Any]:
    return {"sort": sort, "probabilities": list(odds), "probability_without": without, "kept": list(kept)}


def test_a_word_obeys_where_its_probability_never_falls_and_its_absence_shows() -> None:
    rows = [
        row("color", 0.0, 0.1, 0.5, 0.9, 0.95, 0.9401),  # falls by less than 0.01
        row("color", 0.0, 0.1, 0.5, 0.9, 0.95, 0.93, kept=(True, False, False, False)),  # falls
        row("color", 0.8, 0.8, 0.9, 0.9, 0.95, 0.95, without=0.5),  # hardly moves, nor would it without the word
        row("part", 0.3, 0.4, 0.9, 0.79, 0.8, 0.8),  # neither
    ]
    found = weights_metrics(rows)
    expected = {
        "rising": 2 / 3,
        "moving": 2 / 3,
        "can_move": 2 / 3,
        "obeying": 1 / 3,
        "kept": 0.5,
        "at_0": 1 / 3,
        "at_1": 0.9,
    }
    for name, value in expected.items():
        assert found[f"eval/edits/weights/color/{name}"] == pytest.approx(value), name
    assert found["eval/edits/weights/all/obeying"] == 0.25 and found["eval/edits/weights/part/moving"] == 0
    assert weights_metrics([]) == {}
    assert [axes.get_title() for axes in weights_figure(rows).axes] == ["color", "part"]
