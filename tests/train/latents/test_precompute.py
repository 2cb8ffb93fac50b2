"""The latent cache: what it holds, who made it, and that a kill, a wrong image or another encoder cannot spoil it."""

import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import Device, ImageFormat, RuntimeConfig, StreamConfig
from data.buckets import bucket_of
from data.image_dataset import ImageDataset
from data.images import encode_image, in_range
from data.latent_dataset import LatentDataset
from data.latent_record import ChannelStats, read_latent
from data.loader import batches
from data.shards.manifest import Manifest
from data.shards.shard import ShardReader, ShardWriter
from models.autoencoder import Autoencoder
from models.clip import Clip
from train.engine.runtime import Runtime, start
from train.latents import precompute as stage
from train.latents.shard import AT_ONCE, LatentSplit


class Calls:
    """Counts the images that the encoder sees, split by split in order, and may end the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_at: int = -1) -> None:
        self.images = 0
        encode = stage.LatentEncoder.__call__

        def counted(encoder: stage.LatentEncoder, batch: dict[str, Any]) -> Any:
            self.images += len(batch["key"])
            if 0 <= end_at < self.images:
                raise KeyboardInterrupt
            return encode(encoder, batch)

        monkeypatch.setattr(stage.LatentEncoder, "__call__", counted)


def precompute(project: Any, runtime: Runtime, folder: Path, *overrides: str) -> None:
    cfg = project.config("latents", f"output_dir={folder}", "batch_size=8", *overrides)
    stage.run_precompute(cfg, runtime, to_plain(cfg))


@pytest.fixture(scope="module")
def undisturbed(towers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as `precompute` here makes it, in batches of 8."""
    folder = tmp_path_factory.mktemp("undisturbed")
    precompute(towers, start(RuntimeConfig(device=Device.cpu)), folder)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_manifest_says_who_made_it_from_what(latents: Any) -> None:
    run_dir = latents.folder
    for split in ("train", "heldout"):
        manifest = Manifest.load(run_dir / "latents" / split)
        assert manifest.provenance == {
            "autoencoder": sha256(run_dir / "autoencoder" / "export" / "diffusion_pytorch_model.safetensors"),
            "clip": sha256(run_dir / "clip" / "export" / "open_clip_model.safetensors"),
            "images": {"resolution": 32, "crop": "center", "flip": False, "range": [-1.0, 1.0]},
            "variants": 1,
            "captions": ["caption"],
            "train_shards": None,
            "shapes": [[32, 32]],
            "tile": None,
            "dtype": "fp16",
            "text_states": True,
            "conditions": {"caption": {}},
            "labels": Manifest.load(run_dir / "shards" / split).provenance["labels"],
            "latent_channels": 4,
            "latent_size": 8,
            "text_dim": 16,
            "context_length": 32,
            "source": Manifest.load(run_dir / "shards" / split).digest(),
        }
        assert [shard.sha256 for shard in manifest.shards] == [
            sha256(run_dir / "latents" / split / shard.name) for shard in manifest.shards
        ]
        assert manifest.stats["psnr"] > 11


def test_nothing_of_the_work_is_left_beside_the_cache(latents: Any) -> None:
    found = {name for name in files_below(latents.folder / "latents") if not name.startswith(("config", "metrics"))}
    names = ("train/00000", "train/00001", "train/00002", "heldout/00000")
    shards = {f"{name}.{suffix}" for name in names for suffix in ("tar", "idx")}
    described = {f"{split}/{name}" for split in ("train", "heldout") for name in ("manifest.json", "decoded.png")}
    assert found == shards | described | {"null_text.safetensors"}
    assert not list((latents.folder / "latents").rglob(".parts"))


def test_records_are_the_towers_outputs_in_the_order_of_the_images(latents: Any) -> None:
    run_dir, cfg = latents.folder, latents.config("latents")
    images = ImageDataset(run_dir / "shards" / "train", cfg.images, 0)
    autoencoder, clip = Autoencoder.from_pretrained(cfg.autoencoder), Clip.from_pretrained(cfg.clip)
    reader = ShardReader(run_dir / "latents" / "train" / "00001.tar")
    for row in (0, 19):
        item, record = images.at(20 + row), read_latent(reader[row])
        cuts = [{"left": 0, "top": 0, "width": 32, "height": 32, "flipped": False}]
        assert (record.key, record.caption, record.meta) == (
            item["key"],
            item["caption"],
            item["meta"] | {"cuts": cuts},
        )
        tokens = clip.tokenize([item["caption"]])
        assert np.array_equal(record.tokens, tokens[0].numpy())
        with torch.no_grad():
            moments, text = autoencoder.encode(item["image"][None]).numpy(), clip.text_states(tokens).numpy()
        np.testing.assert_allclose(record.moments, moments, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(record.text, text[0], rtol=2e-3, atol=2e-3)


def retold(source: Path, target: Path) -> None:
    """Copy a data set with further captions in each .json; every third image lacks the long one."""
    for side in ("train", "heldout"):
        manifest = Manifest.load(source / side)
        with ShardWriter(target / side, 20) as writer:
            for reader in (ShardReader(source / side / shard.name) for shard in manifest.shards):
                for row in range(len(reader)):
                    record = reader[row]
                    meta = json.loads(bytes(record["json"]))
                    meta["told"] = {"short": [f"short {row}"]} | ({"long": f"long {row}"} if row % 3 else {})
                    files = {name: value for name, value in record.items() if name not in ("__key__", "json")}
                    writer.add(record["__key__"], files | {"json": json.dumps(meta).encode()})
        Manifest(kind="images", shards=writer.finished, provenance=manifest.provenance).save(target / side)


@pytest.mark.parametrize("options", [[], ["variants=2", "images.flip=true"]])
def test_batches_that_are_encoded_at_a_time_make_the_same_shards(
    towers: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    shards = []
    for at_once in (1, 3):
        monkeypatch.setitem(AT_ONCE, "cpu", at_once)
        precompute(towers, runtime, tmp_path / str(at_once), *options)
        shards.append([Manifest.load(tmp_path / str(at_once) / side).shards for side in ("train", "heldout")])
    assert shards[0] == shards[1]


def test_moments_of_another_cache_are_taken_over_and_their_texts_are_new(
    towers: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retold(towers.folder / "shards", tmp_path / "shards")
    images, other = f"shards={tmp_path}/shards", tmp_path / "other"
    precompute(towers, runtime, tmp_path / "old", images, "min_psnr=1")
    torch.manual_seed(7)
    Clip.from_config(Clip.from_pretrained(towers.config("latents").clip).config).save_pretrained(other)
    new = [images, "min_psnr=1", f"clip={other}", "captions=[told.long,told.short.0]"]
    precompute(towers, runtime, tmp_path / "fresh", *new)
    asked = list[int]()
    encode = stage.LatentEncoder._moments
    monkeypatch.setattr(stage.LatentEncoder, "_moments", lambda *a: asked.append(1) or encode(*a))  # type: ignore[func-returns-value]
    precompute(towers, runtime, tmp_path / "taken", *new, f"moments={tmp_path}/old")
    assert not asked
    for side in ("train", "heldout"):
        fresh, taken = (Manifest.load(tmp_path / name / side) for name in ("fresh", "taken"))
        assert taken.shards == fresh.shards and taken.provenance == fresh.provenance
        np.testing.assert_allclose(taken.stats["std"], fresh.stats["std"], rtol=1e-3)
    with pytest.raises(UserError, match=r"moments=.*/old: its dtype is fp16, not fp32: leave it out"):
        precompute(towers, runtime, tmp_path / "x", *new, f"moments={tmp_path}/old", "dtype=fp32")


def test_moments_taken_over_reject_what_a_precompute_from_the_images_rejects(
    towers: Any, runtime: Runtime, tmp_path: Path
) -> None:
    source, broken = towers.folder / "shards", tmp_path / "broken"
    for side in ("train", "heldout"):
        reader = ShardReader(source / side / "00000.tar")
        with ShardWriter(broken / side, 1000) as writer:
            for i in range(len(reader)):
                files = {n: bytes(v) for n, v in reader[i].items() if n not in ("__key__", "json")}
                writer.add(reader.key(i), files | {"json": json.dumps({"long": 5 if i == 2 else "long"}).encode()})
        Manifest(kind="images", shards=writer.finished).save(broken / side)
    precompute(towers, runtime, tmp_path / "old", f"shards={broken}", "min_psnr=1")
    new = [f"shards={broken}", "captions=[caption,long]", "min_psnr=1"]
    precompute(towers, runtime, tmp_path / "fresh", *new)
    precompute(towers, runtime, tmp_path / "taken", *new, f"moments={tmp_path}/old")
    fresh, taken = (tmp_path / name / "train" for name in ("fresh", "taken"))
    readers = [ShardReader(folder / "00000.tar") for folder in (fresh, taken)]
    keys = [[reader.key(i) for i in range(len(reader))] for reader in readers]
    assert keys[0] == keys[1] and len(keys[0]) == 19
    (reject,) = map(json.loads, (taken / "rejects.jsonl").read_text().splitlines())
    assert reject == json.loads((fresh / "rejects.jsonl").read_text())
    assert reject["key"] == ShardReader(source / "train" / "00000.tar").key(2) and "is not text" in reject["reason"]


def test_moments_of_a_cache_that_is_not_whole_end_the_run(
    towers: Any, runtime: Runtime, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed, tmp_path / "old")
    taken = [f"moments={tmp_path}/old", "captions=[caption,told]", "min_psnr=1"]
    (tmp_path / "old" / "train" / "00001.tar").unlink()
    lacking = r"^moments=.*/old: shard .*/00001\.tar is missing: copy the cache whole, or leave moments out"
    with pytest.raises(UserError, match=lacking) as early:
        precompute(towers, runtime, tmp_path / "new", *taken)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=lacking) as late:
        patch.setattr(stage, "find_shards", lambda folder, _: Manifest.load(folder))  # deleted meanwhile
        precompute(towers, runtime, tmp_path / "new", *taken)
    assert "\n" not in str(early.value) + str(late.value)
    manifest = Manifest.load(tmp_path / "old" / "train")
    del manifest.shards[1]  # as where all samples of an image shard were rejects
    manifest.save(tmp_path / "old" / "train")
    precompute(towers, runtime, tmp_path / "new", *taken)
    rejects = [json.loads(line) for line in (tmp_path / "new" / "train" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 20 and all("has no latents of it" in reject["reason"] for reject in rejects)
    with pytest.raises(UserError, match=r"^moments=.*/none: no latents at .*/train'?: copy the cache whole, or leave"):
        precompute(towers, runtime, tmp_path / "x", f"moments={tmp_path}/none")


def test_image_embeddings_of_another_clip_are_not_taken_over(
    towers: Any, other_towers: Path, runtime: Runtime, tmp_path: Path
) -> None:
    seen = ["conditions={caption: null, image_embedding: {width: 16}}", "min_psnr=1"]
    precompute(towers, runtime, tmp_path / "old", *seen)
    with pytest.raises(UserError, match=r"^moments=.*/old: its clip is [0-9a-f]+, not [0-9a-f]+: leave it out"):
        precompute(towers, runtime, tmp_path / "new", *seen, f"clip={other_towers}/clip", f"moments={tmp_path}/old")
    precompute(towers, runtime, tmp_path / "new", *seen, "captions=[told]", f"moments={tmp_path}/old")
    assert Manifest.load(tmp_path / "new" / "train").samples == 53


def test_the_samples_of_a_shard_are_found_without_counting_all_of_them(latents: Any) -> None:
    class Counted(list[Any]):
        walks = 0

        def __iter__(self) -> Iterator[Any]:
            Counted.walks += 1
            return super().__iter__()

    images = ImageDataset(latents.folder / "shards" / "train", latents.config("latents").images, 0)
    images.manifest.shards = Counted(images.manifest.shards)
    split = LatentSplit("train", images, Path(), {"train_shards": None}, None)
    assert [split.samples_of(index) for index in range(split.shards)] == [range(20), range(20, 40), range(40, 53)]
    assert Counted.walks == 0


def test_a_part_of_the_training_side_is_a_cache_of_its_own(towers: Any, runtime: Runtime, tmp_path: Path) -> None:
    precompute(towers, runtime, tmp_path, "train_shards=2")
    counts = {side: Manifest.load(tmp_path / side).samples for side in ("train", "heldout")}
    assert counts == {"train": 40, "heldout": 7} and LatentDataset(tmp_path / "train", 0).samples == 40
    with pytest.raises(UserError, match=r"another train_shards \(2, now None\)"):
        precompute(towers, runtime, tmp_path)


def test_a_part_that_leaves_nothing_out_is_the_whole(
    towers: Any, undisturbed: Path, runtime: Runtime, tmp_path: Path
) -> None:
    precompute(towers, runtime, tmp_path, "train_shards=3")
    assert Manifest.load(tmp_path / "train") == Manifest.load(undisturbed / "train")


def test_all_captions_of_an_image_are_cached_and_one_is_drawn_for_a_position(
    towers: Any, latents: Any, runtime: Runtime, tmp_path: Path
) -> None:
    retold(latents.folder / "shards", tmp_path / "shards")
    names = ["caption", "told.long", "told.short.0"]
    precompute(towers, runtime, tmp_path, f"shards={tmp_path}/shards", f"captions=[{','.join(names)}]", "min_psnr=1")
    clip = Clip.from_pretrained(towers.config("latents").clip)
    folder = tmp_path / "train"
    images = ImageDataset(tmp_path / "shards" / "train", latents.config("latents").images, 0)
    every = LatentDataset(folder, seed=0)
    batch = every.batch(range(53))
    with torch.no_grad():
        tokens = clip.tokenize(batch["caption"])
        states = clip.text_states(tokens)
    assert torch.equal(batch["tokens"], tokens.long())  # those of the caption that goes with them
    torch.testing.assert_close(batch["text"].float(), states, rtol=2e-3, atol=2e-3)
    kinds = [caption.split()[0] if caption[:5] in ("short", "long ") else "usual" for caption in batch["caption"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)}.keys() == {"usual", "long", "short"}
    for weights, allowed in (({"told.short.0": 1.0}, {"short"}), ({"caption": 1.0}, {"usual"})):
        some = LatentDataset(folder, 0, StreamConfig(captions=weights)).batch(range(53))
        assert some["key"] == batch["key"] and torch.equal(some["moments"], batch["moments"])
        assert {"short" if caption.startswith("short") else "usual" for caption in some["caption"]} == allowed
    assert [every.at(i)["caption"] for i in range(9)] == [images.at(i)["caption"] for i in range(9)]
    for row in (3, 4):
        told = images.records[row]
        assert ("long" in json.loads(bytes(told["json"]))["told"]) is (row % 3 > 0)
    with pytest.raises(
        UserError, match=r"has caption, told\.long, told\.short\.0, not other: precompute with captions="
    ):
        LatentDataset(folder, 0, StreamConfig(captions={"other": 1.0}))
    with pytest.raises(UserError, match="holds latents with another captions"):
        precompute(towers, runtime, tmp_path, f"shards={tmp_path}/shards", "min_psnr=1")


def test_channel_statistics_equal_numpy_over_the_whole_set(latents: Any) -> None:
    folder = latents.folder / "latents" / "train"
    manifest = Manifest.load(folder)
    readers = [ShardReader(folder / shard.name) for shard in manifest.shards]
    moments = np.stack([read_latent(r[i]).moments[0] for r in readers for i in range(len(r))]).astype(np.float64)
    mean, logvar = np.split(moments, 2, axis=1)  # [N, C, h, w]
    variance = mean.var(axis=(0, 2, 3)) + np.exp(logvar.clip(-30, 20)).mean(axis=(0, 2, 3))
    assert len(moments) == 53
    np.testing.assert_allclose(manifest.stats["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(manifest.stats["std"], np.sqrt(variance), rtol=1e-3)
    drawn = mean + np.exp(0.5 * logvar) * np.random.default_rng(0).standard_normal(mean.shape)
    np.testing.assert_allclose(manifest.stats["std"], drawn.std(axis=(0, 2, 3)), rtol=0.05)


def test_null_text_is_the_towers_empty_caption(latents: Any) -> None:
    clip = Clip.from_pretrained(latents.folder / "clip" / "export")
    found = load_file(latents.folder / "latents" / "null_text.safetensors")["text"]
    with torch.no_grad():
        torch.testing.assert_close(found, clip.text_states(clip.tokenize([""]))[0])


@pytest.mark.parametrize("end_at", [10, 30, 45, 56])
def test_killed_run_goes_on_without_encoding_a_complete_shard_again(
    towers: Any, undisturbed: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        Calls(patch, end_at)
        precompute(towers, runtime, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    complete = sum(size for size, end in ((20, 20), (20, 40), (13, 53)) if end_at >= end)
    assert (tmp_path / "train" / "manifest.json").exists() == (complete == 53)
    calls = Calls(monkeypatch)
    precompute(towers, runtime, tmp_path)
    assert calls.images == 60 - complete
    for split in ("train", "heldout"):
        assert Manifest.load(tmp_path / split) == Manifest.load(undisturbed / split)


def test_finished_cache_is_not_encoded_again(
    towers: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(towers, runtime, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    calls = Calls(monkeypatch)
    precompute(towers, runtime, tmp_path)
    assert calls.images == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}


def test_shard_that_is_not_whole_is_encoded_again(
    towers: Any, undisturbed: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        Calls(patch, 50)
        precompute(towers, runtime, tmp_path)
    shard = tmp_path / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    calls = Calls(monkeypatch)
    precompute(towers, runtime, tmp_path)
    assert calls.images == 40
    assert Manifest.load(tmp_path / "train") == Manifest.load(undisturbed / "train")


@pytest.fixture(scope="module")
def other_towers(towers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder and a CLIP of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    Autoencoder(towers.config("autoencoder").model).save_pretrained(folder / "autoencoder")
    Clip.from_config(towers.config("clip").model).save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("autoencoder={other}/autoencoder", "autoencoder"),
        ("clip={other}/clip", "clip"),
        ("images.resolution=16", "images"),
        ("images.flip=true", "images"),
        ("dtype=bf16", "dtype"),
        ("text_states=false", "text_states"),
    ],
)
def test_cache_of_another_provenance_is_refused_by_its_field(
    latents: Any, other_towers: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, override: str, field: str
) -> None:
    calls = Calls(monkeypatch)
    before = {name: sha256(latents.folder / "latents" / name) for name in files_below(latents.folder / "latents")}
    with pytest.raises(UserError, match=rf"^output_dir: .* holds latents with another {field} \(") as refused:
        precompute(latents, runtime, latents.folder / "latents", override.format(other=other_towers))
    assert "\n" not in str(refused.value)
    assert calls.images == 0
    after = {name: sha256(latents.folder / "latents" / name) for name in files_below(latents.folder / "latents")}
    assert after == before


def test_half_a_cache_of_another_encoder_is_not_continued(
    towers: Any, other_towers: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        Calls(patch, 45)
        precompute(towers, runtime, tmp_path)
    calls = Calls(monkeypatch)
    precompute(towers, runtime, tmp_path, f"clip={other_towers}/clip")
    assert calls.images == 60
    assert Manifest.load(tmp_path / "train").provenance["clip"] == sha256(
        other_towers / "clip" / "open_clip_model.safetensors"
    )


def test_images_that_were_not_normalised_are_noticed(
    towers: Any, latents: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Manifest.load(latents.folder / "latents" / "train").stats["psnr"]
    encode = stage.LatentEncoder.__call__
    monkeypatch.setattr(  # [0, 1] instead of [-1, 1]
        stage.LatentEncoder,
        "__call__",
        lambda encoder, batch: encode(encoder, batch | {"pixels": batch["pixels"] // 2 + 128}),
    )
    with pytest.raises(UserError, match=rf"decode back at .* dB, less than min_psnr={right - 2:.1f}"):
        precompute(towers, runtime, tmp_path, f"min_psnr={right - 2:.1f}")
    assert not list(tmp_path.rglob("manifest.json"))
    assert (tmp_path / "train" / "decoded.png").is_file()  # the message sends people there


def test_latents_that_decode_to_nan_are_no_cache(
    towers: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "decode_back", lambda *_: math.nan)
    with pytest.raises(UserError, match=r"decode back at nan dB, less than min_psnr=-100\.0"):
        precompute(towers, runtime, tmp_path, "min_psnr=-100")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_every_dtype_and_no_text_states_make_a_cache(
    towers: Any, latents: Any, runtime: Runtime, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    precompute(towers, runtime, tmp_path, f"dtype={dtype}", "text_states=false")
    record = read_latent(ShardReader(tmp_path / "train" / "00000.tar")[0])
    assert record.text is None
    assert record.moments.dtype == {"fp32": np.float32, "bf16": np.uint16}[dtype]
    ours, theirs = (Manifest.load(f / "train").stats for f in (tmp_path, latents.folder / "latents"))
    assert ours["psnr"] == pytest.approx(theirs["psnr"], rel=10 * tolerance)
    assert ours["mean"] == pytest.approx(theirs["mean"])


def test_captions_that_are_cut_are_counted_with_an_example(
    towers: Any, runtime: Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for side, count in (("train", 10), ("heldout", 2)):
        with ShardWriter(tmp_path / "shards" / side, 4) as writer:
            for i in range(count):
                png = encode_image(Image.new("RGB", (32, 32), (20 * i, 0, 0)), ImageFormat.png, 0)
                caption = "a red planet " * (11 if i % 3 == 2 else 1) + "at night"
                writer.add(f"{i:05d}", {"png": png, "txt": caption.encode()})
        Manifest(kind="images", shards=writer.finished).save(tmp_path / "shards" / side)
    for _ in range(2):  # a cache that is there says it again
        precompute(towers, runtime, tmp_path / "latents", f"shards={tmp_path / 'shards'}", "min_psnr=0.1")
        told = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
        assert len(told) == 1
        assert "train: 3 of 10 captions are longer than the 32 tokens" in told[0]
        assert told[0].endswith("'a red planet at night'")
    stats = Manifest.load(tmp_path / "latents" / "train").stats
    assert (stats["captions_cut"], stats["captions_cut_example"]) == (3, "a red planet at night")
    assert "captions_cut" not in Manifest.load(tmp_path / "latents" / "heldout").stats


def test_metrics_of_the_cache_are_recorded(latents: Any) -> None:
    last = json.loads((latents.folder / "latents" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["latents/train_samples"], last["latents/heldout_samples"]) == (53, 7)
    assert last["latents/train_psnr"] == Manifest.load(latents.folder / "latents" / "train").stats["psnr"]


def test_ranks_share_the_shards_and_their_statistics_merge(towers: Any, latents: Any, runtime: Runtime) -> None:
    whole = Manifest.load(latents.folder / "latents" / "train")
    parts = ChannelStats(4)
    for shard in reversed(whole.shards):
        reader, alone = ShardReader(latents.folder / "latents" / "train" / shard.name), ChannelStats(4)
        for i in range(len(reader)):
            alone.add(read_latent(reader[i]).moments)
        parts.merge(ChannelStats.from_state(json.loads(json.dumps(alone.state()))))
    assert parts.result()["mean"] == pytest.approx(whole.stats["mean"], abs=1e-3)
    assert parts.result()["std"] == pytest.approx(whole.stats["std"], rel=1e-3)


def test_variants_are_the_centre_and_squares_of_their_own(towers: Any, runtime: Runtime, tmp_path: Path) -> None:
    precompute(towers, runtime, tmp_path, "variants=3", "images.flip=true")
    cfg = towers.config("latents", "images.flip=true")
    images, autoencoder = (
        ImageDataset(f"{cfg.shards}/train", cfg.images, 0),
        Autoencoder.from_pretrained(cfg.autoencoder),
    )
    record = read_latent(ShardReader(tmp_path / "train" / "00000.tar")[0])
    assert record.moments.shape == (3, 8, 8, 8)
    squares = images.variants(0, 3)
    assert [cut["flipped"] for cut in record.meta["cuts"]] == [cut.flipped for cut in squares["cuts"]]
    assert torch.equal(in_range(squares["pixels"])[0], images.at(0)["image"])
    with torch.no_grad():
        np.testing.assert_allclose(
            record.moments, autoencoder.encode(in_range(squares["pixels"])).numpy(), rtol=2e-3, atol=2e-3
        )
    flips = {cut.flipped for index in range(10) for cut in images.variants(index, 3)["cuts"][1:]}
    assert flips == {True, False}


def test_images_that_cannot_be_read_are_rejected_by_name(towers: Any, runtime: Runtime, tmp_path: Path) -> None:
    source, broken = towers.folder / "shards", tmp_path / "shards"
    for side in ("train", "heldout"):
        reader = ShardReader(source / side / "00000.tar")
        with ShardWriter(broken / side, 1000) as writer:
            for i in range(len(reader)):
                files = {n: bytes(v) for n, v in reader[i].items() if n != "__key__"}
                writer.add(reader.key(i), files | ({"png": b"no image"} if (side, i) == ("train", 3) else {}))
        Manifest(kind="images", shards=writer.finished).save(broken / side)
    precompute(towers, runtime, tmp_path / "latents", f"shards={broken}")
    manifest = Manifest.load(tmp_path / "latents" / "train")
    (reject,) = map(json.loads, (tmp_path / "latents" / "train" / "rejects.jsonl").read_text().splitlines())
    assert (manifest.samples, manifest.stats["rejected"]) == (19, 1)
    assert reject["key"] == ShardReader(broken / "train" / "00000.tar").key(3) and "not a readable" in reject["reason"]


def test_foreign_shards_of_any_names_and_order_become_latents(towers: Any, runtime: Runtime, tmp_path: Path) -> None:
    reader = ShardReader(towers.folder / "shards" / "train" / "00000.tar")
    images = [bytes(reader[i]["png"]) for i in range(6)]
    keys = ["k" * 187, "ключ" * 40, "v1.0/22.05", "v1.0/22.06", "same", "link"]
    texts = [b"\xef\xbb\xbfa dog", b"two\r\nlines", b"a\0cat", b"caf\xe9", b"first", b"second"]
    members = [(f"{key}.PNG", image) for key, image in zip(keys, images, strict=True)]
    members += [(f"{key}.txt", text) for key, text in zip(keys, texts, strict=True)]
    members += [("between.png", b"no image"), ("between.txt", b""), ("same.png", images[0]), ("same.txt", b"again")]
    for number in range(2):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if name == "link.PNG":
                    info.type, info.linkname, content = tarfile.LNKTYPE, "same.PNG", b""
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    precompute(towers, runtime, tmp_path / "latents", f"shards={tmp_path / 'shards'}")
    made = ShardReader(tmp_path / "latents" / "train" / "00000.tar")
    records = [read_latent(made[i]) for i in range(len(made))]
    wanted = {"k" * 187: "a dog", "ключ" * 40: "two lines", "v1.0/22%2E05": "a cat", "same": "first", "same~2": "again"}
    assert {record.key: record.caption for record in records} == wanted
    rejects = [json.loads(line) for line in (tmp_path / "latents" / "train" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["key"] for reject in rejects] == ["v1.0/22.06", "link", "between"]
    found = zip(("not UTF-8", "is a link", "not a readable"), rejects, strict=True)
    assert all(reason in reject["reason"] for reason, reject in found)


def test_a_plan_tells_storage_and_time_and_writes_nothing(
    towers: Any, latents: Any, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(towers, runtime, tmp_path / "new", "plan=true")
    told = capsys.readouterr().out
    written = sum(Manifest.load(latents.folder / "latents" / split).bytes for split in ("train", "heldout"))
    assert "60 samples in 4 shards to encode" in told and "on 64 processes like this one" in told
    storage = float(told.split(" GB to write")[0].split()[-1])
    assert storage == pytest.approx(written / 1e9, abs=0.011)
    assert not (tmp_path / "new").exists()


def test_images_keep_their_shape_in_buckets(towers: Any, framed: list[str], runtime: Runtime, tmp_path: Path) -> None:
    precompute(towers, runtime, tmp_path, *framed)
    manifest = Manifest.load(tmp_path / "train")
    assert manifest.samples == 45 and (tmp_path / "train" / "decoded.png").is_file()
    shapes = {"-24x40": (10, 6), "-32x32": (8, 8), "-40x24": (6, 10)}
    assert {bucket_of(shard.name) for shard in manifest.shards} == set(shapes)
    assert manifest.provenance["shapes"] == [[24, 40], [32, 32], [40, 24]]
    dataset = LatentDataset(tmp_path / "train", 0, StreamConfig(), run=4)
    seen = list[str]()
    for batch in islice(batches(dataset, 8, 2, 0, 1, 0, 0), 3 * 3 * 4 // 2):  # epoch 0
        keys, moments = batch["key"], batch["moments"]
        (bucket,) = {bucket_of(f"0-{'x'.join(map(str, shape(key)))}.tar") for key in keys}
        assert tuple(moments.shape[2:]) == shapes[bucket]
        seen += keys
    assert len(set(seen)) == len(seen)
    record = read_latent(ShardReader(tmp_path / "train" / "00000-40x24.tar")[0])
    assert (record.meta["width"], record.meta["height"]) == (96, 64)
    (cut,) = record.meta["cuts"]
    assert (cut["top"], cut["height"]) == (3, 58) and cut["width"] == 96


def shape(key: str) -> tuple[int, int]:
    """The bucket of a sample of `framed`."""
    return ((32, 32), (40, 24), (24, 40))[int(key) % 3]


def test_a_micro_batch_of_two_shapes_is_refused(
    towers: Any, framed: list[str], runtime: Runtime, tmp_path: Path
) -> None:
    precompute(towers, runtime, tmp_path, *framed)
    dataset = LatentDataset(tmp_path / "train", 0, StreamConfig(), run=3)
    with pytest.raises(UserError, match=r"two shapes: set stream\.bucket_run"):
        list(islice(batches(dataset, 8, 4, 0, 1, 0, 0), 12))


def test_a_step_that_the_autoencoder_cannot_halve_is_refused(
    towers: Any, framed: list[str], runtime: Runtime, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"buckets\.step=6: must be a multiple of 4"):
        precompute(towers, runtime, tmp_path, *framed, "buckets.step=6")
