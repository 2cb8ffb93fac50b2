"""Where samples come from: each source says in which order, and any process can make any of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.schema import DRAWN, BuildRun, MixedSource, Source
from data.labels import Vocabulary


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its caption, not yet normalised."""

    image: Image.Image | bytes  # drawn RGB, or the contents of a file
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values kept beside the image
    segments: np.ndarray | bytes | None = None  # uint8 [H, W], or the contents of a file
    split_by: str = ""  # decides whether it is held out, where the caption is that of many others


class Rejected(UserError):
    """This sample cannot be used; the message is the reason that goes to rejects.jsonl."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Reference to one sample; small, since it travels to the process that makes the sample."""

    key: str  # of the sample in our shards
    name: str  # what a list of rejects calls it, such as its path
    place: Any  # for the source that gave it
    problem: str | None = None  # why there is no sample


class SampleSource(Protocol):
    """Picklable: it is sent to the processes that build."""

    def expected(self) -> int | None:
        """How many samples there are; None when only a look into all of them would tell."""

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """All samples in an order that never varies; called in one process.

        Files that it leaves in the folder `scratch` stay until all samples are made.
        """

    def sample(self, place: Any) -> Sample:
        """The sample at a place, the same in every process; raises Rejected or ImageError."""

    def vocabulary(self) -> Vocabulary:
        """Classes that are known before the first sample."""

    def identity(self) -> dict[str, Any]:
        """Facts that decide the samples; two builds with equal identities have the same ones."""

    def times(self) -> str:
        """Digest of when the user's files were written, which tells of edits that keep their sizes; "" without any."""

    def describe(self) -> dict[str, Any]:
        """Provenance for people: name, licence, attribution, versions; asked for when all refs were taken."""


def numbered(names: Iterable[str]) -> Iterator[Ref]:
    """Refs of a source whose places are the numbers from 0 on."""
    return (Ref(f"{number:09d}", name, number) for number, name in enumerate(names))


def open_source(cfg: BuildRun) -> SampleSource:
    """The source that `cfg.source` names; raises UserError when there is nothing to take or a package is missing."""
    if cfg.source is Source.demo:
        from data.building.sources.demo import demo_source

        return demo_source(cfg)
    if cfg.source is Source.layout:
        from data.building.sources.layout import layout_source

        return layout_source(cfg)
    if cfg.source is Source.subject:
        from data.building.sources.subject import subject_source

        return subject_source(cfg)
    if cfg.source is Source.twemoji:
        from data.building.sources.twemoji import TwemojiSource

        return TwemojiSource(cfg)
    if cfg.source is Source.shards:
        from data.building.sources.shards import ShardsSource

        return ShardsSource(cfg)
    if cfg.source is Source.mds:
        from data.building.sources.mds import MdsSource

        return MdsSource(cfg)
    if cfg.source is Source.mix:
        from data.building.sources.mix import MixSource

        return MixSource(
            {member.name or member.source.value: open_source(_alone(cfg, member)) for member in cfg.sources},
            {member.name or member.source.value: member.weight for member in cfg.sources},
            cfg.samples,
        )
    from data.building.sources.folder import folder_source

    return folder_source(cfg)


def _alone(cfg: BuildRun, member: MixedSource) -> BuildRun:
    """The build of one source of a mix."""
    return replace(
        cfg,
        source=member.source,
        path=member.path,
        class_from_folder=member.class_from_folder,
        image_column=member.image_column,
        caption_column=member.caption_column,
        samples=cfg.samples if member.source in DRAWN else 0,
        sources=[],
    )
