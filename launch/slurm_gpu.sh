#!/usr/bin/env bash
# Training on the GPU nodes of a Slurm cluster, from the checkout:
#   bash launch/slurm_gpu.sh [--dry-run] [--OPTION=VALUE for sbatch ...] -- train CONFIG --output_dir RUN [--flag value ...]
#   e.g. bash launch/slurm_gpu.sh --nodes=2 --partition=gpu -- train configs/quickstart.yaml --output_dir /shared/run
# Checkout, environment and RUN are on a file system that all nodes see. Once, where there is internet:
#   python3.12 -m venv .venv && .venv/bin/pip install --editable '.[cuda12]'
# (or cuda13; an active environment comes before .venv). HF_TOKEN comes from the environment that sbatch is called in.
#
# What follows are defaults; options before -- go over them. JAX takes all GPUs of a node in one task. TERM goes to the
# tasks, two minutes before the time is over: training saves, exits with 75, and the job is put into the queue again.
#SBATCH --job-name=repo_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=repo_jax-%j.log
set -euo pipefail

# Slurm runs a copy of this file that it keeps elsewhere, in the folder where sbatch was called.
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
cd "$root"
[ -e launch/commands.sh ] || { echo "launch: $root is not the checkout; call launch/slurm_gpu.sh from there" >&2 && exit 2; }
. launch/commands.sh

dry_run='' options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --*) options+=("$1") ;;
    *) die "'$1' before --; sbatch's options are written --OPTION=VALUE, and repo_jax's words stand after --" ;;
  esac
  shift
done
[ $# -gt 1 ] || die "nothing to run; end with: -- train CONFIG --output_dir RUN"
shift

if [ -z "${SLURM_JOB_ID:-}" ]; then
  run sbatch ${options[@]+"${options[@]}"} launch/slurm_gpu.sh -- "$@"
  [ -z "$dry_run" ] || SLURM_JOB_ID=JOB bash launch/slurm_gpu.sh --dry-run -- "$@" | sed 's/^/# in the job: /'
  exit
fi

# Slurm makes JAX believe in one GPU a task unless it is told of all.
# shellcheck disable=SC2016  # for the task to read
task='set -euo pipefail
. launch/flags.sh
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
exec python -m repo_jax "$@"'

[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || PATH="$root/.venv/bin:$PATH"
code=0
# One task that has ended must not take the others with it: they may still be saving.
run srun --kill-on-bad-exit=0 bash -c "$task" repo_jax "$@" || code=$?
[ -z "$dry_run" ] || echo "# after exit code 75: scontrol requeue $SLURM_JOB_ID"
if [ "$code" -eq 75 ]; then run scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
