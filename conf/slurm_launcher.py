"""`hydra/launcher=submitit_slurm` as this project uses it: what its jobs ask for; sweeps outlive their jobs."""

import importlib.util
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from conf.errors import UserError

LAUNCHER = "hydra/launcher=submitit_slurm"
lost_jobs: list[str] = []  # one line for each job of this sweep that SLURM ended without a result


def prepare_launcher(overrides: Sequence[str]) -> None:
    """Before anything is composed: the defaults of the jobs, and whether they can be started.

    Raises:
        UserError: the launcher's package or SLURM is missing.

    """
    if LAUNCHER not in overrides:
        return
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"{LAUNCHER}: its package is missing: pip install 'latentline[slurm]'")
    if shutil.which("srun") is None:
        raise UserError(f"{LAUNCHER}: no srun here: start the sweep where sbatch works")
    store_defaults()
    count_lost_jobs()


def store_defaults() -> None:
    """A member is a task of a job array, on a node of 8 GPUs; it starts a process for each (`conf.sweep`)."""
    Plugins.instance()  # stores the package's own defaults, once
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    node = SlurmQueueConf(
        gpus_per_node=8,
        cpus_per_task=64,
        mem_gb=0,  # all of the node
        timeout_min=24 * 60,
        signal_delay_s=300,  # for the checkpoint before the time is over
        max_num_timeout=100,  # how often a member then goes on in a requeued job
        setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],  # srun no longer inherits it (since SLURM 22.05)
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
    )
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node, provider="conf")


def check_launcher(launcher: DictConfig) -> None:
    """Refuse members of several tasks; raises UserError."""
    for option in ("nodes", "tasks_per_node"):
        if launcher.get(option, 1) != 1:
            raise UserError(
                f"hydra.launcher.{option}={launcher[option]}: must be 1, a member has the GPUs of one node; "
                "for more start slurm/train_unet.sh once for each member"
            )


def count_lost_jobs() -> None:
    """Let a job that left no result be a failed member, where submitit would raise."""
    from submitit import SlurmJob  # only a sweep under SLURM has it

    results = SlurmJob.results

    def results_or_failure(job: Any) -> list[Any]:
        with suppress(Exception):  # out of memory, scancel, a lost node
            (found,) = results(job)
            if found.status is JobStatus.COMPLETED:
                return [found]
        lost_jobs.append(f"job {job.job_id} ({job.state}): {job.paths.stdout.parent}")
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=math.inf)]

    SlurmJob.results = results_or_failure  # type: ignore[method-assign, assignment]
