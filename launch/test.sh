#!/usr/bin/env bash
# Set-up and all tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
extra=requirements-test.txt
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
python -m ruff check .
python -m ruff format --check .
python -m pip check
exec python -m pytest -n 2 --dist loadfile "$@"
