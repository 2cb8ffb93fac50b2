"""What `train/plan.py` says against what is: memory of two processes on this CPU, and published throughputs.

Each is compared twice, since a prediction may be wrong in both directions: it must be at most and at least so many
times what was measured. The throughputs of the H100 are those of NVIDIA's runs of MLPerf Training v4.0 (Stable
Diffusion 2, 64 x 64 latents), those of the A100 the table of mosaicml/diffusion; both on cached latents.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _compare import Comparison, main
from _zero_memory import PROCESSES, SETTINGS

from conf.entry import compose
from conf.process import python
from conf.schema import PlanRun
from train.planning.estimate import images_per_second

WORKER = Path(__file__).with_name("_zero_memory.py")
MEMORY_BARS, THROUGHPUT_BARS = (0.85, 1.15), (0.75, 1.25)
SD2 = [
    "model.attention_head_dim=[5,10,20,20]",
    "model.cross_attention_dim=1024",
    "model.use_linear_projection=true",
]
PUBLISHED = {  # (accelerator, GPUs, samples per step, side of the latent): images/s
    ("h100", 8, 512, 64): 1018,
    ("h100", 64, 1024, 64): 7055,
    ("h100", 1024, 2048, 64): 49760,
    ("a100", 8, 2048, 32): 1100,
    ("a100", 8, 2048, 64): 290,
    ("a100", 16, 2048, 64): 585,
    ("a100", 32, 2048, 64): 1195,
    ("a100", 64, 2048, 64): 2340,
    ("a100", 128, 2048, 64): 4590,
}


def predicted_throughput(accelerator: str, gpus: int, batch: int, side: int) -> float:
    """Images per second of Stable Diffusion 2 under DDP, whose gradients travel beside the arithmetic as theirs did."""
    machines = [f"accelerator={accelerator}", f"gpus={gpus}", f"batch.global_batch_size={batch}"]
    options = [*SD2, *machines, f"model.sample_size={side}", "runtime.backend=ddp"]
    return images_per_second(compose("plan", PlanRun, options))


def measured_memory() -> dict[str, float]:
    """Bytes by setting and stage, of a launch of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        command = [*python(PROCESSES), str(WORKER), str(out), *SETTINGS]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(out.read_text())
    return found


def both_ways(name: str, ours: float, peer: float, unit: str, bars: tuple[float, float]) -> Iterator[Comparison]:
    """A prediction between two bars."""
    for suffix, bar, lower in zip(("at_least", "at_most"), bars, (False, True), strict=True):
        yield Comparison(
            name=f"{name}_{suffix}",
            ours=lambda: ours,
            peer=lambda: peer,
            unit=unit,
            bar=bar,
            lower_is_better=lower,
            pairs=1,
        )


def comparisons() -> Iterator[Comparison]:
    """Memory, then throughputs."""
    for case, size in measured_memory().items():
        setting, stage = case.split("/")
        predicted = SETTINGS[setting].predicted(int(stage))
        yield from both_ways(f"memory_{setting}_zero{stage}", predicted, size, "bytes", MEMORY_BARS)
    for run, published in PUBLISHED.items():
        name = "throughput_{}x{}_batch{}_latent{}".format(*run)
        yield from both_ways(name, predicted_throughput(*run), published, "images/s", THROUGHPUT_BARS)


if __name__ == "__main__":
    main(comparisons())
