"""A sweep outlives its members, tells how they ended, and hands their objectives to Hydra's sweepers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.errors import UserError
from conf.slurm_launcher import check_launcher

ROOT = Path(__file__).parents[2]

# A training without torch: the learning rate says how it ends. Each start leaves a line.
PROGRAM = """
import math, os, signal, sys, time
from pathlib import Path
from conf.entry import entry
from conf.errors import UserError
from conf.schema import UNetRun

def after(folder, sweep, composed):
    ran = [path for path in folder.glob("*/member.json") if sweep in path.read_text()]
    (folder / "after").write_text(f"{len(ran)} members of {composed.run_dir}, seed {composed.seed}")

@entry("train_unet", UNetRun, after_sweep=after)
def main(cfg):
    with (Path(cfg.run_dir) / "starts").open("a") as file:
        print(cfg.optim.lr, cfg.output_dir, cfg.wandb.group, cfg.wandb.name, sep=" | ", file=file)
    if cfg.optim.lr == 5:
        raise UserError("the data are missing")
    if cfg.optim.lr == 6:
        raise RuntimeError("a bug")
    if cfg.optim.lr == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.optim.lr == 8:
        return math.nan
    if cfg.optim.lr == 9:
        signal.signal(signal.SIGTERM, lambda number, frame: (Path(cfg.run_dir, "checkpoint").touch(), sys.exit()))
        Path(cfg.run_dir, "ready").touch()
        time.sleep(60)
    return 10 - cfg.optim.lr

main()
"""

# What optuna's plugin is to Hydra: it launches a member, is told its objective, and chooses the next one by it.
SWEEPER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Greedy(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        rates, found = [1, 2, 5], []
        while rates and (not found or found[-1] < 9.5):
            (member,) = self.launcher.launch([[*arguments, f"optim.lr={rates.pop(0)}"]], initial_job_idx=len(found))
            found.append(member.return_value)
        print("told", *found)

node = {"_target_": "hydra_plugins.greedy.Greedy"}
ConfigStore.instance().store(group="hydra/sweeper", name="greedy", node=node, provider="greedy")
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A command line of that training, in whose run_dir it works."""
    path = tmp_path / "training.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path), "-m", f"run_dir={tmp_path}/run"]


def environment() -> dict[str, str]:
    outer = ("LATENTLINE_", "NPROC", "SLURM_", "SUBMITIT_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def sweep(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False
    )


def table(output: str) -> list[list[str]]:
    """Objective, or how it failed, and name of each member, as printed at the end."""
    lines = output[output.index("objective   member") :].splitlines()[1:]
    return [line.split(maxsplit=1) for line in lines]


def test_members_that_die_do_not_end_the_sweep(program: list[str], tmp_path: Path) -> None:
    ended = sweep(
        *program, "optim.lr=5,6,7,8,-1,2,3", "seed=4", "hydra.job.config.override_dirname.exclude_keys=[seed,run_dir]"
    )
    assert ended.returncode == 1, ended.stderr
    assert table(ended.stdout)[:2] == [["7", "optim.lr=3"], ["8", "optim.lr=2"]]  # the best first
    failed = {name.split(":")[0]: name for state, name in table(ended.stdout)[2:] if state == "failed"}
    assert failed["optim.lr=5"].endswith(": the data are missing")
    assert failed["optim.lr=6"].endswith(": exit status 1") and "RuntimeError: a bug" in ended.stderr
    assert failed["optim.lr=7"].endswith(": ended by SIGKILL")
    assert failed["optim.lr=8"].endswith(": no finite objective: diverged, or stopped before its end")
    assert failed["optim.lr=-1"].endswith(": optim.lr=-1.0: must be positive")
    assert (tmp_path / "run/sweep/train_unet/after").read_text() == f"7 members of {tmp_path}/run, seed 4"
    record = json.loads((tmp_path / "run/sweep/train_unet/optim.lr=3/member.json").read_text())
    assert (record["objective"], record["error"]) == (7, None) and "optim.lr=3" in record["overrides"]


def test_a_sweeper_of_hydra_is_told_the_objectives(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/greedy.py").write_text(SWEEPER)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    ended = sweep(*program, "hydra/sweeper=greedy", PYTHONPATH=path)
    assert ended.stdout.splitlines()[0] == "told 9.0 8.0 inf", ended.stderr
    assert [name for _, name in table(ended.stdout)][:2] == ["optim.lr=2", "optim.lr=1"]


def test_a_member_has_its_own_folder_and_its_place_in_wandb(program: list[str], tmp_path: Path) -> None:
    ended = sweep(*program, "optim.lr=1,2", 'stream.cache_dir="it\'s, odd"')
    assert ended.returncode == 0, ended.stderr
    ended = sweep(*program, "optim.lr=3", "wandb.group=mine")
    assert ended.returncode == 0, ended.stderr
    starts = [line.split(" | ") for line in (tmp_path / "run/starts").read_text().splitlines()]
    assert [rate for rate, *_ in starts] == ["1.0", "2.0", "3.0"]
    for _, folder, _, name in starts:
        assert Path(folder).parent == tmp_path / "run/sweep/train_unet" and (Path(folder) / "member.json").exists()
        assert name == Path(folder).name
    assert [group for _, _, group, _ in starts] == ["run/sweep/train_unet", "run/sweep/train_unet", "mine"]


def test_a_sweep_that_cannot_be_composed_starts_no_member(program: list[str], tmp_path: Path) -> None:
    for argument, message in {
        "optim.lrr=1,2": "no option 'optim.lrr': did you mean optim.lr",
        "optim.lr=1,fast": "optim.lr=fast",
        "loop.samples=many": "loop.samples=many",
        "hydra.launcher.partition=a100": "no option 'hydra.launcher.partition'",
    }.items():
        ended = sweep(*program, "seed=1,2", argument)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: ") and message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert not (tmp_path / "run/starts").exists()


def test_members_that_fail_in_run_folders_of_their_own_fail_the_sweep(program: list[str], tmp_path: Path) -> None:
    folders = f"run_dir={tmp_path}/a,{tmp_path}/b"
    ended = sweep(*program[:3], folders, "optim.lr=5", "hydra.sweep.dir=${run_dir}/sweep/train_unet")
    (tmp_path / "a").mkdir(exist_ok=True)
    assert ended.returncode == 1
    told = sorted(name for state, name in table(ended.stdout) if state == "failed")
    assert [name.split(":")[0] for name in told] == [f"{tmp_path}/{run}/sweep/train_unet/optim.lr=5" for run in "ab"]


def test_members_whose_names_are_alike_keep_their_folders(program: list[str], tmp_path: Path) -> None:
    for values in ("x/y,x_y", "x_y,x/y", "x_y"):  # a second start goes on where the first one was
        ended = sweep(*program, f"latents={values}")
        assert ended.returncode == 0, ended.stderr
        assert len(table(ended.stdout)) == len(values.split(","))
    written = [json.loads(path.read_text()) for path in (tmp_path / "run/sweep/train_unet").glob("*/member.json")]
    assert sorted(record["overrides"][-1] for record in written) == ["latents=x/y", "latents=x_y"]
    folders = {line.split(" | ")[1] for line in (tmp_path / "run/starts").read_text().splitlines()}
    assert len(folders) == 2 and f"{tmp_path}/run/sweep/train_unet/latents=x_y" in folders


def test_members_that_differ_in_what_their_name_leaves_out_keep_apart(program: list[str], tmp_path: Path) -> None:
    ended = sweep(*program, "experiment=none,smoke")
    assert ended.returncode == 0 and len(table(ended.stdout)) == 2, ended.stderr
    ended = sweep(*program, "seed=1,2", "hydra.job.config.override_dirname.exclude_keys=[seed,run_dir]")
    assert ended.returncode == 0 and len(table(ended.stdout)) == 2, ended.stderr
    folders = [line.split(" | ")[1] for line in (tmp_path / "run/starts").read_text().splitlines()]
    assert len(set(folders[:2])) == len(set(folders[2:])) == 2


def test_a_sweep_takes_no_other_flag(program: list[str]) -> None:
    ended = sweep(*program, "--cfg", "job")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: -m --cfg: a sweep takes no other flag; leave out -m or the rest\n",
    )


def test_free_text_can_be_swept(program: list[str], tmp_path: Path) -> None:
    ended = sweep(*program, 'sampling.negative_prompt="a ${x} b","c, d","???"')
    assert ended.returncode == 0, ended.stderr
    assert len(table(ended.stdout)) == 3


def test_a_sweep_that_is_ended_lets_its_member_write_a_checkpoint(program: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*program, "optim.lr=9,1"], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    assert (tmp_path / "run/checkpoint").exists()
    assert len((tmp_path / "run/starts").read_text().splitlines()) == 1  # the next member was not started


def test_without_its_package_the_launcher_is_named(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "submitit" else real(name, *rest)
        """)
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    ended = sweep(*program, "seed=1,2", "hydra/launcher=submitit_slurm", PYTHONPATH=path)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: hydra/launcher=submitit_slurm: its package is missing: pip install 'latentline[slurm]'"
    ]


def test_without_slurm_the_launcher_says_where_to_start(program: list[str]) -> None:
    ended = sweep(*program, "seed=1,2", "hydra/launcher=submitit_slurm", PATH="/nowhere")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: hydra/launcher=submitit_slurm: no srun here: start the sweep where sbatch works\n",
    )


def test_members_of_several_nodes_are_refused() -> None:
    check_launcher(OmegaConf.create({"_target_": "the basic one"}))
    with pytest.raises(UserError, match=r"hydra\.launcher\.nodes=2: must be 1"):
        check_launcher(OmegaConf.create({"nodes": 2, "tasks_per_node": 1}))


def test_several_processes_start_no_sweep_each(program: list[str]) -> None:
    ended = sweep(*program, "seed=1,2", RANK="0")
    assert ended.returncode == 2 and "error: -m under torchrun: start a sweep with python" in ended.stderr
