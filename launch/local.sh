#!/usr/bin/env bash
# Set-up and training on this machine: bash launch/local.sh [CONFIG] [--flag value ...]
# CONFIG is configs/quickstart.yaml unless named; flags are those of `repo-jax train --help`.
set -euo pipefail
here=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
config=configs/quickstart.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  config=$1
  shift
  # A path is meant from where the command was given, or else from the checkout.
  [ -f "$here/$config" ] && config="$here/$config"
fi
exec python -m repo_jax train "$config" "$@"
