"""Where a process would wait for its GPU, found on a CPU: wherever it asks a tensor for a value."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
ASKING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default, ATEN.masked_select.default}
OUT = ("tolist", "numpy", "cpu", "item")  # methods that give values to Python without an operator, on a CPU
ROOT = str(Path(__file__).parents[2])


class Waits(TorchDispatchMode):
    """Notes the line of each such moment while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self) -> None:
        """The innermost line that is ours or DeepSpeed's, unless it reads what has arrived."""
        lines = [line for line in traceback.extract_stack() if ROOT in line.filename or "deepspeed" in line.filename]
        last = next(line for line in reversed(lines) if line.filename != __file__)
        if (Path(last.filename).name, last.name) != ("runtime.py", "read"):  # `Late.read`
            self.found.append(f"{last.filename}:{last.lineno} {last.line}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = args[1] if func is ATEN.index.Tensor else ()
        if func in ASKING or any(place is not None and place.dtype is torch.bool for place in places):
            self.note()
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In here; positions are the host's own, and nobody waits for them."""

        def noted(name: str) -> Any:
            original = getattr(Tensor, name)

            def method(tensor: Tensor, *args: Any, **named: Any) -> Any:
                if tensor.dtype != torch.int64:
                    self.note()
                return original(tensor, *args, **named)

            return patch.object(Tensor, name, method)

        patches = [noted(name) for name in OUT]
        for one in patches:
            one.start()
        try:
            with self:
                yield
        finally:
            for one in patches:
                one.stop()

    def around(self, stage: Any) -> None:
        """Watch all that a stage does in a training step."""
        for name in ("micro_step", "finish_step"):
            original = getattr(stage, name)

            def watched(*args: Any, original: Any = original) -> Any:
                with self.watching():
                    return original(*args)

            setattr(stage, name, watched)
