#!/bin/bash
# All jobs, each after what it needs: shards, autoencoder and CLIP side by side, latents, U-Net, evaluation.
#   slurm/pipeline.sh [SBATCH OPTIONS as --name=value] [OVERRIDES]
#   slurm/pipeline.sh --partition=a100 run_dir=/data/run1 unet.optim.lr=1e-4 latents.--array=0-15
# With a first word build., autoencoder., clip., latents., unet. or evaluate. an argument is for that job only. Without one
# it goes to all jobs; of the overrides the build takes only run_dir=, name=, seed= and experiment=. There is no build where
# run_dir= holds shards already or shards= names others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=("$@") jobs=()

refused() {
  [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
  echo "error: sbatch refused the job of stage $1: none of this pipeline is left in the queue" >&2
  exit 1
}

submit() { # stage, script, ids of the jobs it waits for
  local stage=$1 script=$2 argument options=() overrides=()
  shift 2
  for argument in "${arguments[@]}"; do
    case $argument in
      "$stage".*) argument=${argument#"$stage".} ;;
      build.* | autoencoder.* | clip.* | latents.* | unet.* | evaluate.*) continue ;;
      -* | run_dir=* | name=* | seed=* | experiment=*) ;;
      *) [ "$stage" != build ] || continue ;;
    esac
    if [[ $argument == -* ]]; then options+=("$argument"); else overrides+=("$argument"); fi
  done
  # Without kill-on-invalid-dep a job whose predecessor failed would wait forever.
  [ $# -eq 0 ] || options+=(--dependency="afterok:$(IFS=:; echo "$*")" --kill-on-invalid-dep=yes)
  job=$(sbatch --parsable "${options[@]}" "slurm/$script.sh" "${overrides[@]}") || refused "$stage"
  job=${job%%;*} # --parsable adds the cluster's name where there are several
  jobs+=("$job")
  echo "$job $stage"
}

build=yes
for argument in "${arguments[@]}"; do
  case $argument in
    run_dir=*) [ ! -d "${argument#*=}/shards/train" ] || build='' ;;
    shards=*) build='' ;;
  esac
done

[ -z "$build" ] || submit build build_shards
shards=("${jobs[@]}")
submit autoencoder train_autoencoder "${shards[@]}"
autoencoder=$job
submit clip train_clip "${shards[@]}"
submit latents precompute_latents "$autoencoder" "$job"
submit unet train_unet "$job"
submit evaluate evaluate "$job"
