#!/usr/bin/env bash
# What launch/tpu_vm.sh has every TPU worker do, in the tree that it copied there:
#   bash repo_jax/launch/tpu_worker.sh install | start TYPE HF_SECRET train CONFIG ... | status TYPE HF_SECRET train CONFIG ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p launched  # lock, command, log and exit code of the training here

install() {
  # The image's Python is too old; uv brings its own 3.12. Newer systems refuse pip --user without the variable, older
  # pips do not know it.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
  ~/.local/bin/uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
}

start() {
  # The lock passes to the training and goes with its last process: two at once would fight for the TPU, and a lock
  # that nobody holds says that a reboot ended the training.
  exec 9>launched/lock
  flock --nonblock 9 || { echo "launch: training is running on $(hostname) already" >&2 && exit 1; }
  rm -f launched/exit_code
  printf '%q ' "$@" >launched/command
  setsid bash launch/tpu_worker.sh attend "$@" >>launched/train.log 2>&1 </dev/null &
}

attend() {
  local type=$1 hf_secret=$2 code=0
  shift 2
  TPU_ACCELERATOR_TYPE=$type . launch/flags.sh  # for flags.sh alone: libtpu knows better
  if [ -n "$hf_secret" ]; then
    HF_TOKEN=$(gcloud secrets versions access latest --secret="$hf_secret") || code=$?
    export HF_TOKEN
  fi
  [ "$code" -ne 0 ] || .venv/bin/python -m repo_jax "$@" || code=$?
  echo "$code" >launched/exit_code
}

status() {  # running, the exit code of this very command, or none
  if ! flock --nonblock launched/lock true; then
    echo running
  elif [ -e launched/exit_code ] && [ "$(cat launched/command)" = "$(printf '%q ' "$@")" ]; then
    cat launched/exit_code
  else
    echo none
  fi
}

"$@"
