"""The loader: one stream for every number of ranks, workers and micro-batches, resumable at any position."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from conf.errors import UserError
from conf.schema import CacheDtype, Crop, ImageConfig, StreamConfig
from data.image_dataset import ImageDataset
from data.images import in_range
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.loader import batches, sequential
from data.order import FullOrder, sample_at
from data.shards import store as record_store
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = 22
IMAGES = ImageConfig(resolution=8, crop=Crop.random, flip=True)
RANDOM = np.random.default_rng(0)
MOMENTS = RANDOM.normal(size=(SAMPLES, 3, 4, 2, 2)).astype(np.float16).astype(np.float32)
TEXT = RANDOM.normal(size=(SAMPLES, 5, 6)).astype(np.float16).astype(np.float32)


def image(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(256, size=(8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path) -> Path:
    with ShardWriter(folder, 5) as writer:
        for i in range(SAMPLES):
            writer.add(f"{i:09d}", {"png": image(i), "txt": f"caption {i}".encode(), "json": b'{"kind": "noise"}'})
    Manifest(kind="images", shards=writer.finished).save(folder)
    return folder


def write_latents(
    folder: Path, dtype: CacheDtype = CacheDtype.fp16, text: bool = True, variants: int = 3, repeat: int = 1
) -> Path:
    with LatentWriter(folder, 5 * repeat, dtype) as writer:
        for number in range(SAMPLES * repeat):
            i = number % SAMPLES
            tokens, states = np.full(5, i), TEXT[i] if text else None
            writer.add(f"{number:09d}", MOMENTS[i, :variants], tokens, f"caption {i}", {}, states)
    Manifest(kind="latents", shards=writer.close()).save(folder)
    return folder


ORDERS = {
    "images": StreamConfig(),
    "latents": StreamConfig(),
    "images in lanes": StreamConfig(lanes=4, window=1),
    "latents in lanes": StreamConfig(lanes=2, window=2),
    "latents in windows": StreamConfig(window=2),
}


@pytest.fixture(scope="module", params=ORDERS)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, order = tmp_path_factory.mktemp("data"), ORDERS[request.param]
    if request.param.startswith("images"):
        return ImageDataset(write_images(folder), IMAGES, 3, order, batch=4)
    return LatentDataset(write_latents(folder), 3, order, batch=4)


def contents(batch: dict[str, Any]) -> Iterator[tuple]:
    """Each sample of a batch as a comparable value."""
    for i in range(len(batch["key"])):
        yield tuple((n, v[i].numpy().tobytes() if torch.is_tensor(v) else str(v[i])) for n, v in sorted(batch.items()))


def stream(dataset: Any, start: int, stop: int, world: int = 1, micro: int = 4, workers: int = 0) -> list[tuple]:
    """The samples of all ranks, step by step, in the order of their positions."""
    share = 4 // world
    micro = min(micro, share)
    ranks = [batches(dataset, 4, micro, rank, world, start, workers, stop) for rank in range(world)]
    samples = []
    while True:
        step = [batch for rank in ranks for batch in itertools.islice(rank, share // micro)]
        if not step:
            return samples
        samples += [sample for batch in step for sample in contents(batch)]


@pytest.mark.parametrize("world, micro, workers", [(1, 1, 0), (1, 2, 2), (2, 2, 0), (2, 1, 1), (4, 1, 0)])
def test_same_stream_for_any_world_workers_and_micro_batch(dataset: Any, world: int, micro: int, workers: int) -> None:
    expected = stream(dataset, 0, 24)
    assert len(expected) == 24
    assert stream(dataset, 0, 24, world, micro, workers) == expected


@pytest.mark.parametrize("start", [0, 4, 20, 44, 101])
def test_resume_at_any_position_equals_uninterrupted(dataset: Any, start: int) -> None:
    one_by_one = [sample for position in range(start, start + 8) for sample in contents(dataset.batch([position]))]
    assert stream(dataset, start, start + 8) == one_by_one
    assert stream(dataset, start - start % 4, start + 8)[start % 4 :][:8] == one_by_one


def test_every_sample_once_per_epoch(dataset: Any) -> None:
    keys = [key for batch in batches(dataset, 2, 2, 0, 1, 0, 0, stop=3 * SAMPLES) for key in batch["key"]]
    for epoch in range(3):
        assert len(set(keys[epoch * SAMPLES : (epoch + 1) * SAMPLES])) == SAMPLES
    assert set(Counter(keys).values()) == {3}


def test_items_batches_and_pickles_agree(dataset: Any) -> None:
    items = [dataset.item(position) for position in (5, 6)]
    assert [item["position"] for item in items] == [5, 6]
    assert list(contents(dataset.collate(items))) == list(contents(dataset.batch([5, 6])))
    copy = pickle.loads(pickle.dumps(dataset))
    assert list(contents(copy.batch([5, 6]))) == list(contents(dataset.batch([5, 6])))
    assert items[0]["key"] == f"{dataset.order(5):09d}"
    if isinstance(dataset.order, FullOrder):
        assert dataset.order(5) == sample_at(3, 5, SAMPLES)


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_gives_each_sample_in_order(dataset: Any, workers: int) -> None:
    found = list(sequential(dataset, range(SAMPLES), 4, workers))
    assert [len(batch["key"]) for batch in found] == [4, 4, 4, 4, 4, 2]
    assert [key for batch in found for key in batch["key"]] == [f"{i:09d}" for i in range(SAMPLES)]
    assert [caption for batch in found for caption in batch["caption"]] == [f"caption {i}" for i in range(SAMPLES)]
    assert dataset.at(7)["key"] == "000000007"


def test_few_open_shards_change_nothing(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stream(dataset, 0, 24)
    monkeypatch.setattr(record_store, "OPEN_SHARDS", 2)
    limited = pickle.loads(pickle.dumps(dataset))
    assert stream(limited, 0, 24) == expected
    assert len(limited.records.readers) == 2


def test_loading_draws_nothing_from_the_global_stream(dataset: Any) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(batches(dataset, 4, 4, 0, 1, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_cropped_and_mirrored_by_position_and_plain_for_evaluation(tmp_path: Path) -> None:
    dataset = ImageDataset(write_images(tmp_path), IMAGES, seed=0)
    batch = dataset.batch(range(4 * SAMPLES))
    assert batch["pixels"].shape == (4 * SAMPLES, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].min() < 12 and batch["pixels"].max() > 243
    assert batch["meta"][0] == {"kind": "noise"}
    views = {batch["pixels"][i].numpy().tobytes() for i in range(4 * SAMPLES) if batch["key"][i] == "000000000"}
    assert len(views) > 1
    whole = np.asarray(Image.open(io.BytesIO(image(3))))  # [8, 12, 3]: the centre has columns 2 to 9
    np.testing.assert_allclose(
        dataset.at(3)["image"].permute(1, 2, 0).numpy() * 127.5 + 127.5, whole[:, 2:10], atol=1e-4
    )


def test_latents_are_what_was_written_and_variants_are_all_drawn(tmp_path: Path) -> None:
    dataset = LatentDataset(write_latents(tmp_path), seed=0)
    batch = dataset.batch(range(10 * SAMPLES))
    assert batch["tokens"].dtype == batch["position"].dtype == torch.int64
    drawn = Counter()
    for row, key in enumerate(batch["key"]):
        i = int(key)
        matches = [v for v in range(3) if np.array_equal(batch["moments"][row], MOMENTS[i, v])]
        assert len(matches) == 1 and batch["tokens"][row].tolist() == [i] * 5
        np.testing.assert_array_equal(batch["text"][row], TEXT[i])
        drawn[matches[0]] += 1
    assert min(drawn[v] for v in range(3)) > 50
    np.testing.assert_array_equal(dataset.at(4)["moments"], MOMENTS[4, 0])


@pytest.mark.parametrize("dtype", [CacheDtype.fp32, CacheDtype.bf16])
def test_other_cache_dtypes_without_text(tmp_path: Path, dtype: CacheDtype) -> None:
    item = LatentDataset(write_latents(tmp_path, dtype, text=False, variants=1), seed=0).at(2)
    expected = torch.from_numpy(MOMENTS[2, 0])
    assert "text" not in item
    assert torch.equal(item["moments"], expected if dtype is CacheDtype.fp32 else expected.bfloat16())
    assert item["moments"].dtype == (torch.float32 if dtype is CacheDtype.fp32 else torch.bfloat16)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_foreign_shards_work_as_they_are(tmp_path: Path) -> None:
    """As img2dataset writes them: jpg, txt, json, a stats file beside, no manifest."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar"), encoder=False) as sink:
            for i in range(3):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 10), (250, 0, 0)).save(buffer, ("JPEG", "WEBP", "PNG")[i])
                name = ("jpg", "webp", "png")[i]
                sink.write({"__key__": f"{shard:05d}{i:04d}", name: buffer.getvalue(), "txt": b"red\n", "json": b"{}"})
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    dataset = ImageDataset(tmp_path, IMAGES, seed=0)
    batch = next(batches(dataset, 6, 6, 0, 1, 0, 0))
    assert sorted(batch["key"]) == [f"{s:05d}{i:04d}" for s in range(2) for i in range(3)]
    assert batch["caption"] == ["red"] * 6
    means = in_range(batch["pixels"]).mean(dim=(0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.96, -1.0, -1.0]), atol=0.03)


def bad(folder: Path, files: dict[str, bytes], position: int = 1) -> Path:
    """Three good samples, of which one has other files."""
    with ShardWriter(folder, 5) as writer:
        for i in range(3):
            writer.add(f"{i:09d}", files if i == position else {"png": image(i), "txt": b"x"})
    return folder


@pytest.mark.parametrize(
    "files, missing",
    [({"png": b""}, r"no \.txt/\.json: it has \.png"), ({"txt": b""}, r"no \.png/\.jpg/\.jpeg/\.webp.*: it has \.txt")],
)
def test_a_shard_without_captions_or_images_is_refused_at_the_start(
    tmp_path: Path, files: dict[str, bytes], missing: str
) -> None:
    with pytest.raises(UserError, match=rf"00000\.tar: sample '000000001' has {missing}: .*shards=FOLDER"):
        ImageDataset(bad(tmp_path, files), IMAGES, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_one_line_from_any_process(tmp_path: Path, workers: int) -> None:
    for name, files in {"image": {"png": b"no"}, "json": {"png": image(1), "json": b"{"}}.items():
        dataset = ImageDataset(bad(tmp_path / name, {**files, "txt": b"x"}), IMAGES, seed=0)
        with pytest.raises(UserError, match=r"00000\.tar: sample '000000001': .*build_shards") as error:
            list(sequential(dataset, range(3), 2, workers))
        assert "\n" not in str(error.value)


def test_a_data_set_smaller_than_a_global_batch_is_refused(dataset: Any) -> None:
    with pytest.raises(UserError, match=r"has 22 samples, fewer than batch\.global_batch_size=23"):
        batches(dataset, 23, 23, 0, 1, 0, 0)
    assert len(next(batches(dataset, 22, 22, 0, 1, 0, 0))["key"]) == 22


def test_a_manifest_that_counts_otherwise_is_refused(tmp_path: Path) -> None:
    manifest = Manifest.load(write_images(tmp_path))
    manifest.shards[0].samples = 4
    manifest.save(tmp_path)
    with pytest.raises(UserError, match=r"00000\.tar has 5 samples, not 4"):
        ImageDataset(tmp_path, IMAGES, seed=0)


@pytest.mark.parametrize("change", ["shape", "text"])
def test_a_latent_record_unlike_the_first_is_named(tmp_path: Path, change: str) -> None:
    with LatentWriter(tmp_path, 5, CacheDtype.fp16) as writer:
        for i in range(2):
            odd = i == 1
            moments = MOMENTS[i, :, :, :1] if odd and change == "shape" else MOMENTS[i]
            text = None if odd and change == "text" else TEXT[i]
            writer.add(str(i), moments, np.arange(5), "", {}, text)
    Manifest(kind="latents", shards=writer.close()).save(tmp_path)
    with pytest.raises(UserError, match=r"00000\.tar: sample '1': (moments|text)\.npy is .* not float16 \["):
        LatentDataset(tmp_path, seed=0).at(1)


def test_a_signal_to_the_whole_job_does_not_end_loader_processes(tmp_path: Path) -> None:
    dataset = LatentDataset(write_latents(tmp_path), seed=0)
    stream = batches(dataset, 4, 4, 0, 1, 0, workers=2)
    first = [next(stream)["key"] for _ in range(2)]  # one of each worker: both are at work
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGTERM)
        os.kill(worker.pid or 0, signal.SIGUSR1)
    expected = batches(dataset, 4, 4, 0, 1, 0, workers=0)
    assert first + [next(stream)["key"] for _ in range(20)] == [next(expected)["key"] for _ in range(22)]


def test_a_process_that_dies_of_an_exception_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    code = f"""
import sys
from data.latent_dataset import LatentDataset
from data.loader import batches
stream = batches(LatentDataset({str(write_latents(tmp_path))!r}, seed=3), 4, 4, 0, 1, 0, workers=2)
next(stream)
raise RuntimeError("in the middle of an epoch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=REPOSITORY)
    assert done.returncode == 1 and "in the middle of an epoch" in done.stderr


def record_keys(folder: Path, log: Path, rank: int, world: int, start: int) -> None:
    """One rank of a training: a line per step with the step's position and the keys that it saw."""
    dataset = LatentDataset(folder, seed=3)
    with open(log, "w", encoding="utf-8") as file:
        for batch in batches(dataset, 6, 1, rank, world, start, workers=0):
            file.write(f"{int(batch['position'][0])} {batch['key'][0]}\n")
            file.flush()
            time.sleep(0.004)


def seen_by_all(logs: list[Path], start: int) -> list[str]:
    """Keys of the steps that all ranks finished, in the order of the stream."""
    lines = [line.split() for log in logs if log.exists() for line in log.read_text().splitlines() if " " in line]
    keys = {int(position): key for position, key in lines if len(key) == 9}
    end = next(position for position in itertools.count(start) if position not in keys)
    return [keys[position] for position in range(start, end - (end - start) % 6)]


def test_random_kills_and_restarts_at_other_world_sizes_see_each_sample_once(tmp_path: Path) -> None:
    folder, context = write_latents(tmp_path / "data", repeat=30), multiprocessing.get_context("fork")
    samples, wait = SAMPLES * 30, np.random.default_rng(4)
    stream: list[str] = []
    for attempt, world in enumerate(itertools.cycle([1, 3, 2])):
        start, logs = len(stream), [tmp_path / f"{attempt}-{rank}.log" for rank in range(world)]
        ranks = [context.Process(target=record_keys, args=(folder, logs[r], r, world, start)) for r in range(world)]
        for process in ranks:
            process.start()
        time.sleep(wait.uniform(0.2, 0.5))
        for process in ranks:
            process.kill()
            process.join()
        stream += seen_by_all(logs, start)
        if len(stream) >= 2 * samples:
            break
        assert attempt < 100
    assert attempt >= 5, "too few restarts to show anything"
    for epoch in (stream[:samples], stream[samples : 2 * samples]):
        assert len(set(epoch)) == samples
