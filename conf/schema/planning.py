"""The command that says what a training will cost."""

from dataclasses import dataclass

from conf.errors import UserError
from conf.schema.choices import Accelerator, CacheDtype
from conf.schema.sections import require, require_positive
from conf.schema.training import UNetRun


@dataclass(kw_only=True, slots=True)
class PlanRun(UNetRun):
    """`train/plan.py`: the options of `train/train_unet.py`, which it does not start, and those of the machines."""

    accelerator: Accelerator = Accelerator.h100  # whose peak, memory and links count
    gpus: int = 8  # processes, one per GPU
    gpus_per_machine: int = 8  # that exchange gradients without the network
    mfu: float = 0.0  # share of the GPU's peak that the network reaches, in (0, 1]; 0: what is known of the accelerator
    network_gbps: float = 0.0  # Gbit/s between machines, per GPU; 0: what such machines usually have
    cached_samples: int = 0  # samples in the latent cache; 0: loop.samples, each seen once
    dtype: CacheDtype = CacheDtype.fp16  # of moments and text states on disk
    variants: int = 1  # cuts kept of each picture
    text_states: bool = True  # cache the text tower's output too, not only the tokens
    tokens: int = 77  # of a caption

    def __post_init__(self) -> None:
        require_positive(self, "gpus", "gpus_per_machine", "variants", "tokens")
        require(0 <= self.mfu <= 1, f"mfu={self.mfu}: must be in (0, 1], or 0 for what is known of the accelerator")
        for name in ("network_gbps", "cached_samples"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be 0 or positive")
        require(
            self.gpus <= self.gpus_per_machine or self.gpus % self.gpus_per_machine == 0,
            f"gpus={self.gpus}: must be a multiple of gpus_per_machine={self.gpus_per_machine}, or fit into one",
        )
        require(self.lora.rank == 0, f"lora.rank={self.lora.rank}: the plan is of training all weights; leave it out")
        side, factor = self.model.sample_size, self.model.downscale
        require(
            side % factor == 0,
            f"model.sample_size={side}: must be a multiple of {factor}, the U-Net's downscale factor "
            "(model.block_out_channels)",
        )
        self.batch.split(self.gpus)

    def refusal(self) -> str:
        """Why `train/train_unet.py` would not start with these options; "" where nothing in them hinders it."""
        try:
            UNetRun.__post_init__(self)
        except UserError as error:
            return str(error)
        return ""
