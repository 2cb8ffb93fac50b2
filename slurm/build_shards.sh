#!/bin/bash
# Image-text shards from any source, on the cores of one node.
#   sbatch slurm/build_shards.sh run_dir=/data/run1 source=folder path=/data/photos resolution=512
#SBATCH --job-name=build_shards
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out

source slurm/common.sh || exit 2 # not found: submit from the repository, or with --chdir=REPOSITORY
RESTARTABLE=yes # finished shards are kept
run "${SRUN[@]}" python data/build_shards.py "$@"
