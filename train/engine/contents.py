"""What a checkpoint holds, on its way from the processes' shards to files and back, of which each process has a part.

A file is one row of bytes: a header, then the tensors end to end. It is cut into as many parts as there are processes,
and each of them makes, writes and later reads its own part alone, so that no process ever holds a network that others
share with it, and a disk that many can write to is written to by all.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from conf.plain_json import dumps
from models.formats.tensor_stream import (
    DTYPES,
    TensorStream,
    header_of,
    in_file_order,
    places_of,
    read_header,
    write_bytes,
)
from train.engine.backend.layout import Layout, Row, Stretch
from train.engine.marker import Part

ALIGNMENT = 1 << 20  # bytes; parts begin at multiples, since file systems lock what two processes write to
ROUND = 1 << 23  # most bytes that a process handles at a time; larger memory would be mapped anew each time

HostMemory = dict[str, Tensor]  # file -> this process's part of the latest copy


class TensorFile:
    """Tensors that become one file: parameters as a layout has them, or what has their shapes, and others beside them.

    Args:
        shards: this process's part, as `layout` describes it.
        others: the same on all processes.
    """

    def __init__(self, layout: Layout, shards: Sequence[Tensor], others: Mapping[str, Tensor]) -> None:
        self.layout, self.shards, self.others = layout, shards, others
        specs = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in layout.shapes.items()}
        specs |= others
        self.header = header_of({name: specs[name] for name in in_file_order(specs)})
        self.places = {name: place for name, (_, _, place) in places_of(self.header).items()}
        self.size = max([len(self.header), *(end for _, end in self.places.values())])
        self.row = Row(layout, {name: self.places[name][0] for name in layout.shapes})

    @property
    def part(self) -> Stretch:
        """What this process writes."""
        return parts_of(self.size, self.layout)[self.layout.shards.rank][self.layout.copies.rank]

    def made(self) -> Iterator[tuple[int, Tensor]]:
        """The bytes of this process's part, some at a time, with the place of the first one in the file; collective.

        They are uint8, on the device, and of this moment.
        """
        for round_ in rounds_of(parts_of(self.size, self.layout), ROUND):
            wanted = [stretches[self.layout.copies.rank] for stretches in round_]
            first, last = wanted[self.layout.shards.rank]
            content = torch.empty(last - first, dtype=torch.uint8, device=self.layout.device)
            for begin, known in self._known(first, last):
                content[begin - first : begin - first + len(known)] = known
            for cut, values in self.row.gather(wanted, self.shards):
                begin = self.places[cut.name][0] + values.element_size() * cut.start - first
                values = values.contiguous().view(torch.uint8)
                content[begin : begin + len(values)] = values
            if len(content):
                yield first, content

    def _known(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """What every process has of a stretch: header and others."""
        header = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        others = ((self.places[name][0], bytes_of(tensor)) for name, tensor in self.others.items())
        for begin, content in ((0, header), *others):
            low, high = max(begin, first), min(begin + len(content), last)
            if low < high:
                yield low, content[low - begin : high - begin]


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes in its logical order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def parts_of(size: int, layout: Layout) -> list[list[Stretch]]:
    """A file's part for each process, [shards][copies]: neighbours in it are copies of each other."""
    shards, copies = layout.shards.size, layout.copies.size
    count = shards * copies
    ends = [min(size, round(size * i / count / ALIGNMENT) * ALIGNMENT) for i in range(count)] + [size]
    parts = list(pairwise(ends))
    return [parts[i * copies : (i + 1) * copies] for i in range(shards)]


def rounds_of(parts: Sequence[Sequence[Stretch]], most: int) -> Iterator[list[list[Stretch]]]:
    """All parts a piece at a time, each of at most so many bytes, as often as the longest of them needs."""
    longest = max(last - first for stretches in parts for first, last in stretches)
    for start in range(0, longest, most):
        yield [
            [(min(first + start, last), min(first + start + most, last)) for first, last in stretches]
            for stretches in parts
        ]


@dataclass(frozen=True, slots=True)
class Contents:
    """Files by their names in the checkpoint: some of tensors, of which each process has a part, some of JSON."""

    files: Mapping[str, "TensorFile | Held"]
    documents: Mapping[str, Any]

    def write(self, folder: Path, main: bool) -> dict[str, Part]:
        """Write and flush this process's part of all files; the main process also the documents. Raises OSError.

        Collective, unless it is a copy. A process that cannot write helps the others to the end before it raises.
        """
        parts, failure = dict[str, Part](), None
        for name, file in self.files.items():
            pieces = file.made()
            if failure is None:
                try:
                    parts[name] = write_part(folder / name, file.size, file.part, pieces)
                except OSError as error:
                    failure = error
            for _ in pieces:  # each is a collective operation, and one that is left out would be answered by the next
                pass
        if failure is not None:
            raise failure
        for name, document in self.documents.items() if main else ():
            size, digest = write_bytes(folder / name, dumps(document, indent=1).encode())
            parts[name] = Part(0, size, size, digest)
        return parts

    def held(self, memory: HostMemory) -> "Contents":
        """A copy in host memory, of how things are now, so that training can go on; collective.

        `memory` is filled at the first call and used again by the later ones: its pages are then there and, for a GPU,
        pinned.
        """
        copies, failure, device = dict[str, Held](), None, None
        for name, file in self.files.items():
            assert isinstance(file, TensorFile)
            (begin, end), device = file.part, file.layout.device
            try:
                if name not in memory:
                    memory[name] = torch.empty(end - begin, dtype=torch.uint8, pin_memory=device.type == "cuda")
                copies[name] = Held(file.size, file.part, memory[name])
            except RuntimeError as error:  # no memory; what fails in `made` fails on its way between the processes
                failure = error
            for first, content in file.made():
                if name in copies:
                    memory[name][first - begin : first - begin + len(content)].copy_(content, non_blocking=True)
        if failure is not None:
            raise failure
        if device is not None and device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies run behind, and the next step changes the weights
        return Contents(copies, self.documents)


@dataclass(frozen=True, slots=True)
class Held:
    """This process's part of a file, in host memory."""

    size: int  # of the file
    part: Stretch
    content: Tensor  # uint8

    def made(self) -> Iterator[tuple[int, Tensor]]:
        """As `TensorFile.made`, but of the moment of the copy, and not collective."""
        if len(self.content):
            yield self.part[0], self.content


def write_part(path: Path, size: int, part: Stretch, pieces: Iterator[tuple[int, Tensor]]) -> Part:
    """Write and flush one part of a file to which other processes write the others. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, (begin, end) = hashlib.sha256(), part
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
        os.ftruncate(file.fileno(), size)
        for first, content in pieces:
            rest = content.cpu().numpy().data
            digest.update(rest)
            file.seek(first)
            while rest:
                rest = rest[file.write(rest) :]  # the system takes no more than 2 GiB at once
        os.fsync(file.fileno())
    return Part(begin, end, size, digest.hexdigest())


def join_contents(parts: Sequence[Contents], documents: Mapping[str, Any]) -> Contents:
    """One checkpoint of several trainables and of what is no trainable's."""
    files = {name: file for part in parts for name, file in part.files.items()}
    return Contents(files, {name: d for part in parts for name, d in part.documents.items()} | dict(documents))


def stream(layout: Layout, shards: Sequence[Tensor], others: Mapping[str, Tensor]) -> TensorStream:
    """Whole parameters, or what has their shapes, and other tensors beside them; the main process gets them.

    Args:
        shards: this process's part, as `layout` describes it.
        others: the same on all processes.

    """
    specs = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in layout.shapes.items()}
    specs |= others
    names = in_file_order(specs)

    def tensors() -> Iterator[Tensor]:
        for name in names:  # sorted, so that all processes join for the same parameter
            yield others[name].detach() if name in others else layout.collect(name, shards)

    return TensorStream({name: specs[name] for name in names}, tensors())


def read_into(path: Path, layout: Layout, shards: Sequence[Tensor], others: Mapping[str, Tensor]) -> None:
    """Fill the shards and other tensors from a file, after all its names and shapes were checked; collective.

    Each process reads a part of the file, of which the others get what they hold.

    Raises:
        UserError: a tensor or the file is missing, has another shape or is not ours; names the first.

    """
    places = _checked(path, layout, others)
    row = Row(layout, {name: places[name][0] for name in layout.shapes})
    size = max(end for _, end in places.values())
    with path.open("rb", buffering=0) as file:

        def read(stretch: Stretch) -> Tensor:
            content = bytearray(stretch[1] - stretch[0])
            rest = memoryview(content)
            file.seek(stretch[0])
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
            if rest:
                raise UserError(f"{path}: ends too soon")
            return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)

        for round_ in rounds_of(parts_of(size, layout), max(1, ROUND // ALIGNMENT // layout.copies.size) * ALIGNMENT):
            stretches = round_[layout.shards.rank]
            own = read(stretches[layout.copies.rank]).to(layout.device)
            row.scatter(round_, _of_copies(own, stretches, layout), shards)
        for name, tensor in others.items():
            content = read(places[name]).view(tensor.dtype) if tensor.numel() else torch.empty(0)
            tensor.copy_(content.view(tensor.shape))


def _of_copies(own: Tensor, stretches: Sequence[Stretch], layout: Layout) -> list[Tensor]:
    """Bytes of all stretches, each of which a process has read that holds the same as this one; collective."""
    if layout.copies.size == 1:
        return [own]
    longest = max(last - first for first, last in stretches)
    padded = torch.zeros(longest, dtype=torch.uint8, device=layout.device)
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in stretches]
    dist.all_gather(found, padded, group=layout.copies.group)
    return [content[: last - first] for content, (first, last) in zip(found, stretches, strict=True)]


def _checked(path: Path, layout: Layout, others: Mapping[str, Tensor]) -> dict[str, Stretch]:
    """Where a file has each tensor."""
    if not path.is_file():
        raise UserError(f"{path}: not there; resume with the options that the checkpoint was made with")
    wanted = {name: ("F32", shape) for name, shape in layout.shapes.items()}
    wanted |= {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in others.items()}
    found = places_of(read_header(path))
    for name, (dtype, shape) in wanted.items():
        if name not in found:
            raise UserError(f"{path}: has no tensor '{name}'; it belongs to another architecture")
        if found[name][1] != tuple(shape):
            raise UserError(f"{path}: '{name}' is {list(found[name][1])} there but {list(shape)} in this network")
        if found[name][0] != dtype:
            raise UserError(f"{path}: '{name}' is of {found[name][0]} there but of {dtype} in this network")
    for name in sorted(found.keys() - wanted.keys()):
        raise UserError(f"{path}: has a tensor '{name}' that this network lacks")
    return {name: place for name, (_, _, place) in found.items()}
