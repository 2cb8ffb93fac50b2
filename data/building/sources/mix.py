"""Several sources as one, each with its share."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data.building.sources import Ref, Sample, SampleSource
from data.labels import LabelError, Vocabulary


class MixSource:
    """Takes from each source in proportion to its weight, everywhere in the stream, until one cannot give its share.

    Args:
        samples: the most to take, 0 for all.
    """

    def __init__(self, sources: Mapping[str, SampleSource], weights: Mapping[str, float], samples: int) -> None:
        self.sources, self.weights, self.samples = sources, weights, samples
        self.taken = dict.fromkeys(sources, 0)

    def expected(self) -> int | None:
        """Number of samples that the source that ends first allows."""
        sizes = {name: source.expected() for name, source in self.sources.items()}
        total = sum(self.weights.values())
        allowed = [int(size * total / self.weights[name]) for name, size in sizes.items() if size is not None]
        return min([*allowed, self.samples] if self.samples else allowed) if len(allowed) == len(sizes) else None

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """In turn: always the source that is furthest behind its share."""
        self.taken = dict.fromkeys(self.sources, 0)
        return islice(self._refs(scratch), self.samples or None)

    def _refs(self, scratch: Path) -> Iterator[Ref]:
        streams = {name: source.refs(scratch / name) for name, source in self.sources.items()}
        for number in count():
            name = min(streams, key=lambda n: (self.taken[n] + 1) / self.weights[n])
            ref = next(streams[name], None)
            if ref is None:
                return
            self.taken[name] += 1
            yield Ref(f"{number:09d}", f"{name}: {ref.name}", (name, ref.place), ref.problem)

    def sample(self, place: tuple[str, Any]) -> Sample:
        """Sample as its source makes it; that one's name is kept as "mixed_from"."""
        name, inner = place
        sample = self.sources[name].sample(inner)
        return replace(sample, meta={**sample.meta, "mixed_from": name})

    def vocabulary(self) -> Vocabulary:
        """Vocabulary of all sources together; raises UserError where two sources number their classes differently."""
        known = Vocabulary()
        for name, source in self.sources.items():
            try:
                known.learn(source.vocabulary().uses())
            except LabelError as error:
                raise UserError(f"sources: {name}: {error}; number the classes alike, or build them apart") from None
        return known

    def identity(self) -> dict[str, Any]:
        """Identities of the sources, and their weights."""
        members = {name: {"weight": self.weights[name], **source.identity()} for name, source in self.sources.items()}
        return {"sources": members, "samples": self.samples}

    def times(self) -> str:
        """Times of the sources' files."""
        return "/".join(source.times() for source in self.sources.values())

    def describe(self) -> dict[str, Any]:
        """Descriptions of the sources, with what was taken of each."""
        described = {name: source.describe() for name, source in self.sources.items()}
        texts = [text for part in described.values() if (text := part.get("attribution"))]
        members = {
            name: {**part, "taken": self.taken[name], "of": self.sources[name].expected()}
            for name, part in described.items()
        }
        return {"name": "mix", "sources": members} | ({"attribution": "\n".join(texts)} if texts else {})
