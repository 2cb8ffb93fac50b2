#!/bin/bash
# A student that draws in one to four steps, of a trained U-Net, with DeepSpeed.
#   sbatch slurm/distill_unet.sh experiment=distill_sd1 teacher=runs/sd1/unet/export
#SBATCH --job-name=distill_unet
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
run "${TORCHRUN[@]}" train/distill_unet.py runtime=gpu "$@"
