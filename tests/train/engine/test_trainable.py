"""What holds of one trainable on one process, under each backend; equality with plain torch: test_zero_equality.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import BackendName, BatchConfig, Device, EmaConfig, OptimConfig, UNetRuntimeConfig
from train.engine.contents import HostMemory
from train.engine.runtime import Runtime, start
from train.engine.trainable import Trainable

ZERO, FSDP = UNetRuntimeConfig(zero_stage=2), UNetRuntimeConfig(backend=BackendName.fsdp)
LAYOUTS = pytest.mark.parametrize("cfg", [None, ZERO, FSDP], ids=["ddp", "zero2", "fsdp"])


@pytest.fixture
def runtime() -> Runtime:
    return start(UNetRuntimeConfig(device=Device.cpu))


def network(seed: int = 0, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def make(
    runtime: Runtime, module: nn.Module, cfg: UNetRuntimeConfig | None = None, micro: int = 0, **rest: Any
) -> Trainable:
    batch = BatchConfig(global_batch_size=4, micro_batch_size=micro)
    return Trainable(runtime, module, OptimConfig(lr=0.01), batch, 100, cfg, **rest)


def train(t: Trainable, steps: int = 2) -> None:
    for index in range(steps):
        x: Tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
        t.backward(t(x).square().mean(), last=True)
        t.step(4 * (index + 1))


@LAYOUTS
def test_checkpoint_carries_weights_moments_and_buffers(
    runtime: Runtime, tmp_path: Path, cfg: UNetRuntimeConfig | None
) -> None:
    first = make(runtime, network(), cfg, ema=EmaConfig(half_life_samples=10.0))
    train(first)
    first.save(tmp_path)
    files = {path.name for path in (tmp_path / "model").iterdir()}
    moments = {"exp_avg.safetensors", "exp_avg_sq.safetensors"}
    assert files == moments | {"weights.safetensors", "ema.safetensors", "optimizer.json"}
    assert load_file(tmp_path / "model" / "weights.safetensors").keys() == network().state_dict().keys()
    second = make(runtime, network(1), cfg, ema=EmaConfig(half_life_samples=10.0))
    second.load(tmp_path)
    for t in (first, second):
        train(t)
    for ema in (False, True):
        assert all(torch.equal(tensor, second.weights(ema)[name]) for name, tensor in first.weights(ema).items())
    assert first.module[1].num_batches_tracked == second.module[1].num_batches_tracked == 4


@LAYOUTS
def test_every_average_is_carried_on(runtime: Runtime, tmp_path: Path, cfg: UNetRuntimeConfig | None) -> None:
    ema = EmaConfig(half_life_samples=10.0, more_half_lives=[3.0], posthoc=[0.05, 0.1], on_cpu=True)
    first, second = (make(runtime, network(seed), cfg, ema=ema) for seed in (0, 1))
    train(first)
    first.save(tmp_path)
    names = {"ema", "ema-3", "posthoc-0.05", "posthoc-0.1"}
    assert {path.stem for path in (tmp_path / "model").iterdir()} > names
    second.load(tmp_path)
    for t in (first, second):
        train(t)
    assert first.ema is not None and second.ema is not None and first.ema.averages.keys() == names
    for name, shards in first.ema.averages.items():
        assert all(torch.equal(a, b) for a, b in zip(shards, second.ema.averages[name], strict=True))


def test_channels_last_network_resumes(runtime: Runtime, tmp_path: Path) -> None:
    first, second = (make(runtime, nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)) for _ in range(2))
    for t in (first, first, second):
        t.backward(t(torch.ones(4, 3, 5, 5)).square().mean(), last=True)
        t.step(4)
    first.save(tmp_path)
    second.load(tmp_path)
    assert all(torch.equal(tensor, second.weights()[name]) for name, tensor in first.weights().items())


def half_frozen(seed: int = 0) -> nn.Sequential:
    module = network(seed)
    module[0].requires_grad_(False)
    return module


@pytest.mark.parametrize("cfg", [None, UNetRuntimeConfig(zero_stage=0), UNetRuntimeConfig(zero_stage=1), ZERO])
def test_frozen_parameters_stay_and_are_not_saved(
    runtime: Runtime, tmp_path: Path, cfg: UNetRuntimeConfig | None
) -> None:
    first, second = (make(runtime, half_frozen(), cfg, ema=EmaConfig(half_life_samples=10.0)) for _ in range(2))
    train(first)
    first.save(tmp_path)
    frozen = {"0.weight", "0.bias"}
    trained = {name for name, _ in network().named_parameters()} - frozen
    saved = {path.stem: load_file(path).keys() for path in (tmp_path / "model").glob("*.safetensors")}
    assert saved["exp_avg"] == saved["exp_avg_sq"] == saved["ema"] == trained
    assert saved["weights"] == network().state_dict().keys() - frozen
    second.load(tmp_path)
    for t in (first, second):
        train(t)
    for ema in (False, True):
        assert all(torch.equal(tensor, second.weights(ema)[name]) for name, tensor in first.weights(ema).items())
        assert all(torch.equal(first.weights(ema)[name], network().state_dict()[name]) for name in frozen)


def test_resuming_beside_other_frozen_parameters_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    make(runtime, half_frozen()).save(tmp_path)
    for other in (half_frozen(1), network()):
        with pytest.raises(UserError, match="was trained beside other frozen weights; resume with what init_from"):
            make(runtime, other).load(tmp_path)


def test_frozen_parameters_cannot_be_sharded(runtime: Runtime) -> None:
    for cfg in (UNetRuntimeConfig(zero_stage=3), FSDP):
        with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
            make(runtime, half_frozen(), cfg)


def test_two_networks_train_side_by_side(runtime: Runtime) -> None:
    generator, critic = make(runtime, network(), name="generator"), make(runtime, nn.Linear(2, 1), name="critic")
    before = critic.weights()
    critic.module.requires_grad_(False)
    generator.backward(critic.module(generator(torch.randn(4, 3))).mean(), last=True)
    critic.module.requires_grad_(True)
    assert generator.step(4) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in critic.weights().items())


@LAYOUTS
def test_misplaced_last_is_refused(runtime: Runtime, cfg: UNetRuntimeConfig | None) -> None:
    t = make(runtime, nn.Linear(3, 1), cfg, micro=2)
    with pytest.raises(ValueError, match="last"):
        t.backward(t(torch.ones(2, 3)).mean(), last=True)


def test_missing_deepspeed_is_one_line(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "train.engine.backend.zero", raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"runtime\.backend=deepspeed: no module 'deepspeed'; .*runtime\.backend=fsdp"):
        make(runtime, network(), ZERO)


def test_missing_compiler_is_one_line(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"runtime\.compile=true: no C\+\+ compiler"):
        make(runtime, network(), UNetRuntimeConfig(compile=True))


def test_average_that_is_not_kept_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="keeps no average"):
        make(runtime, nn.Linear(3, 1), ema=EmaConfig(half_life_samples=0.0)).weights(ema=True)


def damaged(folder: Path, change: str) -> None:
    path = folder / "model" / "exp_avg.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["2.bias"]
    elif change == "shape":
        tensors["2.bias"] = torch.zeros(7)
    elif change == "extra":
        tensors["3.bias"] = torch.zeros(2)
    if change == "file":
        path.unlink()
    else:
        save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"exp_avg.safetensors: has no tensor '2.bias'"),
        ("shape", r"exp_avg.safetensors: '2.bias' is \[7\] there but \[2\]"),
        ("extra", r"exp_avg.safetensors: has a tensor '3.bias' that"),
        ("file", r"exp_avg.safetensors: not there"),
    ],
)
def test_foreign_checkpoint_is_refused_by_name(runtime: Runtime, tmp_path: Path, change: str, message: str) -> None:
    t = make(runtime, network())
    train(t)
    t.save(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(UserError, match=message):
        t.load(tmp_path)


@LAYOUTS
def test_stream_makes_what_weights_holds(runtime: Runtime, cfg: UNetRuntimeConfig | None) -> None:
    t = make(runtime, network(), cfg, ema=EmaConfig(half_life_samples=10.0))
    train(t)
    for ema in (False, True):
        stream, whole = t.stream(ema), t.weights(ema)
        assert stream.specs.keys() == whole.keys()
        for name, tensor in zip(stream.specs, stream.tensors, strict=True):
            assert torch.equal(tensor, whole[name])


@LAYOUTS
def test_copy_in_memory_is_what_was_when_it_was_made(
    runtime: Runtime, tmp_path: Path, cfg: UNetRuntimeConfig | None
) -> None:
    t = make(runtime, network(), cfg, ema=EmaConfig(half_life_samples=10.0))
    memory: HostMemory = {}
    for name in ("first", "second"):  # the second fills the memory of the first again
        train(t)
        t.save(tmp_path / name)
        copy = t.contents().held(memory)
        train(t)
        copy.write(tmp_path / f"{name}-copy", main=True)
        for path in (tmp_path / name / "model").iterdir():
            assert path.read_bytes() == (tmp_path / f"{name}-copy" / "model" / path.name).read_bytes()
