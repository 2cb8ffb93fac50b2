"""The plan of a training: against a real network and published runs, and what follows from what."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conf.entry import compose
from conf.errors import UserError
from conf.schema import (
    BatchConfig,
    DistillMethod,
    EmaConfig,
    OptimConfig,
    PlanRun,
    Precision,
    Prediction,
    ProcessConfig,
    Spacing,
    UNetRun,
    UNetRuntimeConfig,
)
from data.latent_record import LatentWriter
from models.diffusion.process import Process
from models.unet import UNet
from train.engine.precision import round_weights
from train.engine.runtime import Runtime
from train.engine.trainable import Trainable
from train.planning.activations import Activations
from train.planning.cost_report import PLAN, print_cost
from train.planning.estimate import (
    Cost,
    activations,
    encoder_flops,
    estimate,
    flows,
    images_per_second,
    on_the_line,
    parameters,
    seconds,
    training_flops,
)
from train.planning.memory import Sharding
from train.training.distillation.consistency import Levels, consistency_loss
from train.training.distillation.continuous import continuous_loss
from train.training.distillation.guidance import guidance_loss

SD2 = ["model.attention_head_dim=[5,10,20,20]", "model.cross_attention_dim=1024", "model.use_linear_projection=true"]
SDXL = [
    "model.sample_size=128",
    "model.block_out_channels=[320,640,1280]",
    "model.down_block_types=[DownBlock2D,CrossAttnDownBlock2D,CrossAttnDownBlock2D]",
    "model.up_block_types=[CrossAttnUpBlock2D,CrossAttnUpBlock2D,UpBlock2D]",
    "model.attention_head_dim=[5,10,20]",
    "model.transformer_layers_per_block=[1,2,10]",
    "model.cross_attention_dim=2048",
    "model.use_linear_projection=true",
    "model.addition_embed_type=text_time",
    "model.addition_time_embed_dim=256",
    "model.projection_class_embeddings_input_dim=2816",
]
SMALL = ["experiment=smoke", "gpus=2", "batch.global_batch_size=16"]
MLPERF = {8: (512, 1018), 64: (1024, 7055), 1024: (2048, 49760)}  # H100s: samples per step, images/s


def config(*overrides: str) -> PlanRun:
    return compose("plan", PlanRun, ["run_dir=unused", *overrides])


@pytest.fixture(scope="module")
def small() -> Cost:
    return estimate(config(*SMALL))


@pytest.mark.parametrize("gpus", MLPERF)
def test_published_throughputs_of_mlperf_come_out(gpus: int) -> None:
    batch, published = MLPERF[gpus]
    # Gradients hidden behind the arithmetic, as theirs; they travel in 16 bits there and in fp32 here.
    options = ["accelerator=h100", f"gpus={gpus}", f"batch.global_batch_size={batch}", "runtime.backend=ddp"]
    assert images_per_second(config(*SD2, *options)) == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize(("side", "published"), [(32, 1100), (64, 290)])
def test_published_throughputs_of_the_a100_come_out(side: int, published: int) -> None:
    options = ["accelerator=a100", "gpus=8", "batch.global_batch_size=2048", f"model.sample_size={side}"]
    assert images_per_second(config(*SD2, *options)) == pytest.approx(published, rel=0.25)


def test_mlperf_s_micro_batch_of_64_is_found_to_fit() -> None:
    cfg = config(*SD2, "accelerator=h100", "gpus=8", "batch.global_batch_size=512", "ema.half_life_samples=0")
    cost = estimate(cfg)
    assert cost.micro_batch == 64 and cost.option(cfg).footprint.total <= cost.budget
    assert cost.option(cfg).largest_micro_batch < 128


def test_sdxl_is_planned_without_the_memory_it_needs() -> None:
    cfg = config(*SDXL)
    assert parameters(cfg) == 2_567_463_684
    assert training_flops(cfg) == pytest.approx(3 * 6.63e12, rel=0.01)
    assert activations(cfg, 8).alone > 40e9


def test_state_on_paper_is_what_a_trainable_holds(runtime: Runtime) -> None:
    cfg = config(*SMALL)
    network = UNet(cfg.model)
    elements = sum(parameter.numel() for parameter in network.parameters())
    batch, stage_1 = BatchConfig(global_batch_size=1), UNetRuntimeConfig(zero_stage=1)
    t = Trainable(runtime, network, OptimConfig(), batch, 10, stage_1, EmaConfig(), "unet")
    for master in t.backend.masters:
        t._state_of(master)
    moments = [state[key] for state in t.backend.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert t.ema is not None
    held = Sharding(elements, 1, 1).footprint(Activations(0, 0))
    assert held.weights == sum(parameter.nbytes for parameter in network.parameters())
    assert held.optimizer == pytest.approx(sum(tensor.nbytes for tensor in [*t.backend.masters, *moments]), rel=0.001)
    assert held.average == pytest.approx(sum(tensor.nbytes for tensor in t.ema.shards), rel=0.001)


def test_a_checkpoint_takes_what_was_planned(runtime: Runtime, tmp_path: Path, small: Cost) -> None:
    cfg = config(*SMALL)
    network: nn.Module = UNet(cfg.model)
    t = Trainable(runtime, network, OptimConfig(), BatchConfig(global_batch_size=1), 10, None, cfg.ema, "unet")
    t.save(tmp_path)
    written = sum(path.stat().st_size for path in (tmp_path / "unet").iterdir())
    assert small.checkpoint_bytes == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_higher_stage_never_keeps_more(accumulate: bool, offload: bool) -> None:
    sharding = Sharding(2_000_000_000, 64, 1, offload, accumulate=accumulate)
    kept = []
    for stage in (0, 1, 2, 3) if not offload else (1, 2, 3):
        part = replace(sharding, stage=stage).footprint(Activations(10**9, 9 * 10**9))
        kept.append(part.weights + part.optimizer + part.average)
    assert kept == sorted(kept, reverse=True)


def test_offload_and_more_processes_need_less_of_each_gpu() -> None:
    for stage in (1, 2, 3):
        sharding = Sharding(800_000_000, 8, stage)
        part = sharding.footprint(Activations(10**9, 4 * 10**9))
        away = replace(sharding, offload=True).footprint(Activations(10**9, 4 * 10**9))
        wide = replace(sharding, processes=64).footprint(Activations(10**9, 4 * 10**9))
        assert away.total < part.total and wide.total < part.total and away.host > 0 == part.host


def test_largest_micro_batch_is_the_largest(small: Cost) -> None:
    cfg = config(*SMALL)
    largest = small.option(cfg).largest_micro_batch
    there = estimate(config(*SMALL, f"batch.global_batch_size={2 * largest}"))
    assert there.option(cfg).footprint.total == pytest.approx(small.budget, rel=0.05)
    assert there.option(cfg).largest_micro_batch == pytest.approx(largest, rel=0.05)


def test_between_and_beyond_two_batches_activations_lie_on_the_line() -> None:
    once, twice = Activations(10, 14), Activations(18, 19)
    assert on_the_line(once, twice, 1, 7) == once and on_the_line(once, twice, 2, 7) == twice
    assert on_the_line(once, twice, 4, 7) == Activations(34, 34)
    assert on_the_line(once, twice, 0.25, 13) == Activations(4, 13)


def test_record_is_as_large_as_those_of_a_cache(tmp_path: Path, small: Cost) -> None:
    model = config(*SMALL).model
    with LatentWriter(tmp_path, 100, config(*SMALL).dtype) as writer:
        for i in range(100):
            moments = np.ones((1, 2 * model.in_channels, model.sample_size, model.sample_size), dtype=np.float32)
            text = np.ones((77, model.cross_attention_dim or 0), dtype=np.float32)
            writer.add(f"{i:05d}", moments, np.ones(77), "a red planet", {"width": 64, "height": 64, "cuts": []}, text)
        size = sum(info.bytes for info in writer.close())
    assert small.record_bytes == pytest.approx(size / 100, rel=0.05)
    assert small.cache_bytes == small.record_bytes * 512


def test_what_is_slower_costs_more_gpu_hours(small: Cost) -> None:
    for slower in ("accelerator=a100", "mfu=0.1", "runtime.gradient_checkpointing=true", "network_gbps=1"):
        options = [*SMALL, slower, "gpus_per_machine=1"]
        assert images_per_second(config(*options)) < small.images_per_s
    assert small.gpu_hours == pytest.approx(2 * 512 / small.images_per_s / 3600)


def printed(cfg: PlanRun, cost: Cost) -> str:
    stream = io.StringIO()
    print_cost(cfg, cost, Console(file=stream, width=100))
    return stream.getvalue()


def test_experiment_of_a_student_is_planned_as_one(tmp_path: Path) -> None:
    cfg, teacher_s = config("experiment=distill_sd1", f"output_dir={tmp_path}"), config("experiment=sd1_512")
    assert cfg.method is DistillMethod.lcm and cfg.model == teacher_s.model and cfg.refusal() == ""
    assert (cfg.batch.global_batch_size, cfg.loop.samples, cfg.optim.lr) == (16, 64000, 1e-6)
    assert config("experiment=distill_sd1").output_dir == "unused/plan"
    assert teacher_s.method is None and config(*SMALL).method is None  # which has a student beside its U-Net


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_teacher_is_held_whole_by_every_process(small: Cost, precision: Precision) -> None:
    options = [*SMALL, f"runtime.precision={precision.value}"]
    plain, taught = config(*options), config(*options, "method=lcm")
    network = UNet(taught.model)
    round_weights(network, precision)
    held = sum(parameter.nbytes for parameter in network.parameters())
    for alone, beside in zip(estimate(plain).options, estimate(taught).options, strict=True):
        assert beside.footprint.total == alone.footprint.total + held
        assert beside.largest_micro_batch < alone.largest_micro_batch
    assert estimate(config(*options, "method=consistency_training")).options[0].footprint.teacher == 0


@pytest.mark.parametrize("method", DistillMethod)
def test_distillation_takes_the_planned_operations(method: DistillMethod) -> None:
    cfg, batch, meta = config(*SMALL, f"method={method.value}"), 2, torch.device("meta")
    process, side = Process(ProcessConfig(prediction=Prediction.v)), cfg.model.sample_size
    with meta:
        student, teacher = UNet(cfg.model), UNet(cfg.model).requires_grad_(False)
        text = torch.zeros(2 * batch, cfg.tokens, cfg.model.cross_attention_dim or 0)
        x0, u = torch.zeros(batch, cfg.model.in_channels, side, side), torch.zeros(batch)
    levels = Levels(process, 10, Spacing.trailing, None).to(meta).neighbours(u, x0)

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        uncond, cond = teacher(torch.cat([x, x]), torch.cat([timesteps, timesteps]), text).chunk(2)
        return 3 * cond - 2 * uncond

    def told(x: Tensor, timesteps: Tensor) -> Tensor:
        return student(x, timesteps, text[:batch])

    answers = guided if method is DistillMethod.lcm else None
    with FlopCounterMode(display=False) as counter:
        if method is DistillMethod.scm:
            found = continuous_loss(told, guided, process, levels[0], x0, x0, 1.0)
        elif method is DistillMethod.guidance:
            found = guidance_loss(told, guided, process, levels[0], x0, x0)
        else:
            found = consistency_loss(told, answers, process, levels, x0, x0, 0.001)
        found.losses.sum().backward()
    # backwards a little less than twice forwards: no gradient of the text and the latents is asked for
    assert training_flops(cfg) == pytest.approx(counter.get_total_flops() / batch, rel=0.03)


def test_teacher_s_passes_cost_time_and_its_target_is_gathered_too() -> None:
    sharded = [*SMALL, "runtime.backend=fsdp"]
    (plain, taught) = (estimate(config(*sharded, *method)) for method in ([], ["method=lcm"]))
    assert taught.compute_s == pytest.approx(2 * plain.compute_s)
    assert taught.host_s > plain.host_s
    # in bf16 the weights travel forwards once more: 2 bytes beside the 8 of each
    assert taught.exchange.beside_bytes == pytest.approx(plain.exchange.beside_bytes * 10 / 8)


def test_copies_of_a_network_keep_the_gathers_within_a_machine() -> None:
    options = [*SMALL, "runtime.backend=fsdp", "gpus=64", "batch.global_batch_size=64"]
    hybrid, wide = (flows(config(*options, *more), 0) for more in ([], ["runtime.shard_processes=64"]))
    assert [(flow.kind, flow.processes, flow.stride) for flow in hybrid] == [
        ("gather", 8, 1),
        ("scatter", 8, 1),
        ("sum", 8, 8),
    ]
    assert {flow.processes for flow in wide} == {64}
    slow, fast = (config(*options, f"network_gbps={speed}") for speed in (1, 100))
    times = [[seconds(cfg, flow) for flow in hybrid] for cfg in (slow, fast)]
    assert times[0][:2] == times[1][:2] and times[0][2] > times[1][2]


def test_a_plan_of_any_number_of_processes_that_cut_the_network_compares_the_other_backends_too() -> None:
    options = [*SMALL, "runtime.backend=fsdp", "gpus=16", "batch.global_batch_size=16", "runtime.shard_processes=16"]
    assert {way.backend for way in estimate(config(*options)).ways} == {"ddp", "deepspeed", "fsdp"}


def test_machines_that_hold_copies_need_the_memory_of_their_share() -> None:
    hybrid = Sharding(2_000_000_000, 8, 3, units=(40_000_000,) * 50)
    wide = replace(hybrid, processes=64)
    part, less = (sharding.footprint(Activations(10**9, 9 * 10**9)) for sharding in (hybrid, wide))
    assert part.optimizer == 2 * part.weights == 2 * part.average == 8 * less.optimizer == 2 * 4 * hybrid.elements / 8
    second = replace(hybrid, units=(), processes=64, machine=8).footprint(Activations(0, 0))
    alone = replace(hybrid, units=(), processes=64).footprint(Activations(0, 0))
    assert second.weights - alone.weights == 4 * 10**9 / 8  # of the billion that ZeRO 3 lets go of between passes


def test_an_uneven_batch_takes_as_long_as_the_largest_share(tmp_path: Path, small: Cost) -> None:
    cfg = config(*SMALL, "gpus=3", "batch.uneven=true", f"output_dir={tmp_path}")  # 16 = 5 + 5 + 6
    cost, even = estimate(cfg), estimate(config(*SMALL, "batch.global_batch_size=12"))
    assert (cost.micro_batch, cost.accumulation) == (even.micro_batch, even.accumulation) == (6, 1)
    assert cost.compute_s == even.compute_s and cost.option(cfg).footprint.total < even.option(cfg).footprint.total
    assert "16 = 3 GPUs x micro-batches of up to 6 x" in printed(cfg, cost)
    assert "16 = 2 GPUs x micro-batches of 8 x" in printed(config(*SMALL, f"output_dir={tmp_path}"), small)


def test_report_says_whether_it_fits_and_leaves_the_same_as_json(tmp_path: Path, small: Cost) -> None:
    cfg = config(*SMALL, f"output_dir={tmp_path}")
    assert "Fits: " in printed(cfg, small)
    written: dict[str, Any] = json.loads((tmp_path / PLAN).read_text())
    assert written["images_per_s"] == small.images_per_s and len(written["options"]) == 9
    tight = printed(cfg, replace(small, budget=small.options[1].footprint.total - 1))
    assert "Does not fit: " in tight and "runtime.gradient_checkpointing=true" in tight


def test_a_training_that_is_refused_is_priced_and_says_so(tmp_path: Path, small: Cost) -> None:
    refused = config(*SMALL, f"output_dir={tmp_path}", "model.class_embed_type=timestep")
    assert "train_unet.py refuses this training: model.class_embed_type=timestep" in printed(refused, small)
    assert "class_embed_type" in json.loads((tmp_path / PLAN).read_text())["refusal"]
    assert "refuses" not in printed(config(*SMALL, f"output_dir={tmp_path}"), small)
    assert json.loads((tmp_path / PLAN).read_text())["refusal"] == ""
    sdxl = config("model=sdxl", f"output_dir={tmp_path}")
    assert sdxl.refusal().startswith("model.addition_embed_type=text_time")
    with pytest.raises(UserError, match="addition_embed_type"):
        compose("train_unet", UNetRun, ["model=sdxl"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gpus=7", r"batch\.global_batch_size=256: must be a multiple of 7"),
        ("gpus=12", r"gpus=12: must be a multiple of gpus_per_machine=8, or fit into one"),
        ("gpus=0", r"gpus=0: must be positive"),
        ("mfu=30", r"mfu=30\.0: must be in \(0, 1\]"),
        ("model.sample_size=60", r"model\.sample_size=60: must be a multiple of 8"),
        ("accelerator=a1000", r"accelerator=a1000"),
        ("network_gbps=-1", r"network_gbps=-1\.0: must be 0 or positive"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(option: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        config(option)
    assert "\n" not in str(refused.value)


def test_the_encoder_s_pass_is_that_of_the_published_autoencoder() -> None:
    """0.273 TFLOP at 256 pixels, 1.117 at 512, where the middle's attention weighs more."""
    assert encoder_flops(config("model.sample_size=32")) == pytest.approx(0.273e12, rel=0.01)
    assert encoder_flops(config("model.sample_size=64")) == pytest.approx(1.117e12, rel=0.01)
