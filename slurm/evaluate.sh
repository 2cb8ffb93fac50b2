#!/bin/bash
# Metrics of a trained U-Net; with watch=true of each checkpoint, from the start of a training to its end.
#   sbatch slurm/evaluate.sh run_dir=/data/run1 inception=/data/weights-inception-2015-12-05-6726825d.pth
#   sbatch slurm/evaluate.sh run_dir=/data/run1 protocol=coco30k shards=/data/coco watch=true
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
RESTARTABLE=yes # what was measured is kept
run "${TORCHRUN[@]}" train/evaluate.py runtime=gpu "$@"
