#!/bin/bash
# The denoising U-Net on latent shards, with DeepSpeed.
#   sbatch slurm/train_unet.sh optim.lr=1e-4
#SBATCH --job-name=train_unet
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out

source slurm/common.sh || exit 2 # not found: submit from the repository, or with --chdir=REPOSITORY
run "${TORCHRUN[@]}" train/train_unet.py runtime=gpu "$@"
