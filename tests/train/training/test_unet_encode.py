"""Training without a cache: what is encoded in the step is what a cache holds, of the same samples in one order."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import Device, RuntimeConfig
from data.loader import batches
from data.shards.manifest import Manifest
from data.shards.shard import ShardReader, ShardWriter
from train.engine import trainer
from train.engine.runtime import Runtime, start
from train.latents import precompute
from train.training.unet import UNetStage, training_stream


@pytest.fixture(scope="module")
def part(latents: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of what is held out and of one of three shards."""
    folder: Path = tmp_path_factory.mktemp("part")
    cfg = latents.config("latents", f"output_dir={folder}", "train_shards=1")
    precompute.run_precompute(cfg, start(RuntimeConfig(device=Device.cpu)), to_plain(cfg))
    return folder


def make(latents: Any, runtime: Runtime, *overrides: str) -> UNetStage:
    return UNetStage(latents.config("unet", *overrides), runtime)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_that_of_the_cache(latents: Any, runtime: Runtime, part: Path, workers: int) -> None:
    losses = []
    for options in ([], ["encode=true"]):
        stage = make(latents, runtime, *options)
        found = []
        for batch in islice(batches(stage.dataset, 16, 16, 0, 1, start=32, workers=workers, extend=stage.extend), 4):
            found.append((batch["key"], batch["caption"], float(stage.micro_step(batch, True, 32)["train/loss"])))
            stage.finish_step(32)
        losses.append(found)
    cached, encoded = losses
    assert [one[:2] for one in cached] == [one[:2] for one in encoded]
    for (*_, ours), (*_, theirs) in zip(encoded, cached, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)  # the cache is rounded to 16 bits


def test_captions_are_those_of_the_cache(latents: Any, runtime: Runtime, tmp_path: Path) -> None:
    source, shards, cache = latents.folder / "shards", tmp_path / "shards", tmp_path / "latents"
    for side in ("train", "heldout"):
        with ShardWriter(shards / side, 20) as writer:
            for reader in (ShardReader(source / side / shard.name) for shard in Manifest.load(source / side).shards):
                for row in range(len(reader)):
                    files = {name: value for name, value in reader[row].items() if name not in ("__key__", "json")}
                    told = {"short": f"short {row}"} | ({"long": f"long {row}"} if row % 3 else {})
                    writer.add(reader.key(row), files | {"json": json.dumps(told).encode()})
        Manifest(kind="images", shards=writer.finished).save(shards / side)
    options = [f"shards={shards}", f"output_dir={cache}", "captions=[short,long]", "min_psnr=1"]
    cfg = latents.config("latents", *options)
    precompute.run_precompute(cfg, runtime, to_plain(cfg))
    for weights in ("{long: 3, short: 1}", "{long: 1}", "{}"):
        drawn = []
        for encode in ("false", "true"):
            own = [f"latents={cache}", f"shards={shards}", f"stream.captions={weights}", f"encode={encode}"]
            dataset, _ = training_stream(latents.config("unet", *own))
            batch = dataset.batch(range(53))
            drawn.append(list(zip(batch["key"], batch["caption"], strict=True)))
        assert drawn[0] == drawn[1]


def test_a_cache_of_some_images_is_for_encode_alone(latents: Any, runtime: Runtime, part: Path) -> None:
    with pytest.raises(
        UserError, match=r"^latents=.*: has latents of a part of the images .*encode=true: set that, or"
    ):
        make(latents, runtime, f"latents={part}")


def test_it_trains_on_all_images_with_a_cache_of_some(
    latents: Any, runtime: Runtime, part: Path, tmp_path: Path
) -> None:
    short = ["loop.samples=64", "loop.log_every=16", "loop.evaluate_every=64", "loop.checkpoint_every=32"]
    cfg = latents.config("unet", "encode=true", f"latents={part}", f"output_dir={tmp_path}", "sample_prompts=2", *short)
    stage = UNetStage(cfg, runtime)
    assert stage.dataset.samples == 53 and Manifest.load(part / "train").samples == 20
    trainer.fit(stage, cfg, runtime)
    assert (tmp_path / "export" / "latentline.json").is_file() and (tmp_path / "samples").is_dir()


def test_it_resumes_to_the_bit(latents: Any, runtime: Runtime, part: Path, tmp_path: Path) -> None:
    def trained(folder: Path, *samples: int) -> dict[str, torch.Tensor]:
        for count in samples:
            options = [
                f"loop.samples={count}",
                "loop.evaluate_every=64",
                "loop.checkpoint_every=32",
                "sample_prompts=0",
            ]
            cfg = latents.config("unet", "encode=true", f"latents={part}", f"output_dir={folder}", *options)
            stage = UNetStage(cfg, runtime)
            trainer.fit(stage, cfg, runtime)
        return stage.unet.weights()

    whole, parts = trained(tmp_path / "whole", 64), trained(tmp_path / "parts", 32, 64)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_what_a_step_cannot_make_is_refused(latents: Any, runtime: Runtime) -> None:
    with pytest.raises(UserError, match=r"encode=true: conditions\.framing is made by data/precompute_latents"):
        make(latents, runtime, "encode=true", "conditions.framing={}")
    with pytest.raises(UserError, match="no shards at"):
        make(latents, runtime, "encode=true", "shards=/nowhere")
