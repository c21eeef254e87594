#!/usr/bin/env bash
# Set-up and all tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
cd "$root"
python -m ruff check .
python -m ruff format --check .
python -m pip check
exec python -m pytest "$@"
