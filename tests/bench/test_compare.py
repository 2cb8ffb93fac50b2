"""The contract of the bench scripts: pairs in turn, the median of their ratios, one JSON line, the exit code."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "_compare.py"
    spec = importlib.util.spec_from_file_location("_compare", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_compare"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bar", "lower_is_better", "holds"),
    [(2.0, False, True), (2.1, False, False), (2.0, True, True), (1.9, True, False)],
)
def test_median_of_paired_ratios_decides(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], bar: float, lower_is_better: bool, holds: bool
) -> None:
    calls: list[str] = []
    ours, peers = iter([9.0, 4.0, 30.0, 1.0]), iter([9.0, 2.0, 10.0, 1.0])  # the first of each warms up

    def measure(side: str, values: Iterator[float]) -> float:
        calls.append(side)
        return next(values)

    comparison = bench.Comparison(
        name="x",
        ours=lambda: measure("A", ours),
        peer=lambda: measure("B", peers),
        unit="images/s",
        bar=bar,
        lower_is_better=lower_is_better,
        pairs=3,
    )
    with pytest.raises(SystemExit) as ended:
        bench.main([comparison])
    assert ended.value.code == (0 if holds else 1)
    assert "".join(calls) == "ABABABAB"
    line = json.loads(capsys.readouterr().out)
    assert line == {
        "name": "x",
        "ours": 4.0,
        "peer": 2.0,
        "unit": "images/s",
        "ratio": 2.0,
        "bar": bar,
        "holds": holds,
    }
