#!/bin/bash
# Metrics of a trained U-Net, once.
#   sbatch slurm/evaluate.sh run_dir=/data/run1 inception=/data/weights-inception-2015-12-05-6726825d.pth
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out

source slurm/common.sh || exit 2 # not found: submit from the repository, or with --chdir=REPOSITORY
RESTARTABLE=yes # it begins again
run "${TORCHRUN[@]}" train/evaluate.py runtime=gpu "$@"
