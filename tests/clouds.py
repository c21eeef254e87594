"""A checkout and the programs of all clouds, fake ones that write calls down, refuse wrong ones and change state."""

import json
import os
import shutil
import subprocess
import sys
import time

from examples import ROOT

LAUNCH = ROOT / "launch"
FAKES = ROOT / "tests" / "fakes"


class World:
    """A checkout, and the programs of all clusters on PATH."""

    def __init__(self, folder):
        self.folder, self.state, self.checkout = folder, folder / "state", folder / "checkout"
        self.state.mkdir(parents=True)
        self.checkout.mkdir()
        programs = {"gcloud": "gcloud", "kubectl": "kubectl", "sky": "sky", "uv": "python"}
        programs |= dict.fromkeys(("sbatch", "srun", "scontrol"), "slurm")
        for program, module in programs.items():
            self.program(folder / "bin" / program, module, program)
        self.program(self.state / "on_workers" / "python3", "python", "python3")
        endless = self.state / "on_workers" / "tail"  # -n N -F FILE, but with an end
        endless.write_text('#!/bin/sh\n[ "$1 $3" = "-n -F" ] && exec cat "$4"\n')
        endless.chmod(0o755)
        self.program(folder / "venv" / "bin" / "python", "python", "python")
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "pyproject.toml").touch()
        (self.checkout / ".gitignore").write_text(".env\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "all")
        (self.checkout / ".env").write_text("HF_TOKEN=hf_secret\n")

    @property
    def environment(self):
        return {
            "PATH": f"{self.folder / 'bin'}:{self.folder / 'venv' / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "FAKE_STATE": str(self.state),
            "POLL_SECONDS": "0.05",
        }

    def program(self, path, module, program):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKES / module}.py" {program} "$@"\n')
        path.chmod(0o755)

    def git(self, *arguments):
        me = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *me, *arguments], cwd=self.checkout, check=True)

    def run(self, *words, **environment):
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment | environment,
            cwd=self.checkout,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def launch(self, script, *arguments, **environment):
        return self.run("bash", f"launch/{script}", *arguments, **environment)

    def outcomes(self, *outcomes):
        """How the next trainings end: an exit code each, or that the machine is taken away."""
        (self.state / "outcomes").write_text("\n".join(map(str, outcomes)))

    def calls(self, *programs, where=None):
        """What was called, in order: of these programs, or everything from one place."""
        path = self.state / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [call for call in found if where is None or call["where"] == where]
        return [call for call in found if not programs or call["argv"][0] in programs]

    def trainings(self):
        return [call for call in self.calls("python") if call["argv"][1:3] == ["-m", "repo_jax"]]

    def wait_for_trainings(self, number):
        """They go on after the script that started them has returned."""
        deadline = time.monotonic() + 20
        while len(self.trainings()) < number and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.trainings()
