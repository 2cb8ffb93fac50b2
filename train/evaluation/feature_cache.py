"""What is measured of images, in files of a fixed number of images, until the metrics are made of it.

    folder/000000000064.safetensors    columns [B, ...] of images 64 to 64 + B

No process ever holds more than one chunk of images, any number of processes share the chunks, and whoever starts
again leaves out those that are there. A chunk is the same on any number of processes, and so are the metrics.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.files import atomic_path
from train.engine.progress import Progress
from train.engine.runtime import Runtime

Measure = Callable[[range], dict[str, Tensor]]  # numbers of images to columns [B, ...] on the CPU


class FeatureCache:
    """Measurements of images 0 to `total`, in the subfolder of `root` that belongs to `facts`.

    Args:
        root: may hold measurements of other facts; they are left alone.
        facts: all that the numbers depend on, in plain values.
        total: images.
        size: images per chunk.
    """

    def __init__(self, root: Path, facts: dict[str, Any], total: int, size: int) -> None:
        known = json.dumps([facts, total, size], sort_keys=True)
        self.folder = root / hashlib.sha256(known.encode()).hexdigest()[:16]
        self.ranges = [range(start, min(start + size, total)) for start in range(0, total, size)]

    def fill(self, measure: Measure, runtime: Runtime, command: str, doing: str = "measuring images") -> int:
        """Measure what is not there yet, each process its share of the chunks; returns the images measured by all.

        Collective. The main process tells now and then, as `command`, how far it is.
        """
        # One process looks for all: another one, a moment later, would find other chunks, and both measure the same.
        todo: list[range] = runtime.gather_objects(self.missing() if runtime.is_main else None)[0]
        total, done = sum(map(len, todo)), 0
        with Progress(command, total, "images", shown=runtime.is_main, doing=doing) as progress:
            for numbers in todo[runtime.rank :: runtime.world]:
                runtime.threads.adjust()
                self.write(numbers, measure(numbers))
                done += len(numbers)
                progress.update(min(done * runtime.world, total))  # the others are taken to be as fast
        runtime.barrier()  # whoever reads next needs the chunks of all processes
        return total

    def missing(self) -> list[range]:
        """Numbers of the images of each chunk that is not there."""
        return [numbers for numbers in self.ranges if not self._path(numbers).is_file()]

    def write(self, numbers: range, columns: dict[str, Tensor]) -> None:
        """A whole chunk, or nothing."""
        with atomic_path(self._path(numbers)) as path:
            save_file({name: column.contiguous() for name, column in columns.items()}, path)

    def names(self, part: str) -> list[str]:
        """Names of the columns that all chunks have, as far as `part` is in them."""
        return sorted(name for name in load_file(self._path(self.ranges[-1])) if part in name)

    def columns(self, *names: str) -> Iterator[list[Tensor]]:
        """Chunk by chunk, in order, the columns of these names; those that have none of the first are left out."""
        for numbers in self.ranges:
            chunk = load_file(self._path(numbers))
            if names[0] in chunk:
                yield [chunk[name] for name in names]

    def whole(self, name: str, most: int | None = None) -> Tensor:
        """A column of all images, or of `most` of them at even distances."""
        total = self.ranges[-1].stop
        most = total if most is None else min(most, total)
        wanted = torch.arange(most) * (total - 1) // max(1, most - 1)  # in integers, so that none comes twice
        parts = []
        for numbers, (column,) in zip(self.ranges, self.columns(name), strict=True):
            parts.append(column[wanted[(wanted >= numbers.start) & (wanted < numbers.stop)] - numbers.start])
        return torch.cat(parts)

    def remove(self) -> None:
        """Forget all measurements."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are there
            self.folder.parent.rmdir()

    def _path(self, numbers: range) -> Path:
        return self.folder / f"{numbers.start:012d}.safetensors"
