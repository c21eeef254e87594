"""The launch scripts, with a python that only writes down what it is asked."""

import os
import subprocess

import pytest
from examples import ROOT


@pytest.fixture
def launch(tmp_path):
    """Runs a launch script in a made-up active environment; returns what its python was called with, a line each."""
    python, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3" || echo "$@" >> {calls}\n')
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}

    def run(script, *arguments, **env):
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments],
            env=environment | {"devices": str(tmp_path / "dev")} | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()

    return run


def test_the_first_start_installs_and_the_next_does_not(launch):
    first, second = launch("local.sh"), launch("local.sh")
    assert first[0] == f"-m pip install --quiet --disable-pip-version-check -e {ROOT}"
    assert first[1:] == second == ["-m repo_jax train configs/quickstart.yaml"]


def test_tests_install_what_only_they_need_and_training_stays_installed(launch):
    launch("local.sh")
    assert launch("test.sh", "-k", "rows")[0].endswith(f"-r {ROOT}/requirements-test.txt -e {ROOT}")
    assert launch("test.sh", "-k", "rows")[-1] == "-m pytest -n 2 --dist loadfile -k rows"
    assert launch("local.sh") == ["-m repo_jax train configs/quickstart.yaml"]


def test_a_changed_list_is_installed_again(launch, tmp_path):
    launch("local.sh")
    stamp = tmp_path / ".repo_jax-stamp"
    stamp.write_text(stamp.read_text().replace("Python 3", "Python 2"))
    assert "pip install" in launch("local.sh")[0]
    assert len(stamp.read_text().splitlines()) == 1


def test_flags_and_a_recipe_reach_the_command(launch):
    assert launch("local.sh", "--gamma", "0.3")[-1] == "-m repo_jax train configs/quickstart.yaml --gamma 0.3"
    assert launch("local.sh", "mine.yaml", "--seed", "1")[-1] == "-m repo_jax train mine.yaml --seed 1"


@pytest.mark.parametrize(
    "device, driver, given, extra",
    [
        (None, None, {}, ""),
        ("accel0", None, {}, "[tpu]"),
        ("vfio/0", None, {}, "[tpu]"),
        ("nvidia0", "580.65.06", {}, "[cuda13]"),
        ("nvidia0", "535.104", {}, "[cuda12]"),
        ("nvidia0", None, {}, "[cuda12]"),
        ("nvidiactl", None, {}, ""),
        ("nvidia0", "580.65.06", {"ACCELERATOR": "cuda12"}, "[cuda12]"),
        ("accel0", None, {"ACCELERATOR": "none"}, ""),
    ],
)
def test_what_jax_needs_for_the_devices_is_installed(launch, tmp_path, device, driver, given, extra):
    if device is not None:
        (tmp_path / "dev" / device).parent.mkdir(parents=True)
        (tmp_path / "dev" / device).touch()
    if driver is not None:
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho {driver}\n")
        smi.chmod(0o755)
    assert launch("local.sh", **given)[0].endswith(f" -e {ROOT}{extra}")
    assert launch("local.sh", **given)[0].startswith("-m repo_jax train")  # and not again
    assert "pip install" in launch("local.sh", ACCELERATOR="cuda12" if extra == "[tpu]" else "tpu")[0]


VMEM = "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib="


@pytest.mark.parametrize(
    "device, given, said",
    [
        (None, {}, []),
        ("nvidia0", {}, ["XLA_CLIENT_MEM_FRACTION=0.92"]),
        ("nvidia0", {"XLA_CLIENT_MEM_FRACTION": "0.5"}, ["XLA_CLIENT_MEM_FRACTION=0.5"]),
        ("nvidia0", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.5"]),
        ("nvidiactl", {}, []),
        ("accel0", {}, [f"{VMEM}50000"]),
        ("vfio/0", {"TPU_ACCELERATOR_TYPE": "v6e-8"}, [f"{VMEM}98304"]),
        ("accel0", {"LIBTPU_INIT_ARGS": "--mine=1"}, ["LIBTPU_INIT_ARGS=--mine=1"]),
        ("accel0", {"LIBTPU_INIT_ARGS": ""}, []),
    ],
)
def test_flags_fit_the_devices_and_never_replace_what_is_set(tmp_path, device, given, said):
    if device is not None:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    script = 'set -euo pipefail; . "$0"; env | grep -E "^(XLA|LIBTPU)" >&2 || true'
    done = subprocess.run(
        ["bash", "-c", script, ROOT / "launch" / "flags.sh"],
        env={"PATH": os.environ["PATH"], "devices": str(tmp_path), **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"launch: {line}" for line in said]
    assert [line for line in done.stderr.splitlines() if not line.endswith("=")] == said  # and they are exported
