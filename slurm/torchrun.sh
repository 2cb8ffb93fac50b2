#!/bin/bash
# One torchrun on this node, started by srun (common.sh): the program and its options follow.
set -u
# Near the GPU of each process. torchrun ends the run where it cannot: without GPUs, without numactl, or where SLURM gave
# the job no core of a NUMA node that has some. A virtual machine may not say near what its GPUs are (-1): torchrun would
# bind all processes to the first node.
if [ -z "${NUMA_BINDING:-}" ]; then
  NUMA_BINDING=none
  with_cores=$(grep -l '[0-9]' /sys/devices/system/node/node*/cpulist 2> /dev/null | wc -l)
  ours=$(numactl --show 2> /dev/null | sed -n 's/^cpubind://p' | wc -w)
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ -e /dev/nvidia0 ] && [ "$ours" -gt 0 ] && [ "$ours" -eq "$with_cores" ] &&
    ! grep -qsx -e -1 /sys/bus/pci/drivers/nvidia/*/numa_node; then
    NUMA_BINDING=node
  fi
fi
[ "$NUMA_BINDING" = none ] && binding=() || binding=("--numa-binding=$NUMA_BINDING")

# The agent would die of USR1, which is for the workers: they set their own handlers. At a TERM it would kill them after
# 30 s. MAX_RESTARTS: how often it starts them again when one of them dies.
trap "" USR1
exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$NPROC" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="${MAX_RESTARTS:-0}" \
  --shutdown-timeout=300 "${binding[@]}" "$@"
