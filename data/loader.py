"""From a data set to batches, in the order of `data.order`.

The only state is the number of samples seen; loader processes change the speed and nothing else.
"""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice, takewhile
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from conf.errors import UserError
from data.image_dataset import Batch, ImageDataset
from data.latent_dataset import LatentDataset
from data.order import step_positions


class Dataset(Protocol):
    """A data set as `batches` reads it."""

    samples: int
    digest: str  # identity of all that it holds

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the training stream."""


@runtime_checkable
class Stream(Protocol):
    """A data set whose samples come in an order that nobody knows beforehand."""

    samples: int
    digest: str

    def read(self, parts: Iterable[list[int]], start: int, reader: int, readers: int) -> Iterator[Batch]:
        """A batch for each list of positions, as one of so many readers."""


def batches(
    dataset: Dataset | Stream,
    global_batch: int,  # samples per optimiser step over all ranks
    micro_batch: int,  # samples per rank and forward pass, at most
    rank: int,
    world: int,
    start: int,  # samples seen so far: the position of the first sample
    workers: int,  # loader processes; 0: load in this process
    stop: int | None = None,  # samples seen at which no further step begins; None: never ends
    extend: Callable[[Batch], Batch] | None = None,  # what else a micro-batch holds, made where it is loaded
) -> Iterator[Batch]:
    """Yield this rank's micro-batches in order; `UserError` when the data set has less than one global batch."""
    if dataset.samples < global_batch:
        raise UserError(
            f"the data set has {dataset.samples} samples, fewer than batch.global_batch_size={global_batch}: "
            "lower batch.global_batch_size or add samples"
        )
    steps = takewhile(lambda step: stop is None or step < stop, count(start, global_batch))
    parts = (part for step in steps for part in step_positions(step, global_batch, rank, world, micro_batch))
    if isinstance(dataset, Stream):
        return _load(_Read(dataset, parts, extend, start, rank, world), None, workers)
    return _load(_Fetch(dataset.batch, extend), parts, workers)


def sequential(
    dataset: ImageDataset | LatentDataset, indices: Sequence[int], batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """Yield these samples of the manifest in the given order, without augmentation; the last batch may be smaller."""
    parts = (list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size))
    return _load(_Fetch(dataset.batch_at), parts, workers)


class _Fetch:
    """The part of a dataset that a DataLoader sees: a list of numbers in, a whole batch (or the user's error) out."""

    def __init__(self, get: Callable[[list[int]], Batch], extend: Callable[[Batch], Batch] | None = None) -> None:
        self.get, self.extend = get, extend  # the first is a method of the data set

    def __getitems__(self, numbers: list[int]) -> Batch | UserError:
        try:
            batch = self.get(numbers)
            return batch if self.extend is None else self.extend(batch)
        except UserError as error:  # raised in the training process: a DataLoader would bury it in a traceback
            return error


class _Read(IterableDataset):
    """What a DataLoader sees of a `Stream`: each of N loader processes reads every N-th batch, or its error."""

    def __init__(
        self,
        stream: Stream,
        parts: Iterable[list[int]],
        extend: Callable[[Batch], Batch] | None,
        start: int,
        rank: int,
        world: int,
    ) -> None:
        self.stream, self.parts, self.extend = stream, parts, extend
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = self.rank * workers + worker, self.world * workers
        try:
            for batch in self.stream.read(islice(self.parts, worker, None, workers), self.start, reader, readers):
                yield batch if self.extend is None else self.extend(batch)
        except UserError as error:
            yield error


def _load(fetch: _Fetch | _Read, parts: Iterable[list[int]] | None, workers: int) -> Iterator[Batch]:
    """Batches by their numbers, or without `parts` as they come."""
    loader: DataLoader = DataLoader(
        fetch,  # type: ignore[arg-type]
        **({"batch_size": None} if parts is None else {"batch_sampler": parts}),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_training,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each iterator draws a number from the global stream
    )
    if workers:
        atexit.register(_end_workers)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _leave_signals_to_training(worker: int) -> None:
    """A scheduler signals all processes of a job; the training decides when to stop, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """When the process ends by an exception, multiprocessing sends the workers SIGTERM, and would wait forever."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _as_it_is(batch: Any) -> Any:
    return batch
