import subprocess
import sys

import pytest
from examples import ROOT


@pytest.mark.slow
def test_fifteen_kills_at_random_moments_change_no_bit():
    """A hundred: python benchmarks/kill_and_resume.py; what came of them stands in benchmarks/results/kills.json."""
    command = [sys.executable, "benchmarks/kill_and_resume.py", "--kills", "15", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
