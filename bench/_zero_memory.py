"""One of two processes: what a training step of a U-Net really holds on the CPU at each ZeRO stage.

Usage, under torchrun: _zero_memory.py OUT SETTING... with the names of `SETTINGS`. OUT: {"SETTING/STAGE": bytes}.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # works where the project is not installed, too

from conf.ending import leave
from conf.schema import BatchConfig, Device, EmaConfig, OptimConfig, Precision, RuntimeConfig, UNetRuntimeConfig
from conf.schema.networks import UNetConfig
from models.unet import UNet
from train.engine.precision import AUTOCAST
from train.engine.runtime import Runtime, start, stop
from train.engine.trainable import Trainable
from train.planning.activations import Activations, StorageCounter, unet_activations
from train.planning.memory import Sharding

STAGES, PROCESSES, TOKENS, STEPS = (0, 1, 2, 3), 2, 77, 2
ATTEND, UP_ATTEND = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True, slots=True)
class Setting:
    """A network and how it is trained."""

    widths: list[int]
    side: int  # of the latent
    micro: int
    accumulation: int = 1
    checkpointing: bool = False
    precision: Precision = Precision.fp32

    @property
    def network(self) -> UNetConfig:
        """Three levels, of which the lower two attend."""
        return UNetConfig(
            sample_size=self.side,
            block_out_channels=self.widths,
            layers_per_block=1,
            down_block_types=["DownBlock2D", ATTEND, ATTEND],
            up_block_types=[UP_ATTEND, UP_ATTEND, "UpBlock2D"],
            cross_attention_dim=256,
            head_channels=32,
        )

    def predicted(self, stage: int) -> int:
        """Bytes of one process, on paper."""
        low = AUTOCAST.get(self.precision)
        with torch.device("meta"):
            elements = sum(parameter.numel() for parameter in UNet(self.network).parameters())
        sharding = Sharding(elements, PROCESSES, stage, accumulate=self.accumulation > 1, low_precision=low is not None)
        return sharding.footprint(self._activations(low)).total

    def _activations(self, low: torch.dtype | None) -> Activations:
        side = self.side
        return unet_activations(self.network, self.micro, side, side, TOKENS, low, self.checkpointing, "cpu")


SETTINGS = {
    "8M": Setting([64, 128, 160], side=32, micro=2),
    "18M": Setting([96, 192, 224], side=32, micro=2),
    "18M_many": Setting([96, 192, 224], side=32, micro=6),
    "18M_accumulated": Setting([96, 192, 224], side=32, micro=2, accumulation=2, checkpointing=True),
    "8M_bf16": Setting([64, 128, 160], side=16, micro=2, precision=Precision.bf16),
}


def measured(setting: Setting, stage: int, runtime: Runtime) -> int:
    """Most bytes of tensors at once, from the network's construction to the second step.

    Not by torch's profiler: it misses what gloo's threads free, which at stage 3 is much.
    """
    gc.collect()
    with StorageCounter(runtime.device.type) as counter:
        _train(setting, stage, runtime)
    return counter.most


def _train(setting: Setting, stage: int, runtime: Runtime) -> None:
    torch.manual_seed(0)
    cfg, micro, passes = setting.network, setting.micro, setting.accumulation
    network = UNet(cfg)
    network.checkpoint_gradients(setting.checkpointing)
    batch = BatchConfig(global_batch_size=micro * passes * runtime.world, micro_batch_size=micro)
    average = EmaConfig(half_life_samples=100)
    cfg_of_stage = UNetRuntimeConfig(zero_stage=stage)
    unet = Trainable(runtime, network, OptimConfig(), batch, 1000, cfg_of_stage, average, name="unet")
    sample = torch.randn(micro, cfg.in_channels, cfg.sample_size, cfg.sample_size)
    timesteps, context = torch.linspace(0, 999, micro), torch.randn(micro, TOKENS, cfg.cross_attention_dim or 0)
    for step in range(STEPS):
        for index in range(passes):
            unet.backward(unet(sample, timesteps, context).square().mean(), index == passes - 1)
        unet.step((step + 1) * batch.global_batch_size)


def main(out: Path, names: list[str]) -> None:
    found: dict[str, int] = {}
    for name in names:
        setting = SETTINGS[name]
        runtime = start(RuntimeConfig(device=Device.cpu, threads=1, precision=setting.precision, timeout_s=300))
        for stage in STAGES:
            found[f"{name}/{stage}"] = measured(setting, stage, runtime)
    if runtime.is_main:
        out.write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
