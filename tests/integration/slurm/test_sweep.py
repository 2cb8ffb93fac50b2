"""A sweep whose members are jobs: `hydra/launcher=submitit_slurm` with the real plugin."""

import os
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

# A training without torch: the learning rate says how it ends.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from conf.entry import entry
from conf.errors import UserError
from conf.schema import UNetRun

@entry("train_unet", UNetRun)
def main(cfg):
    if cfg.optim.lr == 7:
        raise UserError("the data are missing")
    if cfg.optim.lr == 8:  # nothing of the job is left to say so
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if cfg.optim.lr == 9 and not Path(cfg.output_dir, "checkpoint").exists():
        # what SLURM does when the member's time is nearly over
        slurm = subprocess.Popen(["scancel", "--signal=USR2", os.environ["SLURM_JOB_ID"]])
        def stop(number, frame):
            slurm.kill()  # it would send the signal again
            Path(cfg.output_dir, "checkpoint").touch()
            Path(os.environ["REQUEUE_FILE"]).touch()
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        time.sleep(60)
    return cfg.optim.lr

main()
"""


def test_members_are_jobs_and_one_that_dies_does_not_end_the_sweep(slurm, tmp_path):
    program, run_dir = tmp_path / "training.py", tmp_path / "run"
    program.write_text(PROGRAM)
    overrides = ("optim.lr=9,8,7,2,1", f"run_dir={run_dir}", "hydra/launcher=submitit_slurm")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    output = slurm.run(sys.executable, program, "-m", *overrides, check=False, timeout_s=180, PYTHONPATH=path)
    lines = [line.split(maxsplit=1) for line in output[output.index("objective   member") :].splitlines()[1:]]
    # the third came back after its time was over
    assert lines[:3] == [["1", "optim.lr=1"], ["2", "optim.lr=2"], ["9", "optim.lr=9"]]
    failed = sorted(text for state, text in lines[3:] if state == "failed")
    assert failed == ["optim.lr=7: the data are missing", "optim.lr=8: ended with the process that looked after it"]
    (lost,) = [text for state, text in lines[3:] if state == "lost"]
    array, task, state, folder = re.fullmatch(r"job (\d+)_(\d) \((\w+)\): (\S+)", lost).groups()
    assert (task, state, Path(folder)) == ("1", "FAILED", run_dir / f"sweep/train_unet/.submitit/{array}_1")
    facts = slurm.job(f"{array}_0")
    assert (facts["Restarts"], facts["TresPerNode"], facts["CPUs/Task"]) == ("1", "gres:gpu:8", "64")
