#!/usr/bin/env bash
# Training on Cloud TPU VMs, one slice or several. Every command takes the same line, so only its first word changes:
#   bash launch/tpu_vm.sh COMMAND NAME --zone ZONE --type TYPE [--slices N] [--queued] [--spot] [--dry-run]
#        [--hf_secret SECRET] [--create_flag FLAG ...] -- train CONFIG --output_dir gs://BUCKET/RUN [--flag value ...]
#   create    asks for the machine and waits; with --queued (or several slices) it joins the queue instead
#   install   copies what is committed to all workers, with a Python of its own
#   run       starts repo_jax on all workers; it goes on when this connection ends
#   logs      follows the log of the first worker
#   resume    does what is missing of create, install and run, again after each preemption, till training has ended;
#             the run goes on from its newest checkpoint, which is why output_dir is a bucket
#   delete    gives the machine back
# TYPE: v4-N, v5litepod-N, v5p-N, v6e-N. SECRET: a name in Secret Manager that holds HF_TOKEN, read on the workers.
# FLAG: more for gcloud's create, e.g. --create_flag --reserved. Before: gcloud auth login; ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/commands.sh"

poll=${POLL_SECONDS:-60}
patience=5  # looks at a machine that answers badly, before resume gives up

# ---- what was asked ----

zone='' type='' slices=1 queued='' spot='' dry_run='' hf_secret='' create_flags=()

parse() {
  command=${1:-} name=${2:-}
  case "$command" in
    create | install | run | logs | resume | delete) ;;
    *) die "unknown command '$command'; choose one of create, install, run, logs, resume, delete" ;;
  esac
  [[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "NAME is '$name'; write lower-case letters, digits and dashes: $command NAME --zone ..."
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case "$1" in
      --queued | --spot | --dry-run) ;;
      --zone | --type | --slices | --hf_secret | --create_flag) [ $# -gt 1 ] || die "$1 needs a value" ;;
      *) die "unknown option '$1' before --; the options are in the first lines of launch/tpu_vm.sh, repo_jax's own stand after --" ;;
    esac
    case "$1" in
      --queued) queued=1 ;;
      --spot) spot=1 ;;
      --dry-run) dry_run=1 ;;
      --zone) zone=$2 && shift ;;
      --type) type=$2 && shift ;;
      --slices) slices=$2 && shift ;;
      --hf_secret) hf_secret=$2 && shift ;;
      --create_flag) create_flags+=("$2") && shift ;;
    esac
    shift
  done
  [ $# -eq 0 ] || shift
  arguments=("$@")
}

check() {
  [ -n "$zone" ] || die "no --zone; give the one where the TPU is, e.g. --zone us-west4-a"
  [[ "$slices" =~ ^[1-9][0-9]*$ ]] || die "--slices is '$slices'; give a whole number from 1"
  [ "$slices" -eq 1 ] || queued=1  # only a queued resource holds several nodes
  case "$type" in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5e-*) die "--type is '$type', which Google calls v5litepod-${type#v5e-}" ;;
    tpu7x* | v7x*) die "TPU7x has no TPU VMs, it goes through GKE: bash launch/gke.sh create $name --accelerator tpu7x ..." ;;
    '') case "$command" in create | run | resume) die "no --type; give v4-N, v5litepod-N, v5p-N or v6e-N" ;; esac ;;
    *) die "--type is '$type'; choose v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
  case "$command" in
    run | resume) [ ${#arguments[@]} -gt 0 ] || die "nothing to run; end with: -- train CONFIG --output_dir gs://BUCKET/RUN" ;;
  esac
}

# ---- one step each ----

tpus() {  # a command on the machine: a queued resource (one node or several) or a plain TPU VM
  local kind=tpu-vm
  [ -z "$queued" ] || kind="queued-resources"
  run gcloud compute tpus "$kind" "$1" "${@:2}" --zone="$zone"
}

on_workers() {  # on all or 0 COMMAND: a shell line for the workers
  local where=(--worker="$1")
  [ -z "$queued" ] || where+=(--node="$1")
  tpus ssh "$name" "${where[@]}" --command="$2"
}

create() {
  local flags=(--accelerator-type="$type")
  if [ -z "$queued" ]; then
    flags+=(--version="$runtime")
  else
    flags+=(--runtime-version="$runtime")
    if [ "$slices" -eq 1 ]; then flags+=(--node-id="$name"); else flags+=(--node-count="$slices" --node-prefix="$name"); fi
  fi
  [ -z "$spot" ] || flags+=(--spot)
  tpus create "$name" "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

pack() {  # what is committed, nothing else: no secrets, no runs. Inside .git, so that it is never committed itself.
  archive="$(git -C "$root" rev-parse --absolute-git-dir)/repo_jax-$name.tar.gz"
  [ -z "$(git -C "$root" status --porcelain)" ] || echo "launch: changes that are not committed stay here" >&2
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
}

install_() {
  local where=(--worker=all)
  [ -z "$queued" ] || where+=(--node=all)
  tpus scp "$archive" "$name:repo_jax.tar.gz" "${where[@]}" &&
    on_workers all "mkdir -p repo_jax && tar -xzf repo_jax.tar.gz -C repo_jax && bash repo_jax/launch/tpu_worker.sh install"
}

start() {
  on_workers all "bash repo_jax/launch/tpu_worker.sh start $(quoted "$type" "$hf_secret" "${arguments[@]}")"
}

logs() {
  on_workers 0 "tail -n 1000 -F repo_jax/launched/train.log"
}

delete() {
  local flags=(--quiet)
  [ -z "$queued" ] || flags+=(--force)  # with its nodes
  tpus delete "$name" "${flags[@]}"
}

# ---- resume: two questions decide the next step ----

story="missing ACTIVE none ACTIVE 0"  # what a dry run hears: a first run from beginning to end

ask() {  # sets $answer to what a command says
  if [ -n "$dry_run" ]; then
    "$@"
    answer=${story%% *} story=${story#* }
  else
    answer=$("$@" 2>"$errors")
  fi
}

look_at_machine() {
  local state=state
  [ -z "$queued" ] || state=state.state
  if ask tpus describe "$name" --format="value($state)"; then
    machine=$answer
  elif grep -q NOT_FOUND "$errors"; then
    machine=missing
  else
    machine=unreachable && cat "$errors" >&2
  fi
}

look_at_training() {  # the first worker speaks for all: when one ends, all end
  local words
  words=$(quoted "$type" "$hf_secret" "${arguments[@]}")
  if ask on_workers 0 "if [ -d repo_jax ]; then bash repo_jax/launch/tpu_worker.sh status $words; else echo none; fi"; then
    training=${answer##*$'\n'}
  else
    training=unreachable && cat "$errors" >&2
  fi
}

pause() {
  [ -n "$dry_run" ] || sleep "$poll"
}

doubt() {  # after a preemption steps fail and training ends badly before the machine's state says why, so look again
  doubts=$((doubts + 1))
  echo "launch: $1" >&2
  if [ "$doubts" -ge "$patience" ]; then
    [[ "${training:-}" =~ ^[1-9][0-9]*$ ]] && exit "$training"
    exit 1
  fi
  pause
}

resume() {
  doubts=0 errors=$(mktemp) anew=1  # resume was called anew, so that what has failed before is started again
  trap 'rm -f "$errors"' EXIT
  pack
  while true; do
    training=''
    look_at_machine
    case "$machine" in
      missing) create || doubt "create failed" ;;
      SUSPENDED | PREEMPTED | TERMINATED) delete || doubt "delete failed" ;;
      FAILED) die "the request for $name FAILED; gcloud compute tpus queued-resources describe $name --zone=$zone says why" ;;
      ACTIVE | READY)
        look_at_training
        case "$training" in
          0)
            [ -n "$dry_run" ] && echo "# and from the top when it is preempted" && return
            echo "launch: training has ended; the machine is kept (and paid for) until: bash launch/tpu_vm.sh delete $name --zone $zone" >&2 && return
            ;;
          running) anew='' doubts=0 && pause ;;
          75) anew='' && { start || doubt "run failed"; } ;;  # it saved, and asks to be started again
          none) anew='' && { { install_ && start; } || doubt "install or run failed"; } ;;
          unreachable) doubt "no answer from the first worker" ;;
          *)
            if [ -n "$anew" ]; then
              anew='' && { start || doubt "run failed"; }
            else
              doubt "training ended with exit code $training; bash launch/tpu_vm.sh logs shows why"
            fi
            ;;
        esac
        ;;
      STOPPED) die "$name is STOPPED; gcloud compute tpus tpu-vm start $name --zone=$zone, or delete it" ;;
      unreachable) doubt "no answer about $name" ;;
      *) pause ;;  # queued, or on its way to another state
    esac
  done
}

parse "$@"
check
case "$command" in
  install) pack && install_ ;;
  run) start ;;
  *) "$command" ;;
esac
