"""The autoencoder's training: what it learns, when the discriminator joins, and what no batch layout may change."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from data.images import in_range
from models.autoencoder import Autoencoder, kl
from models.discriminator import discriminator_loss
from train.engine.metric_log import MetricLog
from train.engine.runtime import Runtime
from train.training.autoencoder import AutoencoderStage


def make(scenes: Any, runtime: Runtime, *overrides: str) -> AutoencoderStage:
    return AutoencoderStage(scenes.config("autoencoder", "loss.perceptual=none", *overrides), runtime)


def train(stage: AutoencoderStage, start: int, positions: list[list[int]]) -> dict[str, Tensor]:
    """One step from these micro-batches; metrics of the last one."""
    metrics: dict[str, Tensor] = {}
    for index, part in enumerate(positions):
        metrics = stage.micro_step(stage.dataset.batch(part), index == len(positions) - 1, start)
    stage.finish_step(start + 16)
    return metrics


def test_reconstructions_get_better(towers: Any) -> None:
    losses = towers.losses("autoencoder")
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    done = json.loads((towers.folder / "autoencoder" / "DONE").read_text())
    assert done["metrics"]["eval/psnr"] > 11
    assert {"train/psnr", "train/kl", "train/reconstruction", "train/grad_norm", "train/lr"} <= towers.rows(
        "autoencoder"
    )[0].keys()


def test_export_is_the_trained_network(towers: Any) -> None:
    network = Autoencoder.from_pretrained(towers.folder / "autoencoder" / "export")
    stage_weights = towers.folder / "autoencoder" / "checkpoints" / "000000001600" / "generator" / "weights.safetensors"
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in load_file(stage_weights).items())


def test_discriminator_joins_at_its_start_and_not_before(scenes: Any, runtime: Runtime) -> None:
    stage = make(scenes, runtime, "loss.adversarial_start=32")
    untouched = stage.critic.weights()
    for start in (0, 16):
        metrics = train(stage, start, [list(range(start, start + 16))])
        assert not any("gan" in name for name in metrics)
        assert all(torch.equal(tensor, untouched[name]) for name, tensor in stage.critic.weights().items())
    metrics = train(stage, 32, [list(range(32, 48))])
    assert {"train/gan_generator", "train/gan_discriminator", "train/gan_weight"} <= metrics.keys()
    assert not all(torch.equal(tensor, untouched[name]) for name, tensor in stage.critic.weights().items())


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of its own looks
def test_less_memory_or_a_compiler_change_no_step(
    scenes: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Neither what the networks learn nor the adaptive weight, which walks the graph a first time and keeps it."""
    real, blocks = torch.compile, list[Any]()

    def traced(function: Any) -> Any:  # as torch.compile does, without the minutes of code generation
        blocks.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    overrides = ["loss.adversarial_start=0", "loss.r1_weight=1", "model.mid_block_add_attention=true"]
    plain, other = (make(scenes, runtime, *overrides, *more) for more in ([], [f"runtime.{option}=true"]))
    levels = [other.autoencoder.encoder.down_blocks[0], other.autoencoder.decoder.up_blocks[0]]
    runs = [0, 0]
    for number, level in enumerate(levels):
        level.resnets[0].register_forward_pre_hook(lambda *_, n=number: runs.__setitem__(n, runs[n] + 1))
    for start in (0, 16):
        expected, found = (train(stage, start, [list(range(start, start + 16))]) for stage in (plain, other))
        assert expected.keys() == found.keys() >= {"train/gan_weight", "train/r1"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for name, weight in plain.generator.weights().items():
        torch.testing.assert_close(other.generator.weights()[name], weight, rtol=1e-5, atol=1e-6)
    assert (len(blocks), runs) == (8, runs) if option == "compile" else (len(blocks), runs) == (0, [4, 4])


def test_discriminator_learns_from_its_own_loss_alone(scenes: Any, runtime: Runtime) -> None:
    stage = make(scenes, runtime, "loss.adversarial_start=0")
    batch = stage.dataset.batch(range(16))
    seen: list[Tensor] = []
    stage.critic.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    stage.micro_step(batch, True, 0)
    found = [parameter.grad.clone() for parameter in stage.critic.module.parameters()]
    stage.critic.module.zero_grad()
    real, fake = stage.critic.module(seen[-1]).chunk(2)  # [images; reconstructions]
    assert torch.equal(seen[-1][:16], in_range(batch["pixels"]))
    discriminator_loss(real, fake).backward()
    for ours, parameter in zip(found, stage.critic.module.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_no_adversarial_weight_means_no_discriminator(scenes: Any, runtime: Runtime) -> None:
    stage = make(scenes, runtime, "loss.adversarial_weight=0", "loss.adversarial_start=0")
    assert list(stage.trainables) == ["generator"]
    assert not any("gan" in name for name in train(stage, 0, [list(range(16))]))


def test_accumulation_takes_the_step_of_the_whole_batch(scenes: Any, runtime: Runtime) -> None:
    whole, parts = make(scenes, runtime), make(scenes, runtime, "batch.micro_batch_size=4")
    norms = []
    for stage, size in ((whole, 16), (parts, 4)):
        for index in range(0, 16, size):
            stage.micro_step(stage.dataset.batch(range(index, index + size)), index == 16 - size, 0)
        norms.append(float(stage.finish_step(16)["train/grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in whole.generator.weights().items():
        torch.testing.assert_close(tensor, parts.generator.weights()[name], rtol=0, atol=4e-4)  # a fifth of lr


def test_loss_is_its_terms_with_their_weights(scenes: Any, runtime: Runtime) -> None:
    stage = make(scenes, runtime, "loss.perceptual=efficientnet", "loss.perceptual_weight=0.3", "loss.kl_weight=0.01")
    images = in_range(stage.dataset.batch(range(4))["pixels"])
    output, moments = stage.autoencoder(images, torch.zeros(4, 4, 8, 8))
    metrics, likelihood, loss = stage.reconstruction_loss(images, output, moments)
    distance = (output - images).abs().mean() + 0.3 * stage.perceptual(output, images).mean()
    torch.testing.assert_close(likelihood, distance)
    torch.testing.assert_close(loss, distance + 0.01 * kl(moments).mean() / (3 * 32 * 32))
    assert {"train/reconstruction", "train/perceptual", "train/kl", "train/psnr", "train/loss"} == metrics.keys()


def test_codebook_takes_the_place_of_the_divergence(scenes: Any, runtime: Runtime, tmp_path: Any) -> None:
    vq = ["model.num_vq_embeddings=64", "model.latent_channels=3", "loss.codebook_weight=0.7", "optim.lr=2e-3"]
    stage = make(scenes, runtime, *vq)
    images = in_range(stage.dataset.batch(range(4))["pixels"])
    output, quantised = stage.autoencoder(images, torch.zeros(0))
    _, likelihood, loss = stage.reconstruction_loss(images, output, quantised)
    torch.testing.assert_close(loss, likelihood + 0.7 * quantised.loss)
    metrics = [train(stage, start, [list(range(start, start + 16))]) for start in range(0, 20 * 16, 16)]
    assert metrics[-1]["train/reconstruction"] < metrics[0]["train/reconstruction"]
    assert 0 < metrics[-1]["train/codebook_use"] <= 1 and "train/kl" not in metrics[-1]
    evaluated = stage.evaluate(320, MetricLog(tmp_path, stage.cfg.wandb, "autoencoder", {}, is_main=False))
    assert 0 < evaluated["eval/codebook_use"] <= 1
    stage.export(tmp_path / "export")
    assert Autoencoder.from_pretrained(tmp_path / "export").cfg == stage.cfg.model


def test_regularised_discriminator_learns_the_same_in_parts(scenes: Any, runtime: Runtime) -> None:
    options = ["loss.adversarial=non_saturating", "loss.r1_weight=0.5", "loss.lecam_weight=0.1"]
    means = []
    for size in (16, 4):
        stage = make(scenes, runtime, *options, "loss.adversarial_start=0", f"batch.micro_batch_size={size}")
        for start in (0, 16):
            metrics = train(stage, start, [list(range(i, i + size)) for i in range(start, start + 16, size)])
        assert {"train/r1", "train/lecam"} <= metrics.keys()
        means.append(stage.critic.weights()["verdict_means"])  # and so in every checkpoint
    assert means[0].abs().min() > 0
    torch.testing.assert_close(*means, rtol=0.02, atol=1e-6)


def test_running_verdicts_are_those_of_the_samples_in_uneven_parts(scenes: Any, runtime: Runtime) -> None:
    batch = ["batch.global_batch_size=3", "batch.micro_batch_size=2", "batch.uneven=true"]
    stage = make(scenes, runtime, *batch, "loss.lecam_weight=0.1")
    stage.verdicts = [torch.tensor([0.0, 3.0]), torch.tensor([3.0, 0.0])]  # of one image and of two
    stage.follow_verdicts()
    real, fake = stage.verdict_means
    assert float(real / fake) == pytest.approx(2) and stage.verdicts == []


def test_rank_without_held_out_images_joins_the_sum(scenes: Any, runtime: Runtime, tmp_path: Any) -> None:
    stage = make(scenes, runtime)
    journal = MetricLog(tmp_path, stage.cfg.wandb, "autoencoder", {}, is_main=False)
    first = stage.evaluate(0, journal)
    stage.runtime = replace(runtime, rank=300, world=301)  # the sum itself is over this process alone
    beyond = stage.evaluate(0, journal)
    assert beyond.keys() == first.keys() and set(beyond.values()) == {0.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["discriminator.layers=4"], r"discriminator\.layers=4: needs images\.resolution>=48"),
        (["init_from={export}", "model.latent_channels=8"], r"init_from: its latent_channels is 4, model\.latent_chan"),
        (["init_from={folder}/nowhere"], "nowhere"),
        (["loss.perceptual=lpips"], "loss.perceptual=lpips needs"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    towers: Any,
    runtime: Runtime,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights of VGG16 here
    names = {"export": towers.folder / "autoencoder" / "export", "folder": towers.folder}
    with pytest.raises(UserError, match=message):
        make(towers, runtime, *(override.format(**names) for override in overrides))


def test_init_from_begins_where_another_training_ended(towers: Any, runtime: Runtime) -> None:
    export = towers.folder / "autoencoder" / "export"
    started = make(towers, runtime, f"init_from={export}").generator.weights()
    exported = Autoencoder.from_pretrained(export).state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in started.items())
