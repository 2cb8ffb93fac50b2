#!/usr/bin/env bash
# Start a real SLURM with pretended nodes on loopback:  start.sh BASE NODES PORT
# Then:  export SLURM_CONF=BASE/etc/slurm.conf          stop.sh BASE
# Takes TCP ports PORT (slurmctld) to PORT+NODES (one slurmd each). Each node pretends 64 cores and 8 GPUs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=$(mkdir -p "$1" && cd "$1" && pwd)
count=$2 port=$3 gpus=8 host=$(hostname -s)
mkdir -p "$base"/{etc,munge,state,run,log}
chmod 700 "$base/munge" "$base/state"
export SLURM_CONF=$base/etc/slurm.conf

failed() {
  tail -n 5 "$base"/log/*.log >&2
  "$here/stop.sh" "$base"
  exit 1
}
trap failed ERR

nodes=
for i in $(seq 1 "$count"); do
  mkdir -p "$base/spool/node$i"
  nodes+="NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) "
  nodes+="CPUs=64 RealMemory=512000 Gres=gpu:$gpus State=UNKNOWN\n"
done
sed -e "s|@BASE@|$base|g; s|@HOST@|$host|g; s|@USER@|$(id -un)|g; s|@PORT@|$port|g; s|@NODES@|$nodes|" \
  "$here/slurm.conf.in" > "$SLURM_CONF"
# Any character devices stand in for GPUs: SLURM only checks that they exist, counts and numbers them.
mapfile -t devices < <(find /dev -type c ! -name '*[0-9]*' | sort | head -n "$gpus")
printf "NodeName=node[1-$count] Name=gpu File=%s\n" "${devices[@]}" > "$base/etc/gres.conf"

(umask 077 && head -c 1024 /dev/urandom > "$base/munge/munge.key")
munged --force --socket="$base/run/munge.sock" --key-file="$base/munge/munge.key" \
  --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" --seed-file="$base/munge/munged.seed"
slurmctld -f "$SLURM_CONF"
for i in $(seq 1 "$count"); do slurmd -f "$SLURM_CONF" -N "node$i"; done

for _ in $(seq 1 200); do
  # "idle", not "idle*": the star marks a node that has not answered
  [ "$(sinfo -h -N -p wide -o %t 2> /dev/null | grep -cx idle)" -eq "$count" ] && exit 0
  sleep 0.1
done
echo "start.sh: the nodes did not become idle within 20 s" >&2
failed
