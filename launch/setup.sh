# Sourced by the other scripts: leaves `python` of a ready environment on PATH.
#   . launch/setup.sh [requirements-test.txt]
# Uses the active environment (venv, conda) or makes .venv; installs when what is to be installed has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      candidate=
    done
    if [ -z "$candidate" ]; then
      echo "launch: no Python 3.11 or newer found; install one, or activate an environment that has it" >&2
      exit 2
    fi
    echo "launch: making .venv with $("$candidate" --version)"
    "$candidate" -m venv .venv || exit 1
  fi
  VIRTUAL_ENV="$PWD/.venv"
  export VIRTUAL_ENV PATH="$PWD/.venv/bin:$PATH"
fi

# The stamp holds what was installed and is written last: an install that broke off is done again.
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.repo_jax-stamp"
wanted="$PWD $(python --version) ${1:-} $(cat requirements.txt pyproject.toml ${1:+"$1"} | cksum)"
if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
  echo "launch: installing into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
  python -m pip install --quiet --disable-pip-version-check ${1:+-r "$1"} -e . || exit 1
  # One line per set of requirements, so that tests and training do not undo each other.
  { grep -vF "$PWD $(python --version) ${1:-} " "$stamp" 2>/dev/null; echo "$wanted"; } > "$stamp.new"
  mv "$stamp.new" "$stamp"
fi
