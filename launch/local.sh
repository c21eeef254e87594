#!/usr/bin/env bash
# Set-up and training on this machine: bash launch/local.sh [CONFIG] [--flag value ...]
# Without CONFIG: configs/quickstart.yaml, run in the checkout. Flags are those of `repo-jax train --help`.
set -euo pipefail
extra=
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
. "$root/launch/flags.sh"
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  cd "$root"
  set -- configs/quickstart.yaml "$@"
fi
exec python -m repo_jax train "$@"
