"""What is counted on the meta device against what torch's profiler sees of the real network on the CPU."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from conf.schema import Precision
from conf.schema.networks import UNetConfig
from models.unet import UNet
from train.engine.precision import AUTOCAST, round_weights
from train.planning.activations import StorageCounter, frozen_activations, frozen_unet, unet_activations

ATTEND, UP_ATTEND = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SMALL = UNetConfig(
    block_out_channels=[64, 128, 160],
    layers_per_block=1,
    down_block_types=["DownBlock2D", ATTEND, ATTEND],
    up_block_types=[UP_ATTEND, UP_ATTEND, "UpBlock2D"],
    cross_attention_dim=128,
    head_channels=32,
)
SIDE, TOKENS, BATCH = 16, 77, 2


def seen_by_profiler(low: torch.dtype | None, checkpointing: bool, keep: bool) -> float:
    """Most bytes that a training step holds beyond the weights; `keep`: gradients, too."""
    torch.manual_seed(0)
    network = UNet(SMALL)
    network.checkpoint_gradients(checkpointing)
    for parameter in [] if keep else network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        sample, context = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, TOKENS, 128)
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            prediction = network(sample, torch.linspace(0, 999, BATCH), context)
        prediction.float().square().mean().backward()
    recorded = record.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(held.cumsum(0).max())


@pytest.mark.parametrize(
    ("low", "checkpointing"),
    [(None, False), (None, True), (torch.bfloat16, False)],
    ids=["fp32", "fp32 with checkpointing", "bf16"],
)
def test_a_step_holds_what_was_counted_on_the_meta_device(low: torch.dtype | None, checkpointing: bool) -> None:
    counted = unet_activations(SMALL, BATCH, SIDE, SIDE, TOKENS, low, checkpointing, "cpu")
    assert counted.alone == pytest.approx(seen_by_profiler(low, checkpointing, keep=False), rel=0.1)
    assert counted.with_gradients == pytest.approx(seen_by_profiler(low, checkpointing, keep=True), rel=0.1)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_teacher_holds_what_was_counted_on_the_meta_device(precision: Precision) -> None:
    """Every tensor's storage; what an operator takes for itself alone is a quarter as much without gradients."""
    network = UNet(SMALL).requires_grad_(False)
    round_weights(network, precision)
    low = AUTOCAST.get(precision)
    sample, context = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, TOKENS, 128)
    with StorageCounter("cpu") as counter, torch.no_grad():
        counter.known |= {p.untyped_storage()._cdata: p.nbytes for p in network.parameters()}
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            network(sample, torch.linspace(0, 999, BATCH), context)
    counted = frozen_activations(SMALL, BATCH, SIDE, SIDE, TOKENS, precision, "cpu")
    assert counted.alone == pytest.approx(counter.most, rel=0.1)
    assert counted.alone < 0.3 * unet_activations(SMALL, BATCH, SIDE, SIDE, TOKENS, low, device="cpu").alone
    held = sum(parameter.nbytes for parameter in network.parameters())
    assert sum(parameter.nbytes for parameter in frozen_unet(SMALL, precision).parameters()) == held


def test_activations_grow_linearly_with_the_batch_and_checkpointing_saves_them() -> None:
    one, two, three = (unet_activations(SMALL, batch, 32, 32, TOKENS).alone for batch in (8, 16, 24))
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert unet_activations(SMALL, 8, 32, 32, TOKENS, checkpointing=True).alone < 0.6 * one


def test_low_precision_on_a_gpu_keeps_what_it_normalises_in_fp32() -> None:
    on_gpu, on_cpu = (unet_activations(SMALL, 16, 32, 32, TOKENS, torch.bfloat16, device=d) for d in ("cuda", "cpu"))
    in_fp32 = unet_activations(SMALL, 16, 32, 32, TOKENS)
    assert on_cpu.alone < on_gpu.alone < in_fp32.alone


def test_a_counter_follows_storages_through_views_and_death() -> None:
    with StorageCounter("cpu") as counter:
        first = torch.empty(100)
        view = first[10:]
        del first
        assert counter.live == 400
        torch.empty(50, device="meta")
        del view
        assert (counter.live, counter.most) == (0, 400)
