# shellcheck shell=bash
# Sourced by the batch scripts in the repository's root: environment, rendezvous, signals, requeue.
# Environment read:
#   LATENTLINE_VENV              folder of a virtual environment; else the one active at sbatch
#   LATENTLINE_VENV_TAR          the same, packed with `tar -cf FILE -C FOLDER .`, that each node unpacks on its disk, once
#   CONTAINER                    what stands between srun and the command: `apptainer exec --nv FILE`, or pyxis'
#                                `--container-image=NAME --container-mounts=FOLDER`
#   NPROC                        processes per node; else one per GPU of the node
#   OMP_NUM_THREADS              CPU threads per process; else the node's cores / NPROC
#   NUMA_BINDING                 --numa-binding of torchrun (node, socket, exclusive, core-complex), or none; else node
#                                where it works (torchrun.sh)
#   NODE_DISK                    folder on each node's own disk; else $TMPDIR or /tmp. Below it, unless they are set:
#   TORCHINDUCTOR_CACHE_DIR      what torch.compile made, for the user's next job or attempt on the node
#   TRITON_CACHE_DIR             the same of Triton
#   TORCHINDUCTOR_COMPILE_THREADS  processes that compile for one that trains; else the node's cores / NPROC
#   PYTORCH_ALLOC_CONF           of the GPUs' memory; else expandable_segments:True, so that buckets of many shapes fit
#   NODE_REQUEUES                how often a job is requeued without nodes that do not answer or are not sound; else 3
set -uo pipefail

read -ra container <<< "${CONTAINER:-}"
venv=${LATENTLINE_VENV:-${VIRTUAL_ENV:-}}
[ -z "$venv" ] || PATH=$venv/bin:$PATH

# NodeAddr is what SLURM itself connects to; a host name alone need not resolve on every node.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$head_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Differs for each job and attempt, so that one never meets the remains of another.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0} * 1000) % 10000))
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it (since SLURM 22.05)
cores=$((SRUN_CPUS_PER_TASK / NPROC > 1 ? SRUN_CPUS_PER_TASK / NPROC : 1)) # of a process
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$cores}
PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Not of the job: those that it compiles and unpacks are found again by its next attempt, where the disk keeps them.
node_disk=${NODE_DISK:-${TMPDIR:-/tmp}}/latentline-$UID
TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_disk/inductor}
TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_disk/triton}
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
# A run that ends because of a node leaves the node's name here, one a line; none where it cannot tell which one.
SUSPECTS_FILE=$PWD/slurm/logs/.suspects-$SLURM_JOB_ID
evictions=$PWD/slurm/logs/.evictions-$SLURM_JOB_ID # a line for each requeue that this led to
export PATH MASTER_ADDR MASTER_PORT NPROC OMP_NUM_THREADS SRUN_CPUS_PER_TASK SLURM_EXPORT_ENV SLURM_LABELIO REQUEUE_FILE
export PYTHONUNBUFFERED NCCL_DEBUG TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE SUSPECTS_FILE PYTORCH_ALLOC_CONF
export TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_COMPILE_THREADS
rm -f "$REQUEUE_FILE" "$SUSPECTS_FILE"

if [ -n "${LATENTLINE_VENV_TAR:-}" ]; then
  copy=$node_disk/venv-$(stat -L -c %Y-%s "$LATENTLINE_VENV_TAR") || exit 2 # another tar gets another folder
  if ! srun test -e "$copy" 2> /dev/null; then
    tar=$copy.$SLURM_JOB_ID.tar # another job of the node may be at its own
    # Under its name only once it is whole; one that another job has made meanwhile is as good.
    # shellcheck disable=SC2016  # expanded on each node
    srun mkdir -p "$node_disk" && sbcast --force "$LATENTLINE_VENV_TAR" "$tar" &&
      srun bash -c 'draft=$(mktemp -d "$2.XXXXXX") || exit
        tar -xf "$1" -C "$draft"; status=$?
        [ "$status" -ne 0 ] || mv -T "$draft" "$2" 2> /dev/null
        rm -rf "$draft"; exit "$status"' unpack "$tar" "$copy"
    unpacked=$?
    srun rm -f "$tar"
    [ "$unpacked" -eq 0 ] || exit 2
  fi
  # What no job has begun with for a month goes, and what a kill has left of an unpacking.
  # shellcheck disable=SC2016
  srun bash -c 'touch "$1"; find "${1%/*}" -maxdepth 1 -name "venv-*" \( -mtime +30 -o -name "*.*" -mtime +0 \) \
    -exec rm -rf {} +' tidy "$copy"
  PATH=$copy/bin:$PATH
fi
found='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
if [ ${#container[@]} -eq 0 ] && ! python -c "$found" 2>/dev/null; then
  echo "error: no python with torch: activate the virtual environment before sbatch, or set LATENTLINE_VENV=FOLDER" >&2
  exit 2
fi

# One task per node is said here and not to sbatch, which would count the tasks of --nodes=3-4 for the fewest nodes.
SRUN=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}")
# shellcheck disable=SC2034  # used by the scripts
TORCHRUN=("${SRUN[@]}" bash slurm/torchrun.sh)

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
  [ ! -e "$SUSPECTS_FILE" ] || requeue_elsewhere
  [ "$status" -ne 0 ] || rm -f "$evictions"
  exit "$status"
}

# The id of one task of an array is that of the array, too, by which scontrol would mean all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Only while SLURM calls the job RUNNING may it be requeued: one that scancel ended would come back.
is_running() { [ "$(fact JobState)" = RUNNING ]; }

fact() { scontrol show job -o "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

requeue() {
  rm -f "$REQUEUE_FILE"
  is_running || return
  scontrol requeue "$job" && sleep 60 # SLURM ends this script meanwhile
}

# Requeue without the nodes that the run named; what happens again and again is no node's fault.
requeue_elsewhere() {
  local nodes excluded
  nodes=$(sort -u "$SUSPECTS_FILE" | paste -sd ,)
  rm -f "$SUSPECTS_FILE"
  is_running || return
  if [ -e "$evictions" ] && [ "$(wc -l < "$evictions")" -ge "${NODE_REQUEUES:-3}" ]; then
    echo "error: requeued NODE_REQUEUES=${NODE_REQUEUES:-3} times already, and again because of ${nodes:-no node named}" >&2
    return
  fi
  echo "$(date '+%F %T') requeued, leaving out: ${nodes:-no node}" | tee -a "$evictions"
  excluded=$(fact ExcNodeList)
  [ "$excluded" != "(null)" ] || excluded=
  # First the requeue: SLURM changes the nodes of waiting jobs only. It ends this script, which has a word to add.
  trap '' TERM
  scontrol requeue "$job" || return
  [ -z "$nodes" ] || scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$nodes"
}
