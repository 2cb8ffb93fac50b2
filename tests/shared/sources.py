"""What tests of sources share."""

from pathlib import Path
from typing import Any

from PIL import Image

from conf.schema import BuildRun, Source
from data.building.sources import Rejected


def config(source: Source, **options: Any) -> BuildRun:
    return BuildRun(run_dir="unused", output_dir="unused", source=source, **options)


def image(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, path.suffix[1:].replace("JPG", "jpeg").replace("jpg", "jpeg"))


def outcome(source: Any, index: int) -> str:
    try:
        return str(source.sample(index).caption)
    except Rejected as error:
        return f"rejected: {error}"
