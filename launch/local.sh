#!/usr/bin/env bash
# Set-up and training on this machine: bash launch/local.sh [CONFIG] [--flag value ...]
# Without CONFIG: configs/quickstart.yaml, run in the checkout. Flags are those of `repo-jax train --help`.
# What JAX needs for the TPU or NVIDIA GPU that shows here is installed too; ACCELERATOR=tpu|cuda12|cuda13|none decides instead.
set -euo pipefail
devices="${devices:-/dev}" extra=
accelerator="${ACCELERATOR:-}"
if [ -z "$accelerator" ]; then
  if compgen -G "$devices/accel[0-9]*" >/dev/null || compgen -G "$devices/vfio/[0-9]*" >/dev/null; then
    accelerator=tpu
  elif compgen -G "$devices/nvidia[0-9]*" >/dev/null; then
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || driver=
    case "${driver%%.*}" in
      '' | *[!0-9]*) accelerator=cuda12 ;;
      *) if [ "${driver%%.*}" -ge 580 ]; then accelerator=cuda13; else accelerator=cuda12; fi ;;
    esac
  fi
fi
accelerator="${accelerator#none}"
echo "launch: for ${accelerator:-the CPU}${driver:+, NVIDIA driver $driver} (ACCELERATOR=tpu, cuda12, cuda13 or none decides otherwise)"
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
. "$root/launch/flags.sh"
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  cd "$root"
  set -- configs/quickstart.yaml "$@"
fi
exec python -m repo_jax train "$@"
