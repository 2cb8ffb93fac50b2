"""Safetensors files written tensor by tensor, or in parts, so that nobody has to hold a whole model to save it.

The format (github.com/huggingface/safetensors): the header's length as 8 bytes, a JSON header with dtype, shape and
place of every tensor, then their bytes end to end.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes, of the first tensor

HEADER_BYTES = 100_000_000  # most that a header may have

Fingerprint = tuple[int, str]  # bytes and sha256 of a file
Place = tuple[int, int]  # of a tensor in a file: its first byte, and the first after it


@dataclass(frozen=True, slots=True)
class TensorStream:
    """Tensors that are made one after the other, and can be asked for once.

    Args:
        specs: name -> shape and dtype (a meta tensor will do), in the order of `in_file_order`.
        tensors: their values in the same order, on any device; each may be thrown away when the next is asked for.

    """

    specs: Mapping[str, Tensor]
    tensors: Iterator[Tensor]

    def drain(self) -> None:
        """Ask for the rest: where processes make the tensors together, none may stop before the others."""
        for _ in self.tensors:
            pass


def in_file_order(names: Mapping[str, Tensor]) -> list[str]:
    """Wide dtypes first, so that every tensor of a file lies at a multiple of its element's size; then by name."""
    return sorted(names, key=lambda name: (-names[name].element_size(), name))


def stream_of(weights: Mapping[str, Tensor]) -> TensorStream:
    """Tensors that are all there already."""
    names = in_file_order(weights)
    return TensorStream({name: weights[name] for name in names}, (weights[name] for name in names))


def write_stream(path: Path, stream: TensorStream, metadata: Mapping[str, str] | None = None) -> Fingerprint:
    """Write a file with one tensor in memory at a time, and flush it to disk. Raises OSError."""
    return _write(path, chain([header_of(stream.specs, metadata)], _checked_bytes(stream)))


def write_bytes(path: Path, content: bytes) -> Fingerprint:
    """Write a file of any kind, atomically."""
    return _write(path, [content])


def header_of(specs: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file of tensors that follow in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, spec in specs.items():
        end = place + spec.numel() * spec.element_size()
        entries[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def places_of(header: bytes) -> dict[str, tuple[str, tuple[int, ...], Place]]:
    """Dtype, shape and place in the file of each tensor that a header lists, in the order of their places.

    Raises:
        ValueError: it is no such header.
    """
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    found = {
        name: (entry["dtype"], tuple(entry["shape"]), tuple(len(header) + at for at in entry["data_offsets"]))
        for name, entry in entries.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1][2]))


def read_header(path: Path) -> bytes:
    """The header of a file; raises ValueError where it has none, OSError where there is no file."""
    with path.open("rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        text = file.read(length) if length <= HEADER_BYTES else b""
    if len(size) < 8 or len(text) != length:
        raise ValueError(f"{path}: no safetensors file")
    return size + text


def _checked_bytes(stream: TensorStream) -> Iterator[memoryview]:
    for (name, spec), tensor in zip(stream.specs.items(), stream.tensors, strict=True):
        if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, not what the header says")
        whole = tensor.detach().cpu().contiguous()
        yield whole.reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> Fingerprint:
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            size += len(part)
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]  # the system takes no more than 2 GiB at once
        os.fsync(file.fileno())
    return size, digest.hexdigest()
