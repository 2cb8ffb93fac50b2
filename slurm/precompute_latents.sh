#!/bin/bash
# Image shards to latent shards, once; as an array, sixteen nodes share the work.
#   sbatch slurm/precompute_latents.sh dtype=bf16
#   sbatch --array=0-15 slurm/precompute_latents.sh
#SBATCH --job-name=precompute_latents
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out

source slurm/common.sh || exit 2 # not found: submit from the repository, or with --chdir=REPOSITORY
RESTARTABLE=yes MAX_RESTARTS=2 # finished shards are kept
export MAX_RESTARTS
run "${TORCHRUN[@]}" data/precompute_latents.py runtime=gpu "$@"
