#!/usr/bin/env bash
# Stop the cluster that start.sh started, by the process ids in its files:  stop.sh BASE
set -u
base=$(cd "$1" && pwd) || exit
export SLURM_CONF=$base/etc/slurm.conf

alive() { [ -r "/proc/$1/stat" ] && ! grep -q ') Z ' "/proc/$1/stat"; } # a container's first process may leave zombies

stop() { # file with a process id
  local pid
  pid=$(cat "$1" 2> /dev/null) && alive "$pid" || return 0
  kill -TERM "$pid"
  for _ in $(seq 1 100); do
    alive "$pid" || return 0
    sleep 0.1
  done
  kill -KILL "$pid"
}

if [ -e "$base/run/slurmctld.pid" ]; then
  scancel --user="$(id -un)" 2> /dev/null
  for _ in $(seq 1 100); do
    [ -z "$(squeue -h 2> /dev/null)" ] && break
    sleep 0.1
  done
fi
for file in "$base"/run/slurmd.*.pid "$base"/run/slurmctld.pid "$base"/run/munged.pid; do stop "$file"; done
