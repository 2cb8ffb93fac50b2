"""Where samples come from: each source gives sample `index` as a pure function, so that any process can make it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from conf.errors import UserError
from conf.schema import BuildRun, Source


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its caption, not yet normalised."""

    image: Image.Image | bytes  # drawn RGB, or the contents of a file
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values kept beside the picture


class Rejected(UserError):
    """This sample cannot be used; the message is the reason that goes to rejects.jsonl."""


class SampleSource(Protocol):
    """Picklable: it is sent to the processes that build."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a list of rejects calls sample `index`, such as its path."""

    def sample(self, index: int) -> Sample:
        """Sample `index`, the same in every process; raises Rejected or ImageError."""

    def identity(self) -> dict[str, Any]:
        """What decides the samples; two builds with equal identities have the same ones."""

    def describe(self) -> dict[str, Any]:
        """Provenance for people: name, licence, attribution, versions."""


def open_source(cfg: BuildRun) -> SampleSource:
    """The source that `cfg.source` names; raises UserError when there is nothing to take or a package is missing."""
    if cfg.source is Source.demo:
        from data.sources.demo import DemoSource

        return DemoSource(cfg)
    if cfg.source is Source.twemoji:
        from data.sources.twemoji import TwemojiSource

        return TwemojiSource(cfg)
    from data.sources.folder import FolderSource

    return FolderSource(cfg)
