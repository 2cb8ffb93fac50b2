# shellcheck shell=bash
# Sourced by the batch scripts in the repository's root: environment, rendezvous, signals, requeue.
# Environment read: LATENTLINE_VENV (folder of a virtual environment; else the one active at sbatch), NPROC (processes per
# node; else one per GPU of the node), OMP_NUM_THREADS (CPU threads per process, 1), CONTAINER (what stands between srun
# and the command: `apptainer exec --nv FILE`, or pyxis' `--container-image=NAME --container-mounts=FOLDER`).
set -uo pipefail

read -ra container <<< "${CONTAINER:-}"
venv=${LATENTLINE_VENV:-${VIRTUAL_ENV:-}}
[ -z "$venv" ] || PATH=$venv/bin:$PATH
found='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
if [ ${#container[@]} -eq 0 ] && ! python -c "$found" 2>/dev/null; then
  echo "error: no python with torch: activate the virtual environment before sbatch, or set LATENTLINE_VENV=FOLDER" >&2
  exit 2
fi

# NodeAddr is what SLURM itself connects to; a host name alone need not resolve on every node.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$head_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Differs for each job and attempt, so that one never meets the remains of another.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0} * 1000) % 10000))
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it (since SLURM 22.05)
SLURM_EXPORT_ENV=ALL # after `sbatch --export=NAMES` srun would drop all other variables, these too
SLURM_LABELIO=1 # each line of the log begins with the number of its node
PYTHONUNBUFFERED=1 # a job that is killed has its last lines in the log
# Of a collective that hangs beyond runtime.timeout_s: why NCCL failed, and what each rank last called (a file per rank).
NCCL_DEBUG=${NCCL_DEBUG:-WARN}
TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PWD/slurm/logs/nccl-$SLURM_JOB_ID-}
# Rank 0 touches this file after the checkpoint of an early stop. An exit code cannot say so: srun's is another one as
# soon as a single task fails.
REQUEUE_FILE=$PWD/slurm/logs/.requeue-$SLURM_JOB_ID
export PATH MASTER_ADDR MASTER_PORT NPROC OMP_NUM_THREADS SRUN_CPUS_PER_TASK SLURM_EXPORT_ENV SLURM_LABELIO REQUEUE_FILE
export PYTHONUNBUFFERED NCCL_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE
rm -f "$REQUEUE_FILE"

SRUN=(srun --kill-on-bad-exit=1 "${container[@]}")
# One torchrun per node. Its agent would die of USR1, which is for the workers: they set their own handlers.
# At a TERM it would kill them after 30 s. MAX_RESTARTS: how often it starts them again when one of them dies.
# shellcheck disable=SC2016,SC2034  # expanded on each node; used by the scripts
TORCHRUN=("${SRUN[@]}" bash -c 'trap "" USR1
  exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$NPROC" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="${MAX_RESTARTS:-0}" \
    --shutdown-timeout=300 "$@"' torchrun)

# Run a command and pass on what only this shell hears: USR1 (the time is nearly over) and TERM (preemption). Both reach the
# processes as USR1, since srun answers TERM by killing them. If a checkpoint was then written, requeue the job.
# RESTARTABLE=yes: the command may be ended at any moment, so it is, without asking, and the job requeued.
run() {
  echo "$(date '+%F %T') job $SLURM_JOB_ID attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes of" \
    "$NPROC processes on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"
  # In the background, since bash runs a trap only between commands or in `wait`.
  "$@" &
  local child=$! status
  # shellcheck disable=SC2064  # $child is meant to expand now
  trap "kill -USR1 $child 2>/dev/null" USR1 TERM
  # shellcheck disable=SC2064
  [ -z "${RESTARTABLE:-}" ] || trap "touch '$REQUEUE_FILE'; kill -TERM $child 2>/dev/null" USR1 TERM
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child" # the status once more: a trap ends `wait` with one of its own
  status=$?
  trap - USR1 TERM
  [ ! -e "$REQUEUE_FILE" ] || requeue
  exit "$status"
}

requeue() {
  rm -f "$REQUEUE_FILE"
  # Only while SLURM calls the job RUNNING: requeuing one that scancel ended would bring it back.
  scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING ' || return
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script meanwhile
}
