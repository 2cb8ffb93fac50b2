#!/bin/bash
# All four jobs, each after what it needs; image shards must be there (data/build_shards.py).
#   slurm/pipeline.sh [SBATCH OPTIONS as --name=value] [OVERRIDES]
#   slurm/pipeline.sh --partition=a100 run_dir=/data/run1 unet.optim.lr=1e-4
# An override goes to all jobs; with a first word autoencoder., clip., latents. or unet. to that job only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=() overrides=() jobs=()
for argument in "$@"; do
  if [[ $argument == -* ]]; then options+=("$argument"); else overrides+=("$argument"); fi
done

refused() {
  [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
  echo "error: sbatch refused the job of stage $1: none of this pipeline is left in the queue" >&2
  exit 1
}

submit() { # stage, script, ids of the jobs it waits for
  local stage=$1 script=$2 mine=() wait=() override
  shift 2
  for override in "${overrides[@]}"; do
    case $override in
      "$stage".*) mine+=("${override#"$stage".}") ;;
      autoencoder.* | clip.* | latents.* | unet.*) ;;
      *) mine+=("$override") ;;
    esac
  done
  # Without kill-on-invalid-dep a job whose predecessor failed would wait forever.
  [ $# -eq 0 ] || wait=(--dependency="afterok:$(IFS=:; echo "$*")" --kill-on-invalid-dep=yes)
  job=$(sbatch --parsable "${options[@]}" "${wait[@]}" "slurm/$script.sh" "${mine[@]}") || refused "$stage"
  job=${job%%;*} # --parsable adds the cluster's name where there are several
  jobs+=("$job")
  echo "$job $stage"
}

submit autoencoder train_autoencoder
submit clip train_clip
submit latents precompute_latents "${jobs[@]}"
submit unet train_unet "$job"
