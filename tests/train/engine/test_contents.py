"""A copy of a checkpoint's content: what fails on one process neither ends nor shifts the others' exchange."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from train.engine import contents
from train.engine.backend.layout import Members, whole
from train.engine.contents import Contents, TensorFile


@pytest.fixture
def two() -> Contents:
    weights = {"a": torch.arange(6.0), "b": torch.ones(3, 2)}
    layout = whole(weights, torch.device("cpu"), Members())
    return Contents({name: TensorFile(layout, list(weights.values()), {}) for name in ("first", "second")}, {})


def test_a_copy_has_the_bytes_of_the_file_and_not_of_later(two: Contents) -> None:
    (before,) = [content.clone() for _, content in two.files["first"].made()]
    copy = two.held({})
    file = two.files["first"]
    assert isinstance(file, TensorFile)
    file.shards[0].zero_()
    ((begin, held),) = copy.files["first"].made()
    assert begin == 0 and torch.equal(held, before)


def test_without_memory_the_exchange_of_all_files_goes_on(two: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    made, empty = list[str](), torch.empty

    def noted(file: TensorFile) -> Iterator[tuple[int, Tensor]]:
        made.append("begun")
        yield from original(file)
        made.append("over")

    def none_left(*size: Any, **options: Any) -> Tensor:
        if "pin_memory" in options:
            raise RuntimeError("can't allocate memory")
        return empty(*size, **options)

    original = TensorFile.made
    monkeypatch.setattr(TensorFile, "made", noted)
    monkeypatch.setattr(contents.torch, "empty", none_left)
    with pytest.raises(RuntimeError, match="can't allocate"):
        two.held({})
    assert made == ["begun", "over"] * 2


def test_what_fails_in_the_exchange_itself_ends_it(two: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file's exchange would be paired with what the others still do for this one."""
    begun = list[TensorFile]()

    def broken(file: TensorFile) -> Iterator[tuple[int, Tensor]]:
        begun.append(file)
        raise RuntimeError("no memory on the device")
        yield

    monkeypatch.setattr(TensorFile, "made", broken)
    with pytest.raises(RuntimeError, match="on the device"):
        two.held({})
    assert len(begun) == 1
