# shellcheck shell=bash
# Sourced by the scripts that call a cloud's own programs. The caller sets $dry_run: empty, or anything to only print.

die() {
  echo "launch: $*" >&2
  exit 2
}

quoted() {  # its arguments as a line that a shell reads back just as they are
  local word line='' quote="'\\''"
  for word; do
    if [[ ! "$word" =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]]; then
      word=${word//\'/$quote}
      word="'$word'"
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

say() {  # the command, where a dry run is read; beside the output of the real one
  if [ -n "$dry_run" ]; then quoted "$@"; echo; else echo "+ $(quoted "$@")" >&2; fi
}

run() {
  say "$@"
  [ -n "$dry_run" ] || "$@"
}
