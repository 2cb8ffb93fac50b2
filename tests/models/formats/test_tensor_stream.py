"""Files written tensor by tensor are what safetensors itself reads, and writes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from models.formats.tensor_stream import DTYPES, TensorStream, stream_of, write_stream


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    every = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    odd = {"number": torch.tensor(1.5), "empty": torch.zeros(0, 4), "byte": torch.ones(1, dtype=torch.uint8)}
    strided = {"rows": torch.randn(4, 6).t(), "nhwc": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    return {**every, **odd, **strided, "ünicode": torch.tensor([-0.0, float("nan")])}


def test_reads_as_it_was_and_equals_the_file_of_safetensors(tmp_path: Path) -> None:
    whole = tensors()
    size, digest = write_stream(tmp_path / "ours", stream_of(whole), metadata={"format": "pt"})
    found = load_file(tmp_path / "ours")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0))
    content = (tmp_path / "ours").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    theirs = save({name: tensor.contiguous() for name, tensor in whole.items()}, metadata={"format": "pt"})
    assert len(content) == len(theirs)


def test_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    path, sizes = tmp_path / "file", []

    def made() -> Iterator[Tensor]:
        for value in range(3):
            sizes.append(path.stat().st_size)
            yield torch.full((1000,), float(value))

    specs = {name: torch.empty(1000, device="meta") for name in "abc"}
    write_stream(path, TensorStream(specs, made()))
    assert [size - sizes[0] for size in sizes] == [0, 4000, 8000]
    assert load_file(path)["c"].tolist() == [2.0] * 1000


def test_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    specs = {"a": torch.empty(3, device="meta")}
    for other in (torch.zeros(4), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(ValueError, match="'a' is"):
            write_stream(tmp_path / "file", TensorStream(specs, iter([other])))
