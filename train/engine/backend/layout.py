"""Where each parameter lies: whole, or cut over processes, in flat fp32 shards; and what they hand to each other of it.

A backend describes its cut as pieces, one or none per parameter and process. Anything that has the shape of the shards
(weights, their average, AdamW's moments) is then put together and taken apart by the same functions: one parameter at a
time (`Layout`), or as parameters lie end to end in a file, of which each process has a stretch (`Row`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

BUCKET = 50_000_000  # most elements that one collective operation moves
FP32 = 4  # bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one flattened parameter that this process holds."""

    shard: int  # index of the flat tensor that holds it
    offset: int  # first element within that tensor
    start: int  # first element within the parameter
    numel: int  # elements, 0 where this process holds none


@dataclass(frozen=True, slots=True)
class Members:
    """Processes that exchange something, this one among them."""

    size: int = 1
    rank: int = 0  # of this process among them
    group: Any = None  # torch's; None: all processes


class Cut(NamedTuple):
    """Consecutive elements of one flattened parameter."""

    name: str
    start: int
    stop: int  # exclusive


Stretch = tuple[int, int]  # bytes of a file: the first, and the first after it


@dataclass(frozen=True, slots=True)
class Layout:
    """All trainable parameters by name, in the module's order."""

    shapes: Mapping[str, torch.Size]
    pieces: Mapping[str, Piece]
    sharded: bool  # whether the shards are flat tensors with the pieces in them; False: shard i is parameter i
    device: torch.device
    shards: Members = field(default_factory=Members)  # processes that hold all parameters together
    copies: Members = field(default_factory=Members)  # processes that hold the same as this one
    table: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)  # first element and end of all pieces, [S, 2]

    def assemble(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """One full fp32 parameter on every process; collective if sharded."""
        full = self._padded(name, shards)
        if self.shards.size > 1:
            # Each element is zero on all processes but one: a sum of the bit patterns keeps it exactly, -0.0 too.
            dist.all_reduce(full.view(torch.int32), group=self.shards.group)
        return full.view(self.shapes[name])

    def collect(self, name: str, shards: Sequence[Tensor], owner: int = 0) -> Tensor:
        """One full fp32 parameter, on number `owner` of the processes that hold all together; collective.

        It may be on any device, and is no copy where that process holds all of it.
        """
        piece, shape = self.pieces[name], self.shapes[name]
        if not self.sharded:
            return shards[piece.shard].detach()
        if self.shards.size == 1:
            return self._held(piece, shards).view(shape)
        full = self._padded(name, shards)
        # A reduction again, since pieces differ in length, which a gathering of equal parts does not allow. Others than
        # the owner are left with what their part of it came to, and throw that away.
        dist.reduce(full.view(torch.int32), group=self.shards.group, group_dst=owner)
        return full.view(shape)

    def disperse(self, name: str, full: Tensor, shards: Sequence[Tensor]) -> None:
        """Write this process's part of a full parameter into its shards."""
        piece = self.pieces[name]
        if not self.sharded:
            shards[piece.shard].detach().copy_(full)  # in whatever memory format it has
            return
        self._held(piece, shards).copy_(full.reshape(-1)[piece.start : piece.start + piece.numel])

    def held_by(self, name: str, member: int) -> tuple[int, int]:
        """Elements of a parameter, the first and the first after it, that number `member` holds of those that share."""
        if member == self.shards.rank:
            piece = self.pieces[name]
            return piece.start, piece.start + piece.numel
        start, stop = self.table[name][member]
        return int(start), int(stop)

    def read(self, cut: Cut, shards: Sequence[Tensor]) -> Tensor:
        """Elements that this process holds, fp32, in the same memory where they lie end to end."""
        piece = self.pieces[cut.name]
        if not self.sharded:
            return shards[piece.shard].detach().contiguous().view(-1)[cut.start : cut.stop]
        return self._held(piece, shards)[cut.start - piece.start : cut.stop - piece.start]

    def write(self, cut: Cut, values: Tensor, shards: Sequence[Tensor]) -> None:
        """Counterpart of `read`."""
        piece = self.pieces[cut.name]
        whole = shards[piece.shard].detach()
        if self.sharded or whole.is_contiguous():
            self.read(cut, shards).copy_(values)
            return
        flat = whole.contiguous().view(-1)  # of a parameter in another memory format: there is no view of its elements
        flat[cut.start : cut.stop] = values
        whole.copy_(flat.view(whole.shape))

    def _held(self, piece: Piece, shards: Sequence[Tensor]) -> Tensor:
        return shards[piece.shard].detach().reshape(-1)[piece.offset : piece.offset + piece.numel]

    def _padded(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """This process's part of a flattened parameter among zeros."""
        piece = self.pieces[name]
        full = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self.device)
        full[piece.start : piece.start + piece.numel] = self._held(piece, shards)
        return full


class Row:
    """Parameters end to end, as a file has them, and the exchange of stretches of it.

    Args:
        begins: where each parameter begins in the file, in bytes; in between there may be other things.
    """

    def __init__(self, layout: Layout, begins: Mapping[str, int]) -> None:
        self.layout, self.begin_of = layout, begins
        self.names = sorted(begins, key=begins.__getitem__)
        self.begins = [begins[name] for name in self.names]

    def cuts(self, stretch: Stretch, member: int) -> Iterator[Cut]:
        """What number `member` holds of a stretch, in the file's order."""
        first, last = stretch
        for index in range(max(0, bisect_right(self.begins, first) - 1), bisect_left(self.begins, last)):
            name, begin = self.names[index], self.begins[index]
            start, stop = self.layout.held_by(name, member)
            start, stop = max(start, (first - begin) // FP32), min(stop, (last - begin) // FP32)
            if start < stop:
                yield Cut(name, start, stop)

    def gather(self, wanted: Sequence[Stretch], shards: Sequence[Tensor]) -> Iterator[tuple[Cut, Tensor]]:
        """Elements of the stretch that this process wants, from all that hold some of it; collective.

        Args:
            wanted: a stretch for each of the processes that hold all together.
        """
        members = self.layout.shards
        outgoing = [list(self.cuts(stretch, members.rank)) for stretch in wanted]
        incoming = [list(self.cuts(wanted[members.rank], member)) for member in range(members.size)]
        own = [self.layout.read(cut, shards) for cuts in outgoing for cut in cuts]
        yield from self._exchanged(own, outgoing, incoming)

    def scatter(
        self, stretches: Sequence[Sequence[Stretch]], contents: Sequence[Tensor], shards: Sequence[Tensor]
    ) -> None:
        """Counterpart of `gather`: hand to each process what it holds of the stretches that this one has; collective.

        Args:
            stretches: some for each of the processes that hold all together.
            contents: bytes of this one's.
        """
        members, outgoing, own = self.layout.shards, list[list[Cut]](), list[Tensor]()
        for member in range(members.size):
            outgoing.append([])
            for (first, last), content in zip(stretches[members.rank], contents, strict=True):
                for cut in self.cuts((first, last), member):
                    at = self.begin_of[cut.name] + FP32 * cut.start - first
                    own.append(content[at : at + FP32 * (cut.stop - cut.start)].view(torch.float32))
                    outgoing[-1].append(cut)
        incoming = [[cut for one in held for cut in self.cuts(one, members.rank)] for held in stretches]
        for cut, values in self._exchanged(own, outgoing, incoming):
            self.layout.write(cut, values, shards)

    def _exchanged(
        self, own: Sequence[Tensor], outgoing: Sequence[Sequence[Cut]], incoming: Sequence[Sequence[Cut]]
    ) -> Iterator[tuple[Cut, Tensor]]:
        """Send elements and receive others, by their processes."""
        received = [cut for cuts in incoming for cut in cuts]
        if self.layout.shards.size == 1:
            yield from zip(received, own, strict=True)
            return
        device = self.layout.device
        leaving, coming = (
            [sum(cut.stop - cut.start for cut in cuts) for cuts in both] for both in (outgoing, incoming)
        )
        sent = torch.cat([part.to(device) for part in own]) if own else torch.empty(0, device=device)
        into = torch.empty(sum(coming), device=device)
        dist.all_to_all_single(into, sent, coming, leaving, group=self.layout.shards.group)
        yield from zip(received, into.split([cut.stop - cut.start for cut in received]), strict=True)


Initial = Callable[[str], Tensor]  # makes a parameter, whole and on the CPU


def buckets_of(names: Iterable[str], shapes: Mapping[str, torch.Size], most: int = BUCKET) -> Iterator[list[str]]:
    """As many parameters at a time as have so many elements, by default those that one collective operation moves."""
    bucket, elements = list[str](), 0
    for name in names:
        numel = shapes[name].numel()
        if bucket and elements + numel > most:
            yield bucket
            bucket, elements = [], 0
        bucket.append(name)
        elements += numel
    if bucket:
        yield bucket


def makers_of(names: Iterable[str], shapes: Mapping[str, torch.Size], processes: int) -> dict[str, int]:
    """Who makes each parameter: the largest first, each of them by whoever has least to make."""
    makers, loads = dict[str, int](), [(0, process) for process in range(processes)]  # a heap
    for name in sorted(names, key=lambda name: (-shapes[name].numel(), name)):
        elements, makers[name] = loads[0]
        heapreplace(loads, (elements + shapes[name].numel(), makers[name]))
    return makers


def made_by_all(
    initial: Initial, shapes: Mapping[str, torch.Size], device: torch.device, processes: Members
) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters, one after the other on every process, each made by one of them; collective."""
    for names in buckets_of(shapes, shapes, BUCKET * processes.size):  # about one bucket is made by each
        makers = makers_of(names, shapes, processes.size)
        # All of a bucket are made before any travels: the processes make theirs at the same time.
        mine = {name: initial(name).to(device) for name in names if makers[name] == processes.rank}
        for name in names:
            tensor = mine.pop(name) if name in mine else torch.empty(shapes[name], device=device)
            if processes.size > 1:
                dist.broadcast(tensor, src=makers[name])
            yield name, tensor


def materialise(module: nn.Module, device: torch.device, initial: Initial | None, processes: Members) -> None:
    """Bring a module to the device, with all of every parameter; what it has on the meta device is made; collective."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.is_meta}
    for name, parameter in list(module.named_parameters()):
        if name not in shapes:
            replace_parameter(module, name, parameter.detach().to(device), parameter.requires_grad)
    for part in module.modules():
        part._buffers.update({name: held.to(device) for name, held in part._buffers.items() if held is not None})
    if initial is not None:
        for name, tensor in made_by_all(initial, shapes, device, processes):
            replace_parameter(module, name, tensor)


def replace_parameter(module: nn.Module, name: str, tensor: Tensor, trained: bool = True) -> nn.Parameter:
    """Give a module another tensor for one of its parameters."""
    owner, _, last = name.rpartition(".")
    parameter = nn.Parameter(tensor, trained)
    module.get_submodule(owner).register_parameter(last, parameter)
    return parameter


def require_cuttable(parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what no sharding backend can cut."""
    for name, parameter in parameters.items():
        if not parameter.requires_grad or parameter.ndim == 0:
            raise ValueError(f"'{name}' is frozen or a scalar, which cannot be sharded: use plain DDP, or shape [1]")


def whole(parameters: Mapping[str, Tensor], device: torch.device, copies: Members) -> Layout:
    """The layout of plain torch: shard i is parameter i, on all processes."""
    return Layout(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        pieces={name: Piece(i, 0, 0, p.numel()) for i, (name, p) in enumerate(parameters.items())},
        sharded=False,
        device=device,
        copies=copies,
    )


def cut_over(
    shards: Members,
    copies: Members,
    shapes: Mapping[str, torch.Size],
    pieces: Mapping[str, Piece],
    device: torch.device,
) -> Layout:
    """The layout of a network that processes share; collective."""
    own = torch.tensor([[pieces[name].start, pieces[name].numel] for name in shapes], device=device)  # [P, 2]
    found = [own]
    if shards.size > 1:
        found = [torch.empty_like(own) for _ in range(shards.size)]
        dist.all_gather(found, own, group=shards.group)
    table = torch.stack(found).cumsum(-1).cpu().numpy()  # [S, P, 2], of a start and a length a start and an end
    return Layout(
        shapes=shapes,
        pieces=pieces,
        sharded=True,
        device=device,
        shards=shards,
        copies=copies,
        table={name: table[:, i] for i, name in enumerate(shapes)},
    )
