"""Metrics that another process hands to a training that goes on, so that one process alone writes to its W&B run.

    output_dir/inbox/<samples_seen>-<name>.json    {"samples_seen", "metrics", "image": path or null}

They stay there: the folder is small, and each start of the training needs all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.files import atomic_write
from conf.plain_json import dumps

FOLDER = "inbox"


@dataclass(frozen=True, slots=True)
class Message:
    """What is to stand in the run at `samples_seen`."""

    samples_seen: int
    metrics: dict[str, float | None]
    name: str  # of the image, and of the sender
    image: str | None  # path


def put(output_dir: Path, message: Message) -> None:
    """Leave a message for the training in `output_dir`; a later one of the same name and moment replaces it."""
    content = dumps(asdict(message)).encode()
    atomic_write(output_dir / FOLDER / f"{message.samples_seen:012d}-{message.name}.json", content)


class Inbox:
    """The messages of a folder; each start of the training reads all of them, as its own rows go to W&B again."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self.seen: Mapping[str, int] = {}  # file → time of its last change

    def new(self) -> list[Message]:
        """What has come or changed since the last call, in order."""
        if not self.folder.is_dir():
            return []
        before, self.seen = self.seen, {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.json")}
        names = sorted(name for name, changed in self.seen.items() if before.get(name) != changed)
        return [Message(**json.loads((self.folder / name).read_text())) for name in names]
