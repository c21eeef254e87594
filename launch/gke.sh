#!/usr/bin/env bash
# Training on TPU node pools of GKE: fills in launch/gke_jobset.yaml and hands it to kubectl's current cluster.
#   bash launch/gke.sh create NAME --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 [--slices N]
#        [--chips_per_host 4] [--dry-run] -- train CONFIG --output_dir gs://BUCKET/RUN [--flag value ...]
#   bash launch/gke.sh logs | delete NAME [--dry-run]
# IMAGE: docker build --build-arg EXTRA=tpu --tag IMAGE --file launch/Dockerfile . && docker push IMAGE
# ACCELERATOR: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
# A JobSet cannot be changed: delete it, create it again, and the run goes on from its newest checkpoint.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/commands.sh"

image='' accelerator='' topology='' slices=1 chips=4 dry_run=''

parse() {
  command=${1:-} name=${2:-}
  case "$command" in
    create | logs | delete) ;;
    *) die "unknown command '$command'; choose one of create, logs, delete" ;;
  esac
  [[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "NAME is '$name'; write lower-case letters, digits and dashes: $command NAME ..."
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case "$1" in
      --dry-run) ;;
      --image | --accelerator | --topology | --slices | --chips_per_host) [ $# -gt 1 ] || die "$1 needs a value" ;;
      *) die "unknown option '$1' before --; the options are in the first lines of launch/gke.sh, repo_jax's own stand after --" ;;
    esac
    case "$1" in
      --dry-run) dry_run=1 ;;
      --image) image=$2 && shift ;;
      --accelerator) accelerator=$2 && shift ;;
      --topology) topology=$2 && shift ;;
      --slices) slices=$2 && shift ;;
      --chips_per_host) chips=$2 && shift ;;
    esac
    shift
  done
  [ $# -eq 0 ] || shift
  arguments=("$@")
}

check() {
  vmem_kib=50000
  case "$accelerator" in
    tpu-v4-podslice | tpu-v5-lite-podslice | tpu-v5p-slice) ;;
    tpu-v6e-slice | tpu7x) vmem_kib=98304 ;;
    *) die "--accelerator is '$accelerator'; choose tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu7x" ;;
  esac
  [[ "$image" =~ ^[-A-Za-z0-9._/:@]+$ ]] || die "--image is '$image'; give what docker push was given"
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology is '$topology'; give that of the node pool, e.g. 4x4 or 2x2x2"
  [[ "$slices" =~ ^[1-9][0-9]*$ ]] || die "--slices is '$slices'; give a whole number from 1"
  [[ "$chips" =~ ^[1-9][0-9]*$ ]] || die "--chips_per_host is '$chips'; give a whole number from 1"
  [ ${#arguments[@]} -gt 0 ] || die "nothing to run; end with: -- train CONFIG --output_dir gs://BUCKET/RUN"
  local all=$((${topology//x/*}))
  [ "$all" -ge "$chips" ] || chips=$all
  [ $((all % chips)) -eq 0 ] || die "--chips_per_host $chips does not divide the $all chips of topology $topology"
  hosts=$((all / chips))
}

yaml_list() {  # words as a YAML list. In args Kubernetes reads $(X) as a variable and $$ as one $.
  local word list=''
  for word; do
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//$'\n'/\\n} word=${word//$'\t'/\\t} word=${word//\$/\$\$}
    list+=", \"$word\""
  done
  printf '%s' "[${list#, }]"
}

create() {
  shopt -u patsub_replacement 2>/dev/null || true  # bash 5.2 would read & in what is filled in
  check
  local text
  text=$(cat "$root/launch/gke_jobset.yaml")
  text=${text//\$NAME/$name} text=${text//\$IMAGE/$image} text=${text//\$ACCELERATOR/$accelerator}
  text=${text//\$TOPOLOGY/$topology} text=${text//\$SLICES/$slices} text=${text//\$HOSTS/$hosts}
  text=${text//\$CHIPS/$chips} text=${text//\$VMEM_KIB/$vmem_kib}
  text=${text//\$ARGS/$(yaml_list "${arguments[@]}")}  # the last, for what a user writes may look like the others
  if [ -n "$dry_run" ]; then
    printf "kubectl create --filename=- <<'JOBSET'\n%s\nJOBSET\n" "$text"
  else
    run kubectl create --filename=- <<<"$text"
  fi
}

logs() {  # of the first host of the first slice
  local first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  run kubectl logs --follow --tail=1000 --selector="$first"
}

delete() {
  run kubectl delete jobset "$name"
}

parse "$@"
"$command"
