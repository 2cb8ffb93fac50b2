#!/bin/bash
# Image shards to latent shards, once.
#   sbatch slurm/precompute_latents.sh dtype=bf16
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
RESTARTABLE=yes # finished shards are kept
run srun --kill-on-bad-exit=1 "${TORCHRUN[@]}" data/precompute_latents.py runtime=gpu "$@"
