"""What is wrong with a machine is found, named and, where it is the machine's fault, left to the batch script."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from train.engine.preflight import SAME_TIME_S, Report, check_device, slow_links, wrong_clocks

RANK = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from conf.ending import fail
from conf.errors import UserError
from conf.schema import Device, TrainingRuntimeConfig
from train.engine import preflight
from train.engine.runtime import start

output_dir, fault = sys.argv[1:]
preflight.PATIENCE_S, preflight.SHARED_WITHIN_S = 20.0, 0.3
cfg = SimpleNamespace(output_dir=output_dir, runtime=TrainingRuntimeConfig(device=Device.cpu, timeout_s=120))
runtime = start(cfg.runtime)
if fault == "device" and runtime.rank == 1:
    preflight.check_device = lambda device: [preflight.Finding("multiplies wrongly")]
if fault == "folder" and runtime.rank == 1 or fault == "all folders" and runtime.rank:
    cfg.output_dir += f"-{runtime.rank}"
if fault == "stopped" and runtime.rank == 1:
    preflight.check_links = lambda runtime: os.kill(os.getpid(), signal.SIGSTOP)
if fault == "token" and runtime.rank == 0:
    preflight.write_token = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
if fault in ("stopped", "token"):
    preflight.PATIENCE_S = 3.0
try:
    preflight.preflight(cfg, runtime)
except UserError as error:
    fail(error)
runtime.barrier()
"""

STOPPED = {"stopped": 1, "token": 0}  # by fault the process that stands still


def run(tmp_path: Path, fault: str) -> tuple[list[int], list[str]]:
    """Three processes on three nodes; returns how they ended, and what they said."""
    # As torchrun's agent has it, the store outlives the main process, which may end before the others have read.
    store = TCPStore("127.0.0.1", 0, is_master=True)
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    shared |= {"PYTHONPATH": os.getcwd(), "SUSPECTS_FILE": str(tmp_path / "suspects"), "LOCAL_RANK": "0"}
    (tmp_path / "rank.py").write_text(RANK)
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "run"), fault],
            env=os.environ | shared | {"RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for process in processes:
            if process is not processes[STOPPED.get(fault, -1)] or fault not in STOPPED:
                process.wait(120)
    finally:
        for process in processes:
            process.kill()
        errors = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], errors


def test_sound_machines_go_on_without_a_word_or_a_file_left(tmp_path: Path) -> None:
    assert run(tmp_path, "none") == ([0, 0, 0], ["", "", ""])
    assert list((tmp_path / "run").iterdir()) == [] and not (tmp_path / "suspects").exists()


@pytest.mark.parametrize(
    ("fault", "line", "suspects"),
    [
        ("device", "rank 1 (node1): multiplies wrongly", "node1\n"),
        ("folder", "rank 1 (node1): '", "node1\n"),
        ("all folders", "rank 2 (node2): '", None),  # the folder's fault, and no machine's
        ("stopped", "rank 1 (node1): does not answer", "node1\n"),
    ],
)
def test_a_fault_ends_all_and_is_named_once(tmp_path: Path, fault: str, line: str, suspects: str | None) -> None:
    ended, errors = run(tmp_path, fault)
    assert ended == ([2, -signal.SIGKILL, 2] if fault == "stopped" else [2, 2, 2])
    assert errors[0].count(f"error: preflight: {line}") == 1
    assert "error: the preflight found" in errors[2] and "rank" not in errors[2]
    path = tmp_path / "suspects"
    assert (path.read_text() if path.exists() else None) == suspects


def test_a_folder_in_which_the_main_process_hangs_ends_the_others_in_one_line(tmp_path: Path) -> None:
    ended, errors = run(tmp_path, "token")
    assert ended == [-signal.SIGKILL, 2, 2]
    for error in errors[1:]:
        assert (
            error.count("error: the preflight's main process did not answer in 6 s") == 1 and "Traceback" not in error
        )


def test_a_device_that_multiplies_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert check_device(cpu) == []
    right = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if product.dtype is torch.float32:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    (finding,) = check_device(cpu)
    assert "multiplies wrongly" in finding.text and finding.fatal


def test_a_slow_link_is_found_among_those_of_its_kind() -> None:
    """Two machines of four: exchanges over the network take longer than within, and only one is too slow."""
    seconds = [0.10, 0.01, 0.01, 0.10, 0.10, 0.01, 0.08, 0.10]
    reports = [Report(f"node{rank // 4}", [], seconds=s, time=1.0) for rank, s in enumerate(seconds)]
    assert list(slow_links(reports)) == [6] and "took 80 ms, others took 10" in slow_links(reports)[6]
    assert wrong_clocks(reports) == {}


def test_a_clock_that_is_wrong_is_told_once_for_its_machine() -> None:
    times = [100.0, 100.0, 100.5, 100.5, 100 + 2 * SAME_TIME_S, 100 + 2 * SAME_TIME_S]
    found = wrong_clocks([Report(f"node{rank // 2}", [], time=t) for rank, t in enumerate(times)])
    assert list(found) == [4] and "clock is +10 s" in found[4]
