# Sourced by the other scripts: puts `python` of a ready environment on PATH and sets $root, the checkout.
# The caller sets $extra: a further list of requirements, or nothing; and may set $accelerator: tpu, cuda12 or cuda13.
# Uses the active environment (venv, conda) or makes .venv; installs when what is to be installed has changed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 1

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      candidate=
    done
    if [ -z "$candidate" ]; then
      echo "launch: no Python 3.11 or newer found; install one, or activate an environment that has it" >&2
      exit 2
    fi
    echo "launch: making .venv with $("$candidate" --version)"
    "$candidate" -m venv --clear "$root/.venv" || {
      rm -rf "$root/.venv"
      echo "launch: $candidate cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
      exit 2
    }
  fi
  export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
fi

# The stamp holds what was installed and is written last: an install that broke off is done again.
# One line for each list of requirements, so that tests and training do not undo each other.
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.repo_jax-stamp"
what="$root $extra:"
package="$root${accelerator:+[$accelerator]}"
wanted="$what ${accelerator:-cpu} $(python --version) $(cd "$root" && cat requirements.txt pyproject.toml $extra | cksum)"
if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
  echo "launch: installing into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
  python -m pip install --quiet --disable-pip-version-check ${extra:+-r "$root/$extra"} -e "$package" || exit 1
  { grep -vF "$what " "$stamp" 2>/dev/null || true; echo "$wanted"; } > "$stamp.new"
  mv "$stamp.new" "$stamp"
fi
