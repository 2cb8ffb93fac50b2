"""A plan of 64 ranks against one of them, which is simulated with its backend's own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "bench" / "_ranks.py"


@pytest.mark.parametrize("case", ["narrow/ddp/64", "wide/fsdp/64", "wide/zero1/64", "wide/zero2/64", "wide/zero3/64"])
def test_a_rank_of_64_holds_and_exchanges_what_was_planned(case: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    plan, found = json.loads(done.stdout.splitlines()[-1])
    assert plan["most"] == pytest.approx(found["most"], rel=0.15)
    assert plan["sent"] == pytest.approx(found["sent"], rel=0.02)
    if "fsdp" in case:  # gathers of a part forwards and backwards; a scatter and a sum over the machines of gradients
        operations, parts = found["operations"], found["operations"]["scatter over 8"]
        assert operations == plan["operations"]
        assert operations == {"gather over 8": 2 * parts, "scatter over 8": parts, "sum over 8": parts}
    if "zero1" in case or "zero2" in case:  # the weights that AdamW decays, and those that it does not
        assert found["operations"]["gather over 64"] == plan["operations"]["gather over 64"] == 2
