"""GPUs as their makers describe them, and the share of that which trainings of Stable Diffusion were seen to reach."""

from dataclasses import dataclass

import torch

from conf.schema import Accelerator, Precision


@dataclass(frozen=True, slots=True)
class Specification:
    """Of one GPU in the machine that it usually comes in; dense figures, not those for sparse matrices."""

    half_tflops: float  # bf16 and fp16 with sums in fp32, 10^12 operations/s
    fp32_tflops: float  # without TF32
    memory_gib: float
    link_gb_per_s: float  # to the other GPUs of the machine, one direction, 10^9 bytes/s
    network_gbps: float  # to other machines, one direction, 10^9 bits/s
    mfu: float = 0.3  # share of the peak that the network reaches; an assumption where nothing was published

    def flops_per_s(self, precision: Precision) -> float:
        return 1e12 * (self.fp32_tflops if precision is Precision.fp32 else self.half_tflops)


# The shares of A100 and H100 were set so that published throughputs come out (docs/planning.md); H200 computes alike.
SPECIFICATIONS = {
    Accelerator.v100: Specification(125, 15.7, 32, 150, 100),  # SXM2; no bf16
    Accelerator.a100_40gb: Specification(312, 19.5, 40, 300, 200, mfu=0.26),
    Accelerator.a100: Specification(312, 19.5, 80, 300, 200, mfu=0.26),  # SXM4
    Accelerator.l40s: Specification(362, 91.6, 48, 32, 200),  # PCIe 4.0 between the GPUs
    Accelerator.rtx4090: Specification(165, 82.6, 24, 32, 25),  # likewise
    Accelerator.h100: Specification(989, 67, 80, 450, 400, mfu=0.31),  # SXM5
    Accelerator.h200: Specification(989, 67, 141, 450, 400, mfu=0.31),
    Accelerator.b200: Specification(2250, 75, 180, 900, 400),
}

NAMES = {  # a part of what CUDA calls the device
    "V100": Accelerator.v100,
    "A100-SXM4-40GB": Accelerator.a100_40gb,
    "A100-PCIE-40GB": Accelerator.a100_40gb,
    "A100": Accelerator.a100,
    "L40S": Accelerator.l40s,
    "RTX 4090": Accelerator.rtx4090,
    "H100": Accelerator.h100,
    "H200": Accelerator.h200,
    "B200": Accelerator.b200,
}


def peak_flops(device_name: str, precision: Precision) -> float:
    """Operations per second at the most, 0 for a device that is not known."""
    known = next((accelerator for part, accelerator in NAMES.items() if part in device_name), None)
    return 0.0 if known is None else SPECIFICATIONS[known].flops_per_s(precision)


def device_name(device: torch.device) -> str:
    """What CUDA calls a device; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
