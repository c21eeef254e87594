import json
import signal
import time

import jax
import numpy as np
import pytest
from examples import short_pairs
from processes import Run, free_port
from safetensors.numpy import load_file

from repo_jax import distributed
from repo_jax.config import InterruptedRunError, StoppedError
from repo_jax.distributed import differences, join

UPDATES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With 48 short pairs in data/, 16 of them held out."""
    folder = tmp_path_factory.mktemp("processes")
    short_pairs(folder)
    return folder


def start(folder, name: str, *arguments, output=None, **options) -> Run:
    """A short run on 4 devices in all; whatever the number of processes, the same pairs in the same rows."""
    recipe = {"max_steps": UPDATES, "train_batch_size": 4, "rows_per_device": 1, "save_steps": 1000, "seed": 7}
    recipe |= {"dataset_name": folder / "data", "row_length": 384, "learning_rate": 3e-4}
    recipe |= {"output_dir": output or folder / name, "cache_dir": folder / "cache"}
    flags = [part for flag, value in recipe.items() for part in (f"--{flag}", value)]
    return Run(folder / f"logs-{name}", "configs/quickstart.yaml", *flags, *arguments, **options)


def finished(run: Run) -> Run:
    with run:
        assert run.wait() == [0] * len(run.processes), run.text() + run.text(-1)
    return run


def losses(output) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output) -> dict:
    files = sorted((output / "hf").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(output, other, *, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(losses(output), losses(other), rtol=0, atol=tolerance * max(losses(other)))
    found, wanted = weights(output), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=tolerance * np.abs(tensor).max(), err_msg=name)


@pytest.fixture(scope="module")
def alone(folder):
    """What one process on 4 devices makes of it."""
    finished(start(folder, "alone", devices=4))
    return folder / "alone"


def test_two_processes_make_the_model_that_one_makes(folder, alone):
    run = finished(start(folder, "two", processes=2, devices=2))
    assert_same(folder / "two", alone)
    results = json.loads((folder / "two" / "eval_results.json").read_text())
    wanted = json.loads((alone / "eval_results.json").read_text())
    for when in ("before", "after"):
        np.testing.assert_allclose(list(results[when].values()), list(wanted[when].values()), rtol=1e-5, atol=1e-6)
    assert "update 3/" in run.text(0) and "update 3/" not in run.text(1)  # one of them speaks
    assert "of layer inputs" in run.text(0)  # two passes keep them, spread over both processes


@pytest.mark.slow
def test_four_processes_make_the_model_that_one_makes(folder, alone):
    finished(start(folder, "four", processes=4))
    assert_same(folder / "four", alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode, processes, left", [("two_pass", 2, 1), ("direct", 4, 2)])
def test_sigterm_to_one_of_several_saves_all_and_fewer_go_on_in_the_same_order(folder, alone, mode, processes, left):
    output = folder / f"stopped-{mode}"
    before = start(folder, f"{mode}-before", "--mode", mode, output=output, processes=processes, devices=4 // processes)
    with before:
        before.until("update 1/")
        before.processes[1].send_signal(signal.SIGTERM)
        assert before.wait() == [75] * processes, before.text() + before.text(1)
    [saved] = output.glob("checkpoint-*")
    done = int(saved.name.removeprefix("checkpoint-"))
    assert 1 < done < UPDATES
    assert f"checkpoint-{done} of {UPDATES} is saved, and the same command goes on from there" in before.text()
    after = finished(start(folder, f"{mode}-after", "--mode", mode, output=output, processes=left, devices=4 // left))
    assert f"going on from {output}/checkpoint-{done}" in after.text()
    assert_same(output, alone, tolerance=1e-5)


def test_a_killed_process_ends_the_others_at_once_with_a_reason(folder):
    run = start(folder, "killed", "--max_steps", "500", processes=2, devices=2)
    with run:
        run.until("update 2/")
        run.processes[1].kill()
        killed = time.monotonic()
        assert run.processes[0].wait(30) not in (0, 75)
        assert time.monotonic() - killed < 30
    assert "another process is lost or has failed" in run.text() or "another task died" in run.text()


def test_a_process_whose_companions_do_not_come_ends_with_a_reason(folder):
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    with start(folder, "lonely", REPO_JAX_START_TIMEOUT="3", **env) as run:
        assert run.wait(60) == [1]
    assert "not all processes of this run came within 3 s" in run.text()
    assert "start the same command on all hosts" in run.text()


def test_processes_that_run_different_recipes_stop_and_name_the_odd_one(folder):
    each = {0: [], 1: ["--learning_rate", "3e-5"]}.get
    with start(folder, "odd", processes=2, each=each) as run:
        assert run.wait() == [2, 2], run.text() + run.text(1)
    for i in range(2):
        assert "recipe.optim.learning_rate" in run.text(i) and "on all hosts" in run.text(i)
    assert not (folder / "odd").exists()


def test_the_odd_one_is_named_with_its_host_and_what_it_has():
    said = [{"host": f"h{i}", "runs": {"jax": "0.10.2", "code": "abc"}} for i in range(4)]
    assert differences(said) == []
    said[2] = {"host": "h2", "runs": {"jax": "0.10.1", "code": "abc"}}
    assert differences(said) == ["process 2 (h2) has jax 0.10.1, 3 of 4 have 0.10.2"]
    said = [{"host": f"h{i}", "runs": {"a": "1"} | ({"b": "2"} if i == odd else {})} for odd in (1,) for i in range(3)]
    assert differences(said) == ["process 1 (h1) has b 2, 2 of 3 have not there"]
    assert differences(said[::-1]) == ["process 1 (h1) has b 2, 2 of 3 have not there"]


@pytest.mark.parametrize(
    "error, code, words",
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), 1, "another process is lost"),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile"), 1, "Traceback"),
        (ZeroDivisionError("oh"), 1, "ZeroDivisionError: oh"),
        (StoppedError("out of memory"), 1, "process 1 of 2: out of memory"),
        (InterruptedRunError("told to stop"), 75, "told to stop"),
        (KeyboardInterrupt(), 130, "interrupted; the same command on all hosts"),
    ],
    ids=str,
)
def test_what_ends_one_of_several_processes_ends_it_at_once_in_words(monkeypatch, capsys, error, code, words):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    with distributed.together():
        raise error
    assert left == [code] and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS=unset JAX_NUM_PROCESSES=unset JAX_PROCESS_ID=0; set all three",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "from 0 to that less 1"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"},
            "the number of processes",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "a free port"),
    ],
)
def test_half_an_address_of_the_others_is_refused(monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        join()


@pytest.mark.parametrize(
    "given, found",
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"JAX_PLATFORMS": "", "TPU_WORKER_HOSTNAMES": "a,b"}, "TPU slice"),
        ({"JAX_PLATFORMS": "", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"JAX_PLATFORMS": "", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, "TPU slices"),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, ""),
        ({}, ""),
    ],
)
def test_several_processes_are_found_where_the_cluster_says_so(monkeypatch, given, found):
    for name in (
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_WORKER_HOSTNAMES",
        "MEGASCALE_COORDINATOR_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert distributed._found().startswith(found) and bool(distributed._found()) == bool(found)
