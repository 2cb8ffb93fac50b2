"""Bad input of any kind: one line that names what to change, an exit code, and nothing written half.

Whole commands where the shell's side of it counts (exit code, stderr, limits of the system); the stages' own code in
this process for the rest.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import AutoencoderRun, BuildRun, Device, RuntimeConfig
from data.building.build import build_shards
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from train.engine import trainer
from train.engine.runtime import start
from train.training.autoencoder import AutoencoderStage

ROOT = Path(__file__).parents[2]
BATCH = 16


def command(script: str, *arguments: str, file_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an entry script; `file_bytes`: no file may grow beyond that, as on a disk that fills up."""
    limit = ["sh", "-c", f'ulimit -f {file_bytes // 512} && exec "$@"', "sh"] if file_bytes else []
    environment = {k: v for k, v in os.environ.items() if k != "LATENTLINE_TRACEBACK"}
    return subprocess.run(
        [*limit, sys.executable, str(ROOT / script), *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def the_line(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a command that was refused."""
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def image(color: str = "red", side: int = 32) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), color).save(content, "PNG")
    return content.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def shards(folder: Path, samples: int = BATCH, **changed: dict[str, bytes] | None) -> Path:
    """Foreign shards, without a manifest; `changed`: sample k3={"png": …} has these files instead."""
    for side in ("train", "heldout"):
        with ShardWriter(folder / side, 100) as writer:
            for number in range(samples):
                files = {"png": image(), "txt": b"a red square"}
                given = changed.get(f"k{number}") if side == "train" else None
                writer.add(f"{number:09d}", given or files)
    return folder


def config(folder: Path, *overrides: str) -> AutoencoderRun:
    given = ["experiment=smoke", f"run_dir={folder}", "runtime=cpu", "wandb.mode=disabled", "loss.perceptual=none"]
    return compose("train_autoencoder", AutoencoderRun, [*given, "loop.samples=32", *overrides])


def train(folder: Path, *overrides: str) -> None:
    cfg, runtime = config(folder, *overrides), start(RuntimeConfig(device=Device.cpu))
    trainer.fit(AutoencoderStage(cfg, runtime), cfg, runtime)


def refused(folder: Path, message: str, *overrides: str) -> None:
    """The training ends in one line, and leaves nothing that looks like a result."""
    with pytest.raises(UserError, match=message) as error:
        train(folder, *overrides)
    assert "\n" not in str(error.value)
    left = files_below(folder / "autoencoder") if (folder / "autoencoder").exists() else set()
    assert left <= {"config.yaml", "metrics.jsonl"}


def test_no_shards_at_the_path(tmp_path: Path) -> None:
    line = the_line(command("train/train_clip.py", "experiment=smoke", f"run_dir={tmp_path}/run", "runtime=cpu"))
    assert line == f"no shards at '{tmp_path}/run/shards/train': run data/build_shards.py or set shards=FOLDER"
    assert not (tmp_path / "run").exists()


def test_shard_without_captions(tmp_path: Path) -> None:
    shards(tmp_path / "shards", k3={"png": image()})
    lack = r"has no \.txt/\.json: it has \.png: run data/build_shards\.py or set"
    refused(tmp_path, rf"^shard .*train/00000\.tar: sample '000000003' {lack}")


def test_image_bomb_in_a_shard(tmp_path: Path) -> None:
    shards(tmp_path / "shards", k3={"png": bomb(), "txt": b"a bomb"})
    refused(
        tmp_path,
        r"^shard .*train/00000\.tar: sample '000000003': 100000 x 100000 pixels are more than max_pixels=64000000: ",
    )


def test_image_bomb_in_a_folder_is_listed_and_left_out(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(image())
        (photos / f"{name}.txt").write_text(f"square {name}")
    (photos / "bomb.png").write_bytes(bomb())
    (photos / "bomb.txt").write_text("a bomb")
    options = ["source=folder", f"path={photos}", f"run_dir={tmp_path}", "workers=1"]
    built = build_shards(compose("build_shards", BuildRun, options))
    assert (built.train.samples + built.heldout.samples, built.rejected) == (2, 1)
    (reject,) = map(json.loads, (tmp_path / "shards" / "rejects.jsonl").read_text().splitlines())
    assert "bomb.png" in reject["path"] and "max_pixels=64000000" in reject["reason"]


@pytest.mark.parametrize("damage", ["cut off", "not a tar", "empty"])
def test_unreadable_tar(tmp_path: Path, damage: str) -> None:
    tar = shards(tmp_path / "shards") / "train" / "00000.tar"
    content = tar.read_bytes()
    tar.write_bytes({"cut off": content[:5000], "not a tar": b"<html>" * 1000, "empty": b""}[damage])
    refused(tmp_path, rf"^shard {tar} is not a readable tar \(truncated\?\): rebuild it or delete it$")


def test_tar_that_is_not_what_its_manifest_says(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards") / "train"
    with ShardWriter(tmp_path / "other", 100) as writer:
        writer.add("0", {"png": image(), "txt": b"a red square"})
    Manifest(kind="images", shards=writer.finished).save(folder)
    refused(tmp_path, r"^shard .*00000\.tar has \d+ bytes, not \d+ as manifest\.json says: rebuild it")


def test_data_set_smaller_than_one_global_batch(tmp_path: Path) -> None:
    shards(tmp_path / "shards", samples=BATCH - 1)
    refused(
        tmp_path, r"^the data set has 15 samples, fewer than batch\.global_batch_size=16: lower batch\.global_batch"
    )


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    train(tmp_path)
    before = {name: (tmp_path / "autoencoder" / name).read_bytes() for name in files_below(tmp_path / "autoencoder")}
    for samples in (32, 64):  # finished, and about to continue
        with pytest.raises(
            UserError, match=r"^output_dir='.*/autoencoder' holds a run that began differently \(model\."
        ):
            train(tmp_path, "model.layers_per_block=2", f"loop.samples={samples}")
    with pytest.raises(
        UserError, match=r"the data set was .*: set another run_dir or output_dir, or delete that folder$"
    ):
        train(tmp_path, f"shards={shards(tmp_path / 'others', samples=17)}", "loop.samples=64")
    after = {name: (tmp_path / "autoencoder" / name).read_bytes() for name in files_below(tmp_path / "autoencoder")}
    assert after == before


def test_full_disk_while_shards_are_built(tmp_path: Path) -> None:
    options = ["source=demo", "samples=200", "resolution=64", "workers=1", f"run_dir={tmp_path}/run"]
    line = the_line(command("data/build_shards.py", *options, file_bytes=100_000))
    assert line.startswith("File too large") and "raise it" in line
    assert all(name.startswith("run/shards/.building/") for name in files_below(tmp_path))
    assert command("data/build_shards.py", *options).returncode == 0
    assert not any(".building" in name for name in files_below(tmp_path))


def test_full_disk_at_a_checkpoint_keeps_what_was_complete(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    train(tmp_path, "loop.samples=16", "loop.checkpoint_every=16")
    (tmp_path / "autoencoder" / "DONE").unlink()
    kept = {
        name: (tmp_path / "autoencoder" / name).read_bytes()
        for name in files_below(tmp_path / "autoencoder")
        if name.startswith(("checkpoints", "export"))
    }
    options = ["experiment=smoke", f"run_dir={tmp_path}", "runtime=cpu", "loss.perceptual=none", "loop.samples=48"]
    line = the_line(command("train/train_autoencoder.py", *options, file_bytes=20_000))
    assert line.startswith("File too large") and "checkpoints" in line
    assert not (tmp_path / "autoencoder" / "DONE").exists()
    left = files_below(tmp_path / "autoencoder") - {"config.yaml", "metrics.jsonl", *kept}
    assert {name for name in left if not name.startswith("samples/")} == set()
    assert all((tmp_path / "autoencoder" / name).read_bytes() == content for name, content in kept.items())
    train(tmp_path, "loop.samples=48")  # with room again it goes on
    assert json.loads((tmp_path / "autoencoder" / "DONE").read_text())["samples_seen"] == 48


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a folder should be: unlike missing permissions it stops even root."""
    (tmp_path / "file").write_text("in the way")
    given = ["experiment=smoke", f"run_dir={tmp_path}/file/run"]
    for script in ("data/build_shards.py", "train/pipeline.py"):
        line = the_line(command(script, *given))
        assert line.startswith(f"Not a directory '{tmp_path}/file/run") and "set run_dir=" in line
    with pytest.raises(NotADirectoryError):
        train(tmp_path, f"shards={shards(tmp_path / 'shards')}", f"output_dir={tmp_path}/file/run")
    assert {name for name in files_below(tmp_path) if not name.startswith("shards/")} == {"file"}


def test_processes_that_do_not_divide_the_batch(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    given = ["experiment=smoke", f"run_dir={tmp_path}", "stages=[autoencoder]", "processes=3", "runtime=cpu"]
    line = the_line(command("train/pipeline.py", *given, "loss.perceptual=none"))
    assert line == (
        "stage autoencoder: batch.global_batch_size=16: must be a multiple of 3 (3 processes); set 15 or 18, "
        "or batch.uneven=true (not for CLIP)"
    )
    assert not (tmp_path / "autoencoder").exists() and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("train_unet", [], r"no latents at '.*/latents/train': run data/precompute_latents\.py or set latents=FOLDER"),
        ("precompute_latents", [], r"autoencoder/export/config\.json is missing"),
        ("sample", [], r"no latentline\.json in '.*/unet/export': train the U-Net first"),
        ("evaluate", [], r"unet=.*/unet/export: no DONE beside it"),
    ],
)
def test_stage_before_its_turn_says_what_is_missing(
    tmp_path: Path, script: str, overrides: list[str], message: str
) -> None:
    from conf.entry import to_plain
    from train.evaluation import run as evaluate
    from train.latents import precompute as latents
    from train.sampling import run as sampling
    from train.stages.tasks import STAGES
    from train.training.unet import UNetStage

    shards(tmp_path / "shards")
    runtime = start(RuntimeConfig(device=Device.cpu))
    schema = next(stage.schema for stage in STAGES if stage.script.stem == script)
    cfg: Any = compose(script, schema, ["experiment=smoke", f"run_dir={tmp_path}", "runtime=cpu", *overrides])
    runs = {
        "train_unet": lambda: UNetStage(cfg, runtime),
        "precompute_latents": lambda: latents.run_precompute(cfg, runtime, to_plain(cfg)),
        "sample": lambda: sampling.sample(cfg, runtime),
        "evaluate": lambda: evaluate.evaluate_run(cfg, runtime),
    }
    with pytest.raises(UserError, match=message):
        runs[script]()
    assert {path.name for path in tmp_path.iterdir()} == {"shards"}
