"""A browser, and a run folder as a training leaves it, made in a moment, with texts that try to be more than text."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.schema import ImageFormat
from data.images import encode_image
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'> ' \" }} {% raw %} </script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOMENTS = (100, 200, 300, 400, 500)  # samples seen at the evaluations


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = "no browser here: apt-get install chromium"
        if os.environ.get("LATENTLINE_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"time": 1e9 + row["samples_seen"], **row}) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def image(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def training(folder: Path, name: str, extra: dict[str, float]) -> None:
    """Forty log lines and a configuration."""
    shared = {"train/lr": 1e-3, "train/grad_norm": 1.0, "perf/images_per_s": 50.0, "perf/memory_gib": 1.5}
    write_rows(
        folder / name,
        [
            {"samples_seen": seen, "train/loss": 10 / seen, "perf/device_hours": seen / 1000} | shared | extra
            for seen in range(10, 501, 10)
        ],
    )
    hardware = {"device": "NVIDIA H100 80GB HBM3", "processes": 8, "hosts": 1, "torch": "2.14"}
    config = {
        "loop": {"samples": 500},
        "hardware": hardware,
        "note": EVIL,
        "shards": "https://user:pass@host/a?sig=xyz",
    }
    (folder / name / "config.yaml").write_text(json.dumps(config))  # JSON is YAML


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoder, U-Net (not finished), evaluation, data, images."""
    folder = tmp_path_factory.mktemp("board") / "run"
    training(folder, "autoencoder", {"eval/psnr": 20.0})
    training(folder, "unet", {f"train/loss_by_timestep/{quarter}": float(quarter) for quarter in (1, 2, 3, 4)})
    judged = [
        {"samples_seen": seen, "eval/fid": 9000 / seen, "eval/fid_low": 8000 / seen, "eval/fid_high": 10000 / seen}
        for seen in (500, 400, 100, 200, 300)  # an evaluation that watches takes the newest first
    ]
    write_rows(folder / "evaluation", judged)
    (folder / "evaluation" / "protocol.json").write_text(
        json.dumps({"samples": 50_000, "extractors": {"fid": {"sha256": "f" * 64}}, "negative_prompt": EVIL})
    )
    for number, seen in enumerate(MOMENTS):
        save(image(number), folder / f"unet/samples/prompts-{seen:012d}.png")
        save(image(number, 300), folder / f"unet/samples/film-{seen:012d}.png")
        save(image(number), folder / f"autoencoder/samples/reconstructions-{seen:012d}.png")
    (folder / "unet/samples/prompts-000000000600.png").write_bytes(b"half a pict")
    save(image(7), folder / "sweep/evaluate/pareto/pareto.png")
    for side, count in (("train", 30), ("heldout", 4)):
        with ShardWriter(folder / "shards" / side, 100) as writer:
            for i in range(count):
                png = encode_image(image(i), ImageFormat.png, 0)
                writer.add(f"{i:05d}", {"png": png, "txt": f"{EVIL} {'x' * i}".encode()})
        Manifest(kind="images", shards=writer.finished, provenance={"source": EVIL}).save(folder / "shards" / side)
    (folder / "shards/rejects.jsonl").write_text(json.dumps({"key": "9", "reason": EVIL}) + "\n")
    (folder / ".stages").mkdir()
    (folder / ".stages/unet.json").write_text(json.dumps({"outcome": "", "seconds": 125.0}))
    return folder
