"""Many processes encode one data set while they are killed at random; the cache is that of one left in peace."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose
from conf.schema import AutoencoderRun, ClipRun, ImageFormat
from data.images import encode_image
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from models.autoencoder import Autoencoder
from models.clip import Clip

ROOT = Path(__file__).parents[2]
SHARDS, SAMPLES = 40, 12


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of noise and two towers that know nothing."""
    folder = tmp_path_factory.mktemp("precompute")
    for side, shards in (("train", SHARDS), ("heldout", 2)):
        with ShardWriter(folder / "shards" / side, SAMPLES) as writer:
            for i in range(shards * SAMPLES):
                pixels = np.random.default_rng(i).integers(256, size=(32, 40, 3), dtype=np.uint8)
                image = encode_image(Image.fromarray(pixels), ImageFormat.png, 95)
                writer.add(f"{side}{i:05d}", {"png": image, "txt": f"noise {i % 7}".encode()})
        Manifest(kind="images", shards=writer.finished).save(folder / "shards" / side)
    Autoencoder(compose("train_autoencoder", AutoencoderRun, ["experiment=smoke"]).model).save_pretrained(
        folder / "autoencoder"
    )
    Clip.from_config(compose("train_clip", ClipRun, ["experiment=smoke"]).model).save_pretrained(folder / "clip")
    return folder


def precompute(project: Path, output: Path, kills: int) -> str:
    overrides = [
        "experiment=smoke",
        f"shards={project / 'shards'}",
        f"autoencoder={project / 'autoencoder'}",
        f"clip={project / 'clip'}",
        f"output_dir={output}",
        "min_psnr=1",
        "batch_size=5",
        "wandb.mode=disabled",
        "runtime=cpu",
    ]
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("precompute_workers.py")), str(kills), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent.name in ("train", "heldout"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_killed_workers_leave_the_cache_of_undisturbed_ones(project: Path, tmp_path: Path) -> None:
    precompute(project, tmp_path / "peace", kills=0)
    said = precompute(project, tmp_path / "chaos", kills=12)
    assert int(said.split()[-1]) >= 8, said  # on a fast machine the cache is finished before the last of them
    peace, chaos = files(tmp_path / "peace"), files(tmp_path / "chaos")
    assert len([name for name in peace if name.endswith(".tar")]) == SHARDS + 2
    assert chaos == peace
