"""Means over steps and processes, and what the timings are made of."""

import json
import math

import pytest
import torch

from conf.plain_json import dumps
from conf.schema import Device, Precision, RuntimeConfig
from train.engine import meter as module_under_test
from train.engine.accelerators import peak_flops
from train.engine.meter import Clock, Meter, busy_seconds
from train.engine.runtime import Runtime, start


@pytest.fixture
def runtime() -> Runtime:
    return start(RuntimeConfig(device=Device.cpu))


def test_sums_with_weights_are_means_over_what_they_count(runtime: Runtime) -> None:
    meter = Meter({})
    for pair in ([6.0, 3.0], [0.0, 0.0], [2.0, 1.0]):
        meter.add({"quarter": torch.tensor(pair), "loss": pair[0], "never": torch.tensor([0.0, 0.0])})
        meter.tick(4, 0.5, 0.1)
    report = meter.report(runtime, 12, own_s=0.6, flops_per_sample=1e12)
    assert report["quarter"] == 2.0 and report["loss"] == pytest.approx(8 / 3) and "never" not in report
    assert report["perf/images_per_s"] == 8.0 and report["perf/tflops_per_device"] == 8.0
    assert report["perf/eta_s"] == 1.5 and report["perf/data_wait_share"] == pytest.approx(0.2)
    assert "perf/mfu" not in report  # nobody knows the peak of a CPU


def test_a_micro_batch_counts_by_its_samples(runtime: Runtime) -> None:
    """Squares of 0 to 4 in batches of two and three; what comes as a sum has its own weight."""
    meter = Meter({})
    for part in (torch.arange(2.0), torch.arange(2.0, 5.0)):
        metrics = {"loss": part.square().mean(), "quarter": torch.stack([part.sum(), torch.tensor(float(len(part)))])}
        meter.add(metrics, weight=len(part) * 2 / 5)
    meter.tick(5, 1.0, 0.0)
    report = meter.report(runtime, 0, 1.0, 0.0)
    assert report["loss"] == pytest.approx(30 / 5) and report["quarter"] == 2.0


def test_an_interval_goes_on_where_it_was_interrupted(runtime: Runtime) -> None:
    whole, first = Meter({}), Meter({})
    for value in (1.0, 2.0):
        for meter in (whole, first):
            meter.add({"loss": value, "quarter": torch.tensor([value, 3.0])})
    second = Meter(first.state(runtime))
    for meter in (whole, second):
        meter.add({"loss": 6.0, "quarter": torch.tensor([4.0, 1.0])})
        meter.tick(1, 1.0, 0.0)
    means = [{k: v for k, v in m.report(runtime, 0, 0.0, 0.0).items() if "perf" not in k} for m in (whole, second)]
    assert means[0] == means[1] == {"loss": 3.0, "quarter": 1.0}


def test_an_interval_whose_sums_were_not_finite_goes_on_from_json(runtime: Runtime) -> None:
    first = Meter({})
    first.add({"psnr": math.nan, "loss": 1.0})
    second = Meter(json.loads(dumps(first.state(runtime))))
    assert {name: math.isnan(total[0]) for name, total in second.totals.items()} == {"psnr": True, "loss": False}


def test_percentiles_show_the_slow_steps(runtime: Runtime) -> None:
    meter = Meter({})
    for step_s in [0.1] * 99 + [2.0]:
        meter.tick(1, step_s, 0.0)
    report = meter.report(runtime, 0, 1.0, 0.0)
    assert report["perf/step_ms_p50"] == pytest.approx(100) and report["perf/step_ms_p95"] == pytest.approx(100)
    assert report["perf/step_ms_p100"] == pytest.approx(2000) and report["perf/slowest_rank"] == 0


def test_the_slowest_of_several_processes_is_named(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [(3.0, 0.1, 1.0), (6.0, 0.3, 4.0), (3.0, 0.2, 2.0)]  # own seconds, share of waiting, memory
    monkeypatch.setattr(Runtime, "gather_objects", lambda self, value: own)
    meter = Meter({})
    meter.tick(1, 1.0, 0.0)
    report = meter.report(runtime, 0, 3.0, 0.0)
    assert report["perf/slowest_rank"] == 1 and report["perf/slowest_rank_lag"] == pytest.approx(0.5)
    assert report["perf/memory_gib"] == 4.0 and report["perf/data_wait_share"] == pytest.approx(0.2)


def test_share_of_the_peak_where_the_device_is_known(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    meter = Meter({})
    meter.tick(195, 10.0, 0.0)
    assert meter.report(runtime, 0, 1.0, 1e11)["perf/mfu"] == pytest.approx(0.1)  # of 19.5 TFLOP/s in fp32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 0),
    ],
)
def test_devices_are_known_by_their_names(name: str, tflops: float) -> None:
    assert peak_flops(name, Precision.bf16) == tflops * 1e12


def test_clock_reads_what_passed_since_the_last_reading() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            math.factorial(2000)
    assert clock.read() > 0 and clock.read() == 0


def test_a_device_is_busy_while_any_of_its_kernels_runs() -> None:
    assert busy_seconds([(5e6, 7e6), (0.0, 1e6), (0.5e6, 2e6), (1e6, 1.5e6)]) == 4.0
    assert busy_seconds([]) == 0.0
