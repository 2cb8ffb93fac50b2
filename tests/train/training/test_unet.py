"""The U-Net's training: it learns, and every draw belongs to a sample, whatever the batch, the rank or the order."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from first_step import first_step
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from data.loader import batches
from models.clip import Clip
from models.unet import UNet
from train.engine import runtime as runtime_module
from train.engine import trainer
from train.engine.runtime import Runtime
from train.latents import precompute
from train.latents.provenance import UNetInfo
from train.training.unet import UNetStage, load_pretrained
from waits import Waits


def make(latents: Any, runtime: Runtime, *overrides: str) -> UNetStage:
    return UNetStage(latents.config("unet", *overrides), runtime)


def null_text_of(stage: UNetStage) -> Tensor:
    """What the caption is when it is dropped [L, D]."""
    null_text = stage.network.conditions.kinds["caption"].null_text
    assert isinstance(null_text, Tensor)
    return null_text


class Seen:
    """What the network was given in its forward passes."""

    def __init__(self, stage: UNetStage) -> None:
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.contexts: list[Tensor] = []
        stage.network.register_forward_pre_hook(self.note)

    def note(self, module: Any, inputs: tuple[Any, ...]) -> None:
        latents, timesteps, told = inputs
        for kept, tensor in ((self.latents, latents), (self.timesteps, timesteps), (self.contexts, told["text"])):
            kept.append(tensor.detach().clone())


def test_denoising_gets_better(project: Any) -> None:
    losses = project.losses("unet")
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    metrics = json.loads((project.folder / "unet" / "DONE").read_text())["metrics"]
    assert 0 < metrics["eval/loss"] < losses[0]
    assert {"train/grad_norm", "train/lr"} <= project.rows("unet")[0].keys()
    for name in ("prompts", "film"):
        assert (project.folder / "unet" / "samples" / f"{name}-000000000960.png").is_file()


def test_export_holds_the_average_and_what_sampling_needs(project: Any) -> None:
    folder = project.folder / "unet" / "export"
    saved = project.folder / "unet" / "checkpoints" / "000000000960" / "unet"
    exported = {f"unet.{name}": tensor for name, tensor in UNet.from_pretrained(folder).state_dict().items()}
    average, latest = load_file(saved / "ema.safetensors"), load_file(saved / "weights.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in average.items())
    assert not all(torch.equal(tensor, exported[name]) for name, tensor in latest.items())
    info = UNetInfo.load(str(folder))
    stats = json.loads((project.folder / "latents" / "train" / "manifest.json").read_text())["stats"]
    assert (info.latent_mean, info.latent_std) == (stats["mean"], stats["std"])
    assert info.process_config() == project.config("unet").process


@pytest.mark.parametrize(
    "backend", ["runtime.zero_stage=0", "runtime.zero_stage=2", "runtime.zero_stage=3", "runtime.backend=fsdp"]
)
def test_accumulation_takes_the_step_of_the_whole_batch(latents: Any, runtime: Runtime, backend: str) -> None:
    weights, norms = [], []
    for micro in (16, 4):
        stage = make(latents, runtime, f"batch.micro_batch_size={micro}", backend)
        norms.append(first_step(stage, micro))
        weights.append(stage.unet.weights())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-4)  # a tenth of lr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["backend=ddp", "backend=fsdp", "zero_stage=0", "zero_stage=1", "zero_stage=2"])
def test_a_step_waits_for_nothing(latents: Any, backend: str, precision: str) -> None:
    cfg = latents.config("unet", "batch.micro_batch_size=8", f"runtime.{backend}", f"runtime.precision={precision}")
    stage, waits = UNetStage(cfg, runtime_module.start(cfg.runtime)), Waits()
    waits.around(stage)
    for position in range(0, 48, 8):
        last = position % 16 == 8
        stage.micro_step(stage.extend(stage.dataset.batch(range(position, position + 8))), last, position // 16 * 16)
        if last:
            assert float(stage.finish_step(position + 8)["train/grad_norm"]) > 0
    assert stage.unet.steps == 3 and waits.found == []


def test_initial_weights_are_the_same_in_every_layout(latents: Any) -> None:
    found = []
    for layout in ("backend=ddp", "backend=fsdp", "zero_stage=2", "zero_stage=3"):
        cfg = latents.config("unet", f"runtime.{layout}")
        found.append(UNetStage(cfg, runtime_module.start(cfg.runtime)).unet.weights())
    first = found[0]
    assert all(torch.equal(weights[name], first[name]) for weights in found for name in first)
    assert torch.equal(first["unet.conv_in.weight"], UNet(cfg.model).initial("conv_in.weight", cfg.seed))


def test_caption_drop_is_a_function_of_seed_and_position(latents: Any, runtime: Runtime) -> None:
    options = ["conditions.caption.drop=0.3", "batch.global_batch_size=32"]
    stage = make(latents, runtime, *options, "batch.micro_batch_size=16")
    seen = Seen(stage)
    forward, backward = list(range(100, 132)), list(range(131, 99, -1))
    for positions in (forward, backward):
        for index in (0, 16):
            stage.micro_step(stage.dataset.batch(positions[index : index + 16]), index == 16, 0)
        stage.unet.step(32)
    dropped = (torch.cat(seen.contexts) == null_text_of(stage)).flatten(1).all(dim=1)  # [64]
    assert torch.equal(dropped[:32], dropped[32:].flip(0))
    assert 3 <= int(dropped[:32].sum()) <= 18
    other = make(latents, runtime, *options, "seed=1")
    seen_by_other = Seen(other)
    other.micro_step(other.dataset.batch(forward), True, 0)
    dropped_by_other = (seen_by_other.contexts[0] == null_text_of(other)).flatten(1).all(dim=1)
    assert not torch.equal(dropped[:32], dropped_by_other)


def test_no_caption_is_dropped_at_0(latents: Any, runtime: Runtime) -> None:
    stage = make(latents, runtime, "conditions.caption.drop=0", "sampling.guidance_scale=1")
    seen = Seen(stage)
    batch = stage.dataset.batch(range(16))
    stage.micro_step(batch, True, 0)
    assert torch.equal(seen.contexts[0], batch["text"])


def test_draws_are_the_same_on_any_number_of_ranks(latents: Any, runtime: Runtime) -> None:
    stage = make(latents, runtime)
    whole = stage.noisy(next(batches(stage.dataset, 16, 16, 0, 1, start=48, workers=0)), seed=0)
    parts = [
        stage.noisy(batch, seed=0)
        for rank in range(2)
        for _, batch in zip(range(2), batches(stage.dataset, 16, 4, rank, 2, start=48, workers=0), strict=False)
    ]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))
    assert all(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(
            whole, stage.noisy(next(batches(stage.dataset, 16, 16, 0, 1, start=64, workers=0)), seed=0), strict=True
        )
    )


def test_network_works_on_normalised_latents(latents: Any, runtime: Runtime) -> None:
    stage = make(latents, runtime)
    x0 = torch.cat([stage.noisy(stage.dataset.batch_at(range(i, i + 10)), seed=0)[0] for i in range(0, 50, 10)])
    assert x0.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (x0.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_without_cached_text_the_tower_gives_the_same_context(latents: Any, runtime: Runtime) -> None:
    stage = make(latents, runtime)
    batch = stage.dataset.batch(range(8))
    cached = stage.inputs(batch)["text"]
    stage.text_tower = stage.frozen(Clip.from_pretrained(stage.cfg.clip))
    torch.testing.assert_close(stage.inputs(batch)["text"], cached, rtol=2e-3, atol=2e-3)  # the cache is fp16
    tokens = stage.text_tower.tokenize([""])
    torch.testing.assert_close(stage.text_tower.text_states(tokens)[0], null_text_of(stage))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sampling.spacing=leading", "^spacing=leading: would end at a flow's last level"),
        (
            "process={prediction: v, train_timesteps: 10, timestep_sampling: uniform}",
            r"^steps=30: must not exceed process\.train_timesteps=10",
        ),
    ],
)
def test_sampling_that_the_process_cannot_do_is_refused_at_the_start(
    latents: Any, runtime: Runtime, option: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(latents, runtime, option, "sampling.steps=30")


def test_offset_noise_is_one_number_per_sample_and_channel(latents: Any, runtime: Runtime) -> None:
    """Drawn for the sample's position, beside the noise that it has without."""
    plain, offset = make(latents, runtime), make(latents, runtime, "process.offset_noise=0.5")
    parts = [offset.noisy(offset.dataset.batch(range(start, start + 8)), seed=0)[1] for start in (0, 8)]
    batch = plain.dataset.batch(range(16))
    moved = torch.cat(parts) - plain.noisy(batch, seed=0)[1]  # [16, C, h, w]
    means = moved.mean((2, 3), keepdim=True)
    torch.testing.assert_close(moved, means.expand_as(moved), rtol=0, atol=1e-5)
    assert means.unique().numel() == means.numel()
    assert 0.3 < float(means.std()) < 0.7
    torch.testing.assert_close(offset.noisy(batch, seed=0)[1], torch.cat(parts))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_every_prediction_trains(latents: Any, runtime: Runtime, prediction: str) -> None:
    options = [f"process.prediction={prediction}", "process.timestep_sampling=uniform", "optim.lr=3e-3"]
    options += [] if prediction == "flow" else ["process.min_snr_gamma=5"]
    stage = make(latents, runtime, *options)
    batch = stage.dataset.batch(range(16))
    losses = []
    for step in range(25):  # the same samples with the same noise
        losses.append(float(stage.micro_step(batch, True, 16 * step)["train/loss"]))
        stage.finish_step(16 * (step + 1))
    assert losses[-1] < 0.8 * losses[0]


def test_init_from_of_another_architecture_is_refused(project: Any, runtime: Runtime) -> None:
    export = project.folder / "unet" / "export"
    with pytest.raises(UserError, match=r"init_from: its layers_per_block is 1, model\.layers_per_block is 2"):
        make(project, runtime, f"init_from={export}", "model.layers_per_block=2")
    started = make(project, runtime, f"init_from={export}").unet.weights()
    exported = UNet.from_pretrained(export).state_dict()
    assert all(torch.equal(tensor, started[f"unet.{name}"]) for name, tensor in exported.items())


def test_what_init_from_loads_is_not_in_memory_until_it_is_used(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    """Half-precision weights stay half, as their file has them; the training's own are fp32."""
    shutil.copytree(project.folder / "unet" / "export", tmp_path / "export")
    path = tmp_path / "export" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(half, path, metadata)
    stage = make(project, runtime, f"init_from={tmp_path}/export")
    found = load_pretrained(f"{tmp_path}/export", stage.network)
    assert found.keys() == half.keys() and {tensor.dtype for tensor in found.values()} == {torch.float16}
    started = stage.unet.weights()
    assert all(torch.equal(tensor.float(), started[f"unet.{name}"]) for name, tensor in half.items())


def test_another_prediction_than_that_of_init_from_is_told_in_one_line(
    project: Any, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"init_from={project.folder}/unet/export", "process.timestep_sampling=uniform"]
    make(project, runtime, *given)
    assert "init_from" not in capsys.readouterr().out
    make(project, runtime, *given, "process.prediction=eps")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "init_from" in line]
    assert line.endswith("/unet/export: process.prediction was flow, is eps")
    with pytest.raises(UserError, match=r"^init_from=\S+: process\.prediction was flow, is eps: adapters go on"):
        make(project, runtime, *given, "process.prediction=eps", "lora.rank=2")


@pytest.mark.parametrize("same", [True, False])
def test_fine_tuning_normalises_as_the_training_before(
    project: Any, runtime: Runtime, tmp_path: Path, same: bool
) -> None:
    """On any data, as long as one autoencoder made all latents."""
    shutil.copytree(project.folder / "unet" / "export", tmp_path / "export")
    stats = UNetInfo.load(str(tmp_path / "export"))
    before = replace(stats, latent_mean=[1.0] * 4, autoencoder=stats.autoencoder if same else "another")
    before.save(tmp_path / "export")
    stage = make(project, runtime, f"init_from={tmp_path}/export")
    assert stage.info.latent_mean == (before if same else stats).latent_mean
    assert stage.mean.flatten().tolist() == pytest.approx(stage.info.latent_mean)


def test_training_on_images_of_several_shapes(towers: Any, framed: list[str], runtime: Runtime, tmp_path: Path) -> None:
    cfg = towers.config("latents", f"output_dir={tmp_path}/latents", *framed)
    precompute.run_precompute(cfg, runtime, to_plain(cfg))
    given = [f"latents={tmp_path}/latents", f"output_dir={tmp_path}/unet", "batch.global_batch_size=4"]
    cfg = towers.config("unet", *given, "loop.samples=96", "loop.log_every=4")
    stage = UNetStage(cfg, runtime)
    seen = Seen(stage)
    trainer.fit(stage, cfg, runtime)
    assert {tuple(batch.shape[2:]) for batch in seen.latents} == {(8, 8), (6, 10), (10, 6)}
    assert len(seen.latents) == 24 and all(batch.isfinite().all() for batch in seen.latents)


def test_shapes_that_the_network_cannot_halve_are_refused(
    towers: Any, framed: list[str], runtime: Runtime, tmp_path: Path
) -> None:
    cfg = towers.config("latents", f"output_dir={tmp_path}/latents", *framed, "buckets.step=4")
    precompute.run_precompute(cfg, runtime, to_plain(cfg))
    with pytest.raises(UserError, match=r"do not fit model\.block_out_channels.* buckets\.step=8"):
        make(towers, runtime, f"latents={tmp_path}/latents")
