"""python -m repo_jax is repo-jax."""

import sys

from repo_jax.cli import main

sys.exit(main())
