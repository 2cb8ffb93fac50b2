"""Streams that are not the plain one: windows, mixes, and data of which a part is broken."""

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import CacheDtype, Crop, ImageConfig, StreamConfig
from data.image_dataset import ImageDataset
from data.labels import UNLABELLED, encode_map
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.loader import batches
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from data.streams import Mixed, image_stream, latent_stream

IMAGES = ImageConfig(resolution=8, crop=Crop.random, flip=True)


def encoded_noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(8, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, samples: int, kind: str, shard_samples: int = 5) -> Path:
    with ShardWriter(folder / "train", shard_samples) as writer:
        for i in range(samples):
            writer.add(f"{kind}{i:04d}", {"png": encoded_noise(i), "txt": b"x"})
    Manifest(kind="images", shards=writer.finished).save(folder / "train")
    return folder


def write_latents(folder: Path, samples: int, size: int = 2) -> Path:
    with LatentWriter(folder / "train", 5, CacheDtype.fp16) as writer:
        for i in range(samples):
            writer.add(f"{folder.name}{i:04d}", np.full((1, 4, size, size), i), np.arange(3), "x", {})
    Manifest(kind="latents", shards=writer.close()).save(folder / "train")
    return folder


def keys(dataset: Any, start: int, stop: int, world: int = 1) -> list[str]:
    """Keys of all ranks in the order of their positions, and the positions are in order."""
    found: list[tuple[int, str]] = []
    for rank in range(world):
        for batch in batches(dataset, 4, 4 // world, rank, world, start, 0, stop):
            found += zip(batch["position"].tolist(), batch["key"], strict=True)
    return [key for _, key in sorted(found)]


def test_a_window_gives_every_sample_once_for_any_world(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 24, "a")
    dataset = ImageDataset(folder / "train", IMAGES, 3, StreamConfig(window=2))
    stream = keys(dataset, 0, 48)
    assert Counter(stream[:24]) == Counter(stream[24:]) == Counter(f"a{i:04d}" for i in range(24))
    assert stream != keys(ImageDataset(folder / "train", IMAGES, 3), 0, 48)
    assert keys(dataset, 0, 48, world=2) == keys(dataset, 0, 48, world=4) == stream
    assert keys(dataset, 12, 48) == stream[12:]


def test_a_mix_keeps_its_shares_for_any_world_and_from_any_position(tmp_path: Path) -> None:
    first, second = write_images(tmp_path / "a", 20, "a"), write_images(tmp_path / "b", 10, "b")
    mixed = image_stream(str(first), IMAGES, 3, StreamConfig(mix={str(second): 0.5}), 24)
    stream = keys(mixed, 0, 4096)
    counts = Counter(key[0] for key in stream)
    assert counts["b"] == pytest.approx(4096 / 3, abs=1)
    for kind, size in (("a", 20), ("b", 10)):  # each data set in whole epochs of its own
        own = [key for key in stream if key[0] == kind]
        seen = Counter(own)
        assert len(seen) == size and max(seen.values()) - min(seen.values()) <= 1
    assert keys(mixed, 0, 64, world=2) == stream[:64]
    assert keys(mixed, 400, 464) == stream[400:464]


def test_a_mix_draws_by_the_position_in_the_common_stream(tmp_path: Path) -> None:
    first, second = write_latents(tmp_path / "a", 20), write_latents(tmp_path / "b", 10)
    mixed, manifests = latent_stream(str(first), 0, StreamConfig(mix={str(second): 1.0}), 64)
    batch = mixed.batch(range(16))
    assert batch["position"].tolist() == list(range(16)) and len(manifests) == 2
    assert {key[0] for key in batch["key"]} == {"a", "b"}
    for key, moments in zip(batch["key"], batch["moments"], strict=True):
        assert torch.equal(moments, torch.full((4, 2, 2), float(key[1:]), dtype=torch.float16))


def test_a_mix_is_another_data_set_to_a_resumed_run(tmp_path: Path) -> None:
    first, second = write_images(tmp_path / "a", 20, "a"), write_images(tmp_path / "b", 10, "b")
    alone = ImageDataset(first / "train", IMAGES, 3)
    digests = {Mixed([alone, ImageDataset(second / "train", IMAGES, 3)], [1, w], 0).digest for w in (0.5, 1.0)}
    assert len({alone.digest, *digests}) == 3


def test_what_is_wrong_in_a_mix_names_the_mix(tmp_path: Path) -> None:
    first, nowhere = write_latents(tmp_path / "a", 6), {str(tmp_path / "nowhere"): 1.0}
    with pytest.raises(
        UserError, match=r"^stream\.mix: no latents at '.*nowhere/train': name a folder that holds train/"
    ):
        latent_stream(str(first), 0, StreamConfig(mix=nowhere), 64)
    with pytest.raises(UserError, match=r"^no latents at '.*nowhere/train': run data/precompute_latents\.py or set"):
        latent_stream(*nowhere, 0, StreamConfig(), 64)


def test_latents_of_other_shapes_do_not_mix(tmp_path: Path) -> None:
    first, second = write_latents(tmp_path / "a", 6), write_latents(tmp_path / "b", 6, size=4)
    with pytest.raises(UserError, match=r"^stream\.mix: latents in '.*b' have other arrays .*\[1, 4, 4, 4\]"):
        latent_stream(str(first), 0, StreamConfig(mix={str(second): 1.0}), 64)


def test_a_cache_of_a_part_of_the_images_is_not_trained_on(tmp_path: Path) -> None:
    first, second = write_latents(tmp_path / "a", 6), write_latents(tmp_path / "b", 6)
    manifest = Manifest.load(second / "train")
    manifest.provenance["train_shards"] = 2
    manifest.save(second / "train")
    remedy = r"has latents of a part of the images .*train_shards=2\), for train_unet\.py encode=true: set that, or"
    with pytest.raises(UserError, match=rf"^latents=.*/b: {remedy}"):
        latent_stream(str(second), 0, StreamConfig(), 64)
    with pytest.raises(UserError, match=rf"^stream\.mix: '.*/b': {remedy}"):
        latent_stream(str(first), 0, StreamConfig(mix={str(second): 1.0}), 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_left_out_and_named_and_the_rest_comes_once(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "train"
    with ShardWriter(folder, 5) as writer:
        for i in range(24):
            writer.add(f"{i:04d}", {"png": b"no" if i in (7, 13) else encoded_noise(i), "txt": b"x"})
    Manifest(kind="images", shards=writer.finished).save(folder)
    (folder / "00003.tar").write_bytes((folder / "00003.tar").read_bytes()[:700] + bytes(9000))
    manifest = Manifest.load(folder)
    manifest.shards[3].bytes = 9700
    manifest.save(folder)
    dataset = ImageDataset(folder, IMAGES, 3, StreamConfig(skip_broken=True))
    found = list(itertools.islice(batches(dataset, 24, 24, 0, 1, 0, workers), 2))
    for batch in found:
        lost = {7, 13, *range(15, 20)}
        assert sorted(batch["key"]) == [f"{i:04d}" for i in range(24) if i not in lost]
        assert len(batch["position"]) == len(batch["pixels"]) == 24 - len(lost)
        assert len(batch["skipped"]) == len(lost)
        assert sum("sample '0007': not a readable image" in text for text in batch["skipped"]) == 1
        assert sum("00003.tar" in text for text in batch["skipped"]) == 5
    with pytest.raises(UserError):
        list(itertools.islice(batches(ImageDataset(folder, IMAGES, 3), 24, 24, 0, 1, 0, workers), 1))


def test_broken_latents_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_latents(tmp_path, 12) / "train"
    content = bytearray((folder / "00001.tar").read_bytes())
    content[content.index(b"\x93NUMPY")] = 0
    (folder / "00001.tar").write_bytes(content)
    batch = LatentDataset(folder, 0, StreamConfig(skip_broken=True)).batch(range(12))
    assert len(batch["key"]) == 11 and len(batch["moments"]) == 11 and len(batch["tokens"]) == 11
    assert ["readable header" in text for text in batch["skipped"]] == [True]
    for key, moments in zip(batch["key"], batch["moments"], strict=True):
        assert float(moments[0, 0, 0]) == float(key.removeprefix(tmp_path.name))


def test_a_micro_batch_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 5) as writer:
        for i in range(3):
            writer.add(f"{i:04d}", {"png": b"no", "txt": b"x"})
    dataset = ImageDataset(tmp_path, IMAGES, 3, StreamConfig(skip_broken=True))
    with pytest.raises(UserError, match=r"none of the 2 samples of a micro-batch can be read; the first: .*'000"):
        dataset.batch([0, 1])


# --- labels


def write_labelled(folder: Path, provenance: dict[str, Any]) -> None:
    """Grey noise whose map says the grey of each pixel, and a box around its left half."""
    with ShardWriter(folder, 5) as writer:
        for i in range(5):
            grey = np.random.default_rng(i).integers(UNLABELLED, size=(8, 12), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(grey).save(buffer, "PNG")
            meta = {"class_id": i, "boxes": [{"box": [0, 0, 0.5, 1], "class_id": 0}]}
            files = {"png": buffer.getvalue(), "txt": b"x", "json": json.dumps(meta).encode()}
            writer.add(str(i), {**files, "seg.png": encode_map(grey)})
    Manifest(kind="images", shards=writer.finished, provenance=provenance).save(folder)


def test_labels_are_cut_and_mirrored_with_their_image(tmp_path: Path) -> None:
    write_labelled(tmp_path, {})
    dataset = ImageDataset(tmp_path, IMAGES, 0, labels=True)
    items = [dataset.item(position) for position in range(15)]
    shown = [(item["pixels"], item["labels"]) for item in items]
    for index in range(5):
        found = dataset.variants(index, 3)
        shown += zip(found["pixels"], found["labels"], strict=True)
    for image, labels in shown:
        assert np.array_equal(image[0], labels.segments)
        assert len(labels.boxes) == 1 and 0 in labels.boxes[0].corners and 1 in labels.boxes[0].corners
    assert len({labels.boxes[0].corners for _, labels in shown}) > 4
    assert [labels.class_id for labels in dataset.batch_at(range(5))["labels"]] == [0, 1, 2, 3, 4]
    assert "labels" not in ImageDataset(tmp_path, IMAGES, 0).item(0)


def test_a_class_that_the_manifest_does_not_have_is_named_with_its_sample(tmp_path: Path) -> None:
    names = {"classes": ["a", "b"], "box_classes": ["c"], "segments": [""] * UNLABELLED}
    write_labelled(tmp_path, {"labels": names})
    dataset = ImageDataset(tmp_path, IMAGES, 0, labels=True)
    assert dataset.at(1)["labels"].class_id == 1
    with pytest.raises(
        UserError, match=r"00000.tar: sample '2': class_id: 2 is out of range, the data set has 2 classes"
    ):
        dataset.at(2)
