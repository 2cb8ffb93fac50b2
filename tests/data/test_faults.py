"""Everything that can be wrong with shards: named in one line, or skipped by name with the rest seen exactly once."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig, StreamConfig
from data.datasets import ImageDataset
from data.latent_dataset import LatentDataset
from data.latents import encode_npy
from data.loader import batches
from data.manifest import Manifest
from data.shards import ShardWriter

SHARDS, SHARD = 4, 5
Files = dict[str, bytes]


def picture_files(i: int) -> Files:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"png": buffer.getvalue(), "txt": b"noise", "json": json.dumps({"width": 8}).encode()}


def latent_files(i: int) -> Files:
    moments = np.full((1, 8, 4, 4), i, np.float16)
    return {"moments.npy": encode_npy(moments), "tokens.npy": encode_npy(np.arange(3, dtype=np.int32)), "txt": b"noise"}


def write(folder: Path, kind: str, change: Callable[[int, Files], Files] = lambda i, files: files) -> None:
    """20 samples in 4 shards, each changed before it is written."""
    make = picture_files if kind == "images" else latent_files
    with ShardWriter(folder, SHARD) as writer:
        for i in range(SHARDS * SHARD):
            writer.add(f"{i:04d}", change(i, make(i)))
    Manifest(kind=kind, shards=writer.finished).save(folder)


def open_stream(folder: Path, kind: str, **stream: Any) -> Any:
    if kind == "images":
        return ImageDataset(folder, ImageConfig(resolution=8), 0, StreamConfig(**stream))
    return LatentDataset(folder, 0, StreamConfig(**stream))


def epochs(folder: Path, kind: str, count: int, **stream: Any) -> list[Any]:
    dataset = open_stream(folder, kind, **stream)
    return list(itertools.islice(batches(dataset, SHARDS * SHARD, SHARDS * SHARD, 0, 1, 0, 0), count))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


SHARD_FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1300]),
    "no bytes": lambda path: path.write_bytes(b""),
    "no samples": lambda path: path.write_bytes(bytes(10240)),
    "flipped byte of a tar header": lambda path: flip(path, 100),
    "flipped byte of the data": lambda path: flip(path, 512 + 200),
}


@pytest.mark.parametrize("kind", ["images", "latents"])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_broken_shard_is_named_or_left_out_whole(tmp_path: Path, kind: str, number: int, fault: str) -> None:
    write(tmp_path, kind)
    name = f"0000{number}.tar"
    SHARD_FAULTS[fault](tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} .*") as raised:
        epochs(tmp_path, kind, 1, verify=True)
    assert "\n" not in str(raised.value)
    found = epochs(tmp_path, kind, 2, verify=True, skip_broken=True)
    lost = {f"{i:04d}" for i in range(number * SHARD, (number + 1) * SHARD)}
    for batch in found:
        assert Counter(batch["key"]) == Counter({f"{i:04d}" for i in range(SHARDS * SHARD)} - lost)
        assert len(batch["skipped"]) == SHARD and all(name in text for text in batch["skipped"])


def replaced(name: str, content: bytes | None) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        others = {extension: value for extension, value in files.items() if extension != name}
        return others if content is None else {**others, name: content}

    return change


SAMPLE_FAULTS: dict[str, tuple[str, Callable[[Files], Files], str]] = {
    "no caption": ("images", replaced("txt", None), r"has no \.txt"),
    "no picture": ("images", replaced("png", None), r"has no \.png"),
    "not a picture": ("images", replaced("png", b"text"), "not a readable picture"),
    "half a picture": ("images", lambda files: {**files, "png": files["png"][:150]}, "broken picture"),
    "JSON that does not parse": ("images", replaced("json", b"{"), "Expecting property name"),
    "JSON that is no object": ("images", replaced("json", b"[1]"), r"\.json holds no object"),
    "JSON without end": ("images", replaced("json", b"[" * 100_000), "nested too deeply"),
    "a caption in latin-1": ("images", replaced("txt", b"caf\xe9"), r"its \.txt is not UTF-8"),
    "a caption of latents in latin-1": ("latents", replaced("txt", b"caf\xe9"), r"its \.txt is not UTF-8"),
    "no tokens": ("latents", replaced("tokens.npy", None), r"has no \.tokens\.npy"),
    "other dtype": ("latents", replaced("moments.npy", encode_npy(np.zeros((1, 8, 4, 4), np.float32))), "float32"),
    "other shape": ("latents", replaced("moments.npy", encode_npy(np.zeros((1, 8, 4, 5), np.float16))), r"4, 5\]"),
    "not a latent": ("latents", replaced("moments.npy", encode_npy(np.zeros(3, np.float16))), r"\[3\]"),
    "no array": ("latents", replaced("moments.npy", b"text"), "header"),
    "half an array": ("latents", lambda files: {**files, "moments.npy": files["moments.npy"][:200]}, "bytes of data"),
}


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
@pytest.mark.parametrize("broken", [1, 12])
def test_a_broken_sample_is_named_or_left_out_alone(tmp_path: Path, fault: str, broken: int) -> None:
    kind, change, reason = SAMPLE_FAULTS[fault]
    write(tmp_path, kind, lambda i, files: change(files) if i == broken else files)
    with pytest.raises(UserError, match=rf"sample '{broken:04d}'.*{reason}") as raised:
        epochs(tmp_path, kind, 1)
    assert "\n" not in str(raised.value)
    for batch in epochs(tmp_path, kind, 2, skip_broken=True):
        assert Counter(batch["key"]) == Counter(f"{i:04d}" for i in range(SHARDS * SHARD) if i != broken)
        (text,) = batch["skipped"]
        assert f"0000{broken // SHARD}.tar" in text and f"'{broken:04d}'" in text


@pytest.mark.parametrize("fault", ["not a latent", "no array", "no tokens"])
def test_the_first_record_may_be_the_broken_one(tmp_path: Path, fault: str) -> None:
    kind, change, reason = SAMPLE_FAULTS[fault]
    write(tmp_path, kind, lambda i, files: change(files) if i == 0 else files)
    with pytest.raises(UserError, match=rf"sample '0000'.*{reason}"):
        open_stream(tmp_path, kind)
    (batch,) = epochs(tmp_path, kind, 1, skip_broken=True)
    assert len(batch["key"]) == SHARDS * SHARD - 1


def test_nothing_readable_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "latents", lambda i, files: {**files, "moments.npy": b"text"})
    with pytest.raises(UserError, match=r"sample '0000': .*header"):
        open_stream(tmp_path, "latents", skip_broken=True)


def test_foreign_shards_without_sides_give_the_last_ones_to_the_held_out_side(tmp_path: Path) -> None:
    write(tmp_path, "images")
    (tmp_path / "manifest.json").unlink()
    train, heldout = (open_stream(tmp_path / side, "images") for side in ("train", "heldout"))
    assert (train.samples, heldout.samples) == (15, 5)
    assert {heldout.at(i)["key"] for i in range(5)} == {f"{i:04d}" for i in range(15, 20)}
    for number in (1, 2, 3):
        (tmp_path / f"0000{number}.tar").unlink()
    with pytest.raises(UserError, match=r"a single shard, none is left to hold out: run data/build_shards\.py"):
        open_stream(tmp_path / "train", "images")


def test_a_build_without_held_out_samples_says_which_option(tmp_path: Path) -> None:
    write(tmp_path / "train", "images")
    Manifest(kind="images", shards=[]).save(tmp_path / "heldout")
    with pytest.raises(UserError, match="heldout' holds no samples: build the shards with heldout_fraction above 0"):
        open_stream(tmp_path / "heldout", "images")
