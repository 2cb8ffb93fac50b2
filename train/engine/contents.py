"""What a checkpoint holds, on its way from the processes' shards to files and back, one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from conf.errors import UserError
from conf.plain_json import dumps
from models.formats.tensor_stream import Fingerprint, TensorStream, in_file_order, write_bytes, write_stream
from train.engine.backend.layout import Layout
from train.engine.runtime import Runtime

HostMemory = dict[str, list[Tensor]]  # file -> the tensors of the latest copy


@dataclass(frozen=True, slots=True)
class Contents:
    """Files by their names in the checkpoint: some of tensors, which all processes make together, some of JSON."""

    streams: dict[str, TensorStream]
    documents: dict[str, Any]

    def write(self, folder: Path) -> dict[str, Fingerprint]:
        """Write and flush all files; the main process, which calls `drain` after a failure. Raises OSError."""
        prints: dict[str, Fingerprint] = {}
        for name, stream in self.streams.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            prints[name] = write_stream(folder / name, stream)
        for name, document in self.documents.items():
            prints[name] = write_bytes(folder / name, dumps(document, indent=1).encode())
        return prints

    def drain(self) -> None:
        """Make the tensors that are left: the part of the processes that do not write."""
        for stream in self.streams.values():
            stream.drain()

    def held(self, memory: HostMemory, runtime: Runtime) -> "Contents":
        """A copy in the main process's host memory, of how things are now, so that training can go on; collective.

        `memory` is filled at the first call and used again by the later ones: its pages are then there and, for a GPU,
        pinned.
        """
        on_gpu, streams = runtime.device.type == "cuda", {}
        try:
            for file, stream in self.streams.items() if runtime.is_main else ():
                if file not in memory:
                    memory[file] = [_host(spec, on_gpu) for spec in stream.specs.values()]
                for copy, tensor in zip(memory[file], stream.tensors, strict=True):
                    copy.copy_(tensor, non_blocking=on_gpu)
                streams[file] = TensorStream(stream.specs, iter(memory[file]))
        finally:
            # The others make the tensors for the main process; that one, where it failed half-way, for the others: each
            # tensor is a collective operation, and one that is left out would be answered by the next one.
            self.drain()
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # the copies run behind, and the next step changes the weights
        return Contents(streams, self.documents)


def join_contents(parts: Sequence[Contents], documents: Mapping[str, Any]) -> Contents:
    """One checkpoint of several trainables and of what is no trainable's."""
    streams = {name: stream for part in parts for name, stream in part.streams.items()}
    return Contents(streams, {name: d for part in parts for name, d in part.documents.items()} | dict(documents))


def _host(spec: Tensor, pinned: bool) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=pinned)


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
    """Fill the shards and other tensors from a file, after all its names and shapes were checked.

    Raises:
        UserError: a tensor or the file is missing, has another shape or is not ours; names the first.

    """
    if not path.is_file():
        raise UserError(f"{path}: not there; resume with the options that the checkpoint was made with")
    shapes = {**layout.shapes, **{name: tensor.shape for name, tensor in others.items()}}
    with safe_open(path, framework="pt") as file:
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if name not in found:
                raise UserError(f"{path}: has no tensor '{name}'; it belongs to another architecture")
            if found[name] != shape:
                raise UserError(f"{path}: '{name}' is {list(found[name])} there but {list(shape)} in this network")
        for name in sorted(found.keys() - shapes.keys()):
            raise UserError(f"{path}: has a tensor '{name}' that this network lacks")
        for name in shapes:
            if name in others:
                others[name].copy_(file.get_tensor(name))
            else:
                layout.disperse(name, file.get_tensor(name), shards)
