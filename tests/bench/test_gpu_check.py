"""The check that an owner of a GPU runs, without one and with small networks: each of its sections ends and holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu_check.py"


@pytest.mark.timeout(900)  # two trainings by its own commands, and each backend twice
def test_all_sections_hold_on_a_cpu() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny"], capture_output=True, text=True, timeout=880
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:])
    assert lines[-1] == {"section": "gpu_check", "name": "gpu_check", "holds": True, "failed": []}
    sections = {line["section"]: line for line in lines if "ended" in line}
    assert len(sections) == 8 and all(line["ended"] == 0 for line in sections.values())
    curves = {line["curve"]: line for line in lines if "curve" in line}
    assert curves["fp32 against the CPU"]["error"] == 0 and curves["stopped and resumed"]["identical"]
    assert {"ddp/curve", "zero3-offload-all/curve", "fsdp/bf16"} <= curves.keys()
