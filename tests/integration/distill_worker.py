"""One process of test_end_to_end.py: a short distillation in several layouts, each into a folder of its own.

Usage: python distill_worker.py OUT OPTION..., alone or under torchrun; the options are those of train/distill_unet.py.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # works where the project is not installed, too

from conf.ending import leave
from conf.entry import compose
from conf.schema import DistillRun
from train.engine.backend import distribute
from train.engine.runtime import start, stop
from train.engine.trainer import fit
from train.training.distillation.stage import DistillStage

LAYOUTS = {
    "ddp": ["runtime.backend=ddp"],
    "zero2": ["runtime.zero_stage=2"],
    "fsdp": ["runtime.backend=fsdp"],
    "compiled": ["runtime.backend=ddp", "runtime.compile=true"],
}


def compile_eagerly(graphs: list[Any]) -> None:
    """Trace and guard as torch.compile does, without the minutes of code generation; keep the traces."""
    real = torch.compile

    def traced(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile = lambda function, **options: real(function, **options | {"backend": traced})  # type: ignore
    distribute.require_compiler = lambda: None


def main(out: Path, options: list[str]) -> None:
    graphs: list[Any] = []
    compile_eagerly(graphs)
    for name, layout in LAYOUTS.items():
        cfg = compose("distill_unet", DistillRun, [*options, *layout, f"output_dir={out}/{name}"])
        runtime = start(cfg.runtime)
        fit(DistillStage(cfg, runtime), cfg, runtime)
        assert bool(graphs) is (name == "compiled")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
