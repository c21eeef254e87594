"""Whole runs of the real model on a few real pairs, through the command line."""

import fcntl
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from examples import ROOT, STORIES, short_pairs

from repo_jax import cli, run_folder, training
from repo_jax.cli import main
from repo_jax.config import load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.models.tensors import fingerprint
from repo_jax.run_folder import read_metrics
from repo_jax.training import batches_ahead, prepare

STEPS, SAVE = 12, 5
SECRETS = {"HF_TOKEN": "hf_MyOwnToken", "AWS_SECRET_ACCESS_KEY": "MyOwnKey"}
# What differs from one run to the next.
TIMINGS = {"step_time", "pairs_per_second", "tokens_per_second", "tokens_per_second_per_chip"}
TIMINGS |= {"peak_process_memory_gib", "compilations", "compile_seconds"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The quickstart on 48 short pairs, 16 of them held out."""
    folder = tmp_path_factory.mktemp("recipe")
    short_pairs(folder)
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["model"]["model_name_or_path"] = str(STORIES)
    tree["data"] |= {"dataset_name": str(folder / "data"), "row_length": 384, "cache_dir": str(folder / "cache")}
    tree["optim"] |= {"train_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-3, "two_pass_below": 0.9}
    tree["run"] |= {"save_steps": SAVE, "save_total_limit": 3}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def command(recipe, output, *flags, **streams):
    """A run as a user starts it: a process of its own, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # Programs are compiled once for all runs.
    environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"} | SECRETS
    arguments = [sys.executable, "-m", "repo_jax", "train", str(recipe), "--output_dir", str(output), *flags]
    streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, text=True, env=environment, **streams)


def finished(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def lines(run):
    return read_metrics(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    return run, finished(command(recipe, run))


def test_a_run_leaves_everything_that_was_promised(unbroken):
    run, output = unbroken
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "eval_results.json", "report.html", "report.md", "loss.png"} <= names
    assert {"margins.png", "active_fraction.png", "hf", "checkpoint-12", "checkpoint-10"} <= names
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "README.md"} <= {path.name for path in (run / "hf").iterdir()}  # fmt: skip
    results = json.loads((run / "eval_results.json").read_text())
    assert results["pairs"] == 16 and results["after"]["mean_margin"] != results["before"]["mean_margin"]
    for words, name in (
        ("held-out ranking accuracy", "rewards/accuracies"),
        ("mean margin", "mean_margin"),
        ("active fraction", "active_fraction"),
    ):
        numbers = re.search(rf"{words}.*?(-?\d\.\d+)\s+(-?\d\.\d+)", output)
        assert [float(n) for n in numbers.groups()] == [round(results[when][name], 3) for when in ("before", "after")]
    assert str(run / "hf") in output and str(run / "report.html") in output


def test_tokens_and_keys_stand_nowhere_in_what_a_run_writes_and_says(unbroken):
    run, said = unbroken
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_each_update_is_logged_once_under_trls_names(unbroken):
    logged = lines(unbroken[0])
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/margins",
            "rewards/accuracies", "logps/chosen", "logps/rejected", "active_fraction", "padding_fraction",
            "active_token_fraction", "two_pass", *TIMINGS} <= logged[0].keys()  # fmt: skip
    assert [line["learning_rate"] for line in logged[:2]] == [0, pytest.approx(5e-4)] and logged[3]["epoch"] == 1.0


def test_sigkill_and_a_new_start_end_bit_for_bit_where_an_unbroken_run_does(recipe, unbroken, tmp_path):
    run = tmp_path / "broken"
    process = command(recipe, run)
    deadline = time.monotonic() + 240
    while not ((run / "checkpoint-5").exists() and lines(run)[-1]["step"] >= 7):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(line["step"] for line in lines(run))
    output = finished(command(recipe, run))
    start = int(re.search(r"going on from .*checkpoint-(\d+)", output)[1])
    assert 0 < reached - start <= SAVE  # some updates were logged that no checkpoint covers
    ran_again = [int(step) for step in re.findall(r"update (\d+)/", output)]
    assert ran_again == list(range(start + 1, STEPS + 1))
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    ours, theirs = ((folder / "hf" / "model.safetensors").read_bytes() for folder in (run, unbroken[0]))
    assert ours == theirs
    # The report is of the whole run, what was before the kill included.
    told = [
        re.findall(r"(?:before|after \d+) .*beyond gamma", (f / "report.html").read_text()) for f in (run, unbroken[0])
    ]
    assert told[0] == told[1] and [words.split()[0] for words in told[0]] == ["before", "after"]
    for one, other in zip(lines(run), lines(unbroken[0]), strict=True):
        assert {k: v for k, v in one.items() if k not in TIMINGS} == {
            k: v for k, v in other.items() if k not in TIMINGS
        }


def test_a_run_with_fewer_and_fewer_active_pairs_goes_over_to_two_passes(unbroken):
    forms = [line["two_pass"] for line in lines(unbroken[0])]
    assert forms[:2] == [0, 0] and {*forms} == {0, 1}  # so that all tests here are of both


def test_what_a_run_computes_with_may_change_when_it_goes_on(unbroken, recipe, tmp_path):
    run = shutil.copytree(unbroken[0], tmp_path / "run")
    fields = {
        "data.row_length": 1024,
        "data.slots_per_device": 4096,
        "optim.two_pass_below": None,
        "optim.keep_layer_inputs": None,
        "optim.mode": "direct",
    }
    fields |= {"model.attn_implementation": "dense", "model.remat": "none", "run.profile_steps": "2-3"}
    fields |= {"run.compile_cache_dir": None, "run.output_dir": str(run)}
    assert prepare(load_recipe(recipe, fields)).recipe.optim.mode == "direct"


@pytest.mark.slow
def test_updates_are_traced_for_xprof_as_far_as_the_run_does_them(recipe, tmp_path):
    run, flags = tmp_path / "run", ["--max_steps", "3", "--save_steps", "2"]
    for profile_steps, said in (("2-3", "2-3"), ("1-9", "3-3")):  # the second run goes on after update 2
        output = finished(command(recipe, run, *flags, "--profile_steps", profile_steps))
        assert f"updates {said} are traced in {run / 'profile'}" in output
        assert [path.stat().st_size > 0 for path in (run / "profile").rglob("*.xplane.pb")] == [True]
        for name in ("checkpoint-3", "hf", "profile"):
            shutil.rmtree(run / name)
    assert "checkpoint-2: 1 of 3 updates are left" in output


# Rows built ahead


def ahead(start, *, total=7, rows=len):
    """What batches_ahead yields over made-up pairs."""
    sections = {"optim": types.SimpleNamespace(train_batch_size=3), "run": types.SimpleNamespace(seed=5)}
    setup = types.SimpleNamespace(recipe=types.SimpleNamespace(**sections), train=range(100, 110), total_steps=total)
    return batches_ahead(setup, types.SimpleNamespace(rows=rows), start)


def builders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


@pytest.mark.parametrize("start", range(9))
def test_batches_built_ahead_are_those_of_their_updates_from_any_start(start):
    built = []
    found = list(ahead(start, rows=lambda pairs: built.append(pairs) or ("rows", *pairs)))
    assert [k for k, _, _ in found] == list(range(start, 7))
    for k, pairs, rows in found:
        indices = batch_indices(k, pairs=10, train_batch_size=3, seed=5)
        assert pairs == [100 + i for i in indices] and rows == ("rows", *pairs)
    assert built == [pairs for _, pairs, _ in found] and not builders()


def test_a_batch_that_cannot_be_built_stops_the_run_at_its_update_with_its_message():
    def rows(pairs):
        built.append(pairs)
        if len(built) == 4:
            raise ValueError("pair 'x' takes 9 slots but row_length is 8")

    built, done = [], []
    with pytest.raises(ValueError, match="pair 'x' takes 9 slots but row_length is 8"):
        for k, _, _ in ahead(1, rows=rows):
            done.append(k)
    assert done == [1, 2, 3] and not builders()


def test_rows_are_built_on_a_thread_at_most_two_ahead_and_a_run_that_stops_ends_it():
    names = []
    coming = ahead(0, total=100, rows=lambda pairs: names.append(threading.current_thread().name))
    for used in (1, 2, 3):
        next(coming)
        time.sleep(0.2)
        assert used < len(names) <= used + 2
    assert all(name.startswith("rows") for name in names) and builders()
    coming.close()
    assert not builders() and len(names) <= 5


@pytest.mark.slow
def test_a_finished_run_started_again_trains_no_more_and_says_the_same(recipe, unbroken):
    run, output = unbroken
    weights = (run / "hf" / "model.safetensors").read_bytes()
    again = finished(command(recipe, run))
    assert f"checkpoint-{STEPS}: 0 of {STEPS} updates are left" in again and "update 1/" not in again
    assert again[again.index("16 held-out pairs") :] == output[output.index("16 held-out pairs") :]
    assert (run / "hf" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_reports_its_last_evaluation_when_it_goes_on(unbroken, recipe):
    pytest.importorskip("tensorboardX", reason="what writes event files")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (unbroken[0] / "report.html").unlink()  # the last that a run writes
    finished(command(recipe, unbroken[0], "--report_to", "tensorboard"))
    found = accumulator.EventAccumulator(str(unbroken[0]))
    found.Reload()
    after = json.loads((unbroken[0] / "eval_results.json").read_text())["after"]
    [(step, value)] = [(event.step, event.value) for event in found.Scalars("eval/loss")]
    assert step == STEPS and value == pytest.approx(after["loss"])


@pytest.mark.parametrize("results", [None, {"pairs": 7, "after": {"loss": 1.0}}])
def test_a_report_that_fails_costs_neither_the_rest_nor_the_push(tmp_path, monkeypatch, capsys, results):
    def fail(*_):
        raise IndexError("index -1 is out of bounds\nand much more")

    done, hub = [], types.SimpleNamespace(hub_private_repo=None, hub_revision=None)
    place = types.SimpleNamespace(here=tmp_path, shown=str, keep=lambda last: done.append("kept"))
    setup = types.SimpleNamespace(recipe=types.SimpleNamespace(run=hub), push_to="me/model")
    monkeypatch.setattr(training, "facts_of", fail)
    monkeypatch.setattr(training, "push_export", lambda *_, **__: done.append("pushed"))
    training._tell(setup, place, results, 0.0, adapter=False)
    said = capsys.readouterr().out
    assert done == ["kept", "pushed"] and "report  " not in said and "held-out" not in said
    assert (
        said.startswith("warning: the report fails (IndexError: index -1 is out of bounds); the model is whole")
        and "more" not in said
    )


def test_the_exported_folder_is_what_transformers_loads_and_scores_alike(unbroken, recipe, capsys):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' own model, which needs torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unbroken[0] / "hf"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data, cache = (yaml.safe_load(recipe.read_text())["data"][name] for name in ("dataset_name", "cache_dir"))
    rows = [json.loads(line) for line in pathlib.Path(data, "test.jsonl").read_text(encoding="utf-8").splitlines()]
    margins = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        means = []
        for side in ("chosen", "rejected"):
            ids, start = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False), len(prompt)
            assert ids[:start] == prompt
            with torch.no_grad():
                logps = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            means.append(logps[range(start - 1, len(ids) - 1), ids[start:]].mean().item())
        margins.append(means[0] - means[1])
    np.testing.assert_allclose(np.load(unbroken[0] / "margins_after.npy"), margins, atol=1e-4)
    assert main(["evaluate", "--model", str(folder), "--data", f"{data}/test.jsonl", "--cache_dir", cache]) == 0
    printed = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(printed["mean_margin"], np.mean(margins), atol=1e-4)


def test_export_writes_any_checkpoint_though_the_first_model_is_gone(unbroken, tmp_path, capsys):
    assert main(["export", "--checkpoint", str(unbroken[0] / "checkpoint-12"), "--output", str(tmp_path / "out")]) == 0
    ours = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    theirs = safetensors.numpy.load_file(unbroken[0] / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert "reloaded" in capsys.readouterr().out
    assert str(STORIES) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["true", "false"])
def test_two_pass_trains_to_the_same_weights(unbroken, recipe, tmp_path, keeps):
    flags = "--mode", "two_pass", "--two_pass_below", "null", "--keep_layer_inputs", keeps
    output = finished(command(recipe, tmp_path / "run", *flags))
    assert ("of layer inputs" in output) == (keeps == "true")
    before = safetensors.numpy.load_file(STORIES / "model.safetensors")
    ours, theirs = (
        safetensors.numpy.load_file(run / "hf" / "model.safetensors") for run in (tmp_path / "run", unbroken[0])
    )
    moved, apart = (
        sum(((a[name] - b[name]) ** 2).sum() for name in a) ** 0.5 for a, b in ((theirs, before), (ours, theirs))
    )
    assert apart <= 1e-3 * moved


def test_evaluations_on_the_way_stand_in_the_line_of_their_update(recipe, tmp_path):
    finished(command(recipe, tmp_path / "run", "--eval_steps", "2", "--max_steps", "4", "--logging_steps", "3"))
    logged = lines(tmp_path / "run")
    assert [(line["step"], "eval_loss" in line) for line in logged] == [(2, True), (3, False), (4, True)]
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert logged[-1]["eval_rewards/accuracies"] == results["after"]["rewards/accuracies"]


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_folder_holds_one_run(recipe, unbroken, capsys):
    error = refused(capsys, "train", recipe, "--output_dir", unbroken[0], "--learning_rate", "2e-3")
    assert (
        f"output_dir='{unbroken[0]}' holds another run (optim.learning_rate 0.001 there, 0.002 here); name a new output_dir"
        in error
    )


@pytest.mark.slow
def test_a_run_goes_on_where_everything_was_moved_but_not_over_another_model(recipe, adapted, tmp_path, capsys):
    data = pathlib.Path(yaml.safe_load(recipe.read_text())["data"]["dataset_name"])
    shutil.copytree(data, tmp_path / data.name)
    model = shutil.copytree(STORIES, tmp_path / STORIES.name)
    run = shutil.copytree(adapted[0], tmp_path / "run")
    given = ["--output_dir", run, "--model_name_or_path", model, "--dataset_name", tmp_path / data.name, *LORA]
    moved = load_recipe(recipe, cli.parse(["train", str(recipe), *map(str, given)])[2])
    prepare(moved)
    weights = load(model)
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.01)
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "holds another run (base.weights '" in refused(capsys, "train", recipe, *given)


def test_a_run_without_checkpoints_holds_no_folder(recipe, tmp_path):
    # What the answer to running out of memory advises must be possible in the same folder.
    first, second = (
        load_recipe(recipe, {"run.output_dir": str(tmp_path), "optim.optim": o}) for o in ("adamw", "lion")
    )
    prepare(first)
    prepare(second)
    assert yaml.safe_load((tmp_path / "identity.yaml").read_text())["recipe"]["optim"]["optim"] == "lion"


def test_what_a_run_without_checkpoints_measured_is_not_the_next_ones(recipe, tmp_path):
    tree = load_recipe(recipe, {"run.output_dir": str(tmp_path)})
    prepare(tree)
    (tmp_path / "eval_results.json").write_text('{"pairs": 16, "before": {"loss": 1.0}}')
    np.save(tmp_path / "margins_before.npy", np.zeros(16))
    prepare(tree)
    assert not [name for name in ("eval_results.json", "margins_before.npy") if (tmp_path / name).exists()]


@pytest.mark.parametrize("left", ["hf", "report.html"])
def test_a_finished_run_whose_checkpoints_are_gone_is_not_written_over(recipe, tmp_path, capsys, left):
    prepare(load_recipe(recipe, {"run.output_dir": str(tmp_path)}))
    (tmp_path / left).mkdir() if left == "hf" else (tmp_path / left).touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "holds a finished run without its checkpoints, over which nothing is written; name a new output_dir" in (
        refused(capsys, "train", recipe, "--output_dir", tmp_path)
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_adapter_over_the_first_weights_is_part_of_a_run(tmp_path):
    def name(adapter):
        files = types.SimpleNamespace(weights=STORIES, adapter=adapter)
        return run_folder._weights(types.SimpleNamespace(files=files))

    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    first = name(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert len({str(one) for one in (name(None), first, name(tmp_path))}) == 3
    assert name(None) == {"weights": fingerprint(STORIES)}


def test_checkpoints_of_another_program_are_not_gone_on_from(recipe, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-500").mkdir(parents=True)
    assert "holds files that are not from a run of repo-jax; name a new output_dir" in refused(
        capsys, "train", recipe, "--output_dir", tmp_path / "run"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-500"]


def test_a_run_that_diverges_stops_and_leaves_no_checkpoint_of_it(recipe, tmp_path):
    process = command(recipe, tmp_path / "run", "--learning_rate", "1e25", "--save_steps", "1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in output
    stopped = int(re.search(r"repo-jax: 3 updates in a row, the last of them (\d+), .* lower learning_rate", output)[1])
    assert [line["step"] for line in lines(tmp_path / "run") if "skipped" in line] == [
        stopped - 2,
        stopped - 1,
        stopped,
    ]
    kept = [int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert max(kept) < stopped - 2 and not (tmp_path / "run" / "hf").exists()


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_stop_saves_says_how_to_go_on_and_does_so(recipe, unbroken, tmp_path, number, status):
    run = tmp_path / "run"
    process = command(recipe, run)
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").exists() and lines(run)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in output
    stopped = int(re.search(r"checkpoint-(\d+) of 12 is saved, and the same command goes on from there", output)[1])
    assert 0 < stopped < STEPS and (run / f"checkpoint-{stopped}").is_dir()
    if number == signal.SIGTERM:
        assert f"going on from {run}/checkpoint-{stopped}" in finished(command(recipe, run))
        ours, theirs = ((folder / "hf" / "model.safetensors").read_bytes() for folder in (run, unbroken[0]))
        assert ours == theirs


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_and_ctrl_c_saves_and_says_how_to_go_on(recipe, tmp_path):
    run, (ours, theirs) = tmp_path / "run", pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    # A session with that terminal as its own, so that its ^C reaches the run.
    own = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    process = command(recipe, run, **own | dict.fromkeys(("stdin", "stdout", "stderr"), theirs))
    os.close(theirs)
    seen = b""
    while chunk := read_terminal(ours):
        seen += chunk
        if b"pairs/s=" in seen and b"once more stops" not in seen:
            os.write(ours, b"\x03")
    text = seen.decode()
    assert process.wait() == 130 and "Traceback" not in text
    assert re.search(r"training .*\d+/12 \[.*<.*, loss=.*, margin=.*, accuracy=.*, active=.*, pairs/s=.*\]", text)
    assert text.startswith("\x1b[1mrepo_jax ") and "\x1b[31mrepo-jax:\x1b[0m interrupted; " in text
    stopped = int(re.search(r"checkpoint-(\d+) of 12 is saved, and the same command goes on from there", text)[1])
    assert 0 < stopped < STEPS and (run / f"checkpoint-{stopped}").is_dir()


def read_terminal(number) -> bytes:
    try:
        return os.read(number, 4096)
    except OSError:  # the other side is closed
        return b""


def test_sigterm_before_the_first_update_wants_the_same_command_again_too(recipe, tmp_path):
    run = tmp_path / "run"
    process = command(recipe, run)
    while not (run / "recipe.yaml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "Traceback" not in output
    assert "repo-jax: told to stop (SIGTERM); the same command goes on" in output
    assert "update 1/" not in output and not list(run.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_single_file_trains_without_held_out_pairs(recipe, tmp_path):
    file = pathlib.Path(yaml.safe_load(recipe.read_text())["data"]["dataset_name"], "train.jsonl")
    output = finished(command(recipe, tmp_path / "run", "--dataset_name", str(file), "--max_steps", "1"))
    assert "held-out" not in output and str(tmp_path / "run" / "hf") in output
    assert not (tmp_path / "run" / "eval_results.json").exists() and (tmp_path / "run" / "report.md").exists()


@pytest.mark.slow
def test_a_mixture_trains_on_its_shares_and_evaluates_on_its_test_splits(recipe, tmp_path):
    data = yaml.safe_load(recipe.read_text())["data"]["dataset_name"]
    mixture = json.dumps({data: 0.5, f"{data}/train.jsonl": 0.25})
    flags = ["--dataset_name", "null", "--dataset_mixer", mixture, "--temporal_decay", "0.9", "--max_steps", "1"]
    output = finished(command(recipe, tmp_path / "run", *flags))
    assert f"training: 24 pairs of {data}/train.jsonl + {data}/train.jsonl (explicit, messages)\n" in output
    assert f"held-out: 16 pairs of {data}/test.jsonl (explicit, messages)\n" in output
    assert lines(tmp_path / "run")[0]["loss"] > 0


def test_export_refuses_a_folder_that_is_no_model_and_a_checkpoint_that_is_none(unbroken, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    checkpoint = unbroken[0] / "checkpoint-12"
    assert "exists and is not an export of repo-jax; name a new folder" in refused(
        capsys, "export", "--checkpoint", checkpoint, "--output", tmp_path / "mine"
    )
    assert (tmp_path / "mine" / "letter.txt").exists()
    for other in (tmp_path, unbroken[0] / "hf", unbroken[0] / "base"):
        error = refused(capsys, "export", "--checkpoint", other, "--output", tmp_path / "out")
        assert "is not a checkpoint-N folder" in error


# Adapters


LORA = ["--use_peft", "true", "--lora_target_modules", "q_proj,down_proj", "--lora_r", "4", "--lora_alpha", "8"]
LORA += ["--learning_rate", "1e-2", "--max_steps", "4", "--save_steps", "2"]


@pytest.fixture(scope="module")
def adapted(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "adapted"
    return run, finished(command(recipe, run, *LORA))


def load(folder, name="model.safetensors"):
    return safetensors.numpy.load_file(folder / name)


def test_a_run_with_adapters_exports_them_and_the_model_they_amount_to(adapted):
    run, output = adapted
    assert "adapters: rank 4, alpha 8; 7,280 parameters are trained over 260,032" in output
    adapter = {
        k.removeprefix("base_model.model."): v for k, v in load(run / "adapter", "adapter_model.safetensors").items()
    }
    before, after = load(STORIES), load(run / "hf")
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "down_proj")):
            a, b = (adapter.pop(f"{module}.lora_{side}.weight").astype(np.float64) for side in "AB")
            assert np.abs(b).max() > 0
            np.testing.assert_allclose(after[name], weight + 8 / 4 * b @ a, atol=1e-6)
        else:
            assert after[name].tobytes() == weight.tobytes()
    assert not adapter


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_bit_for_bit(recipe, adapted, tmp_path):
    run = shutil.copytree(adapted[0], tmp_path / "run")
    for name in ("checkpoint-4", "hf", "adapter"):
        shutil.rmtree(run / name)
    output = finished(command(recipe, run, *LORA))
    assert "checkpoint-2: 2 of 4 updates are left" in output
    for name in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (adapted[0] / name).read_bytes()


def test_adapters_stay_over_the_weights_they_were_trained_over(recipe, adapted, tmp_path, capsys):
    model = shutil.copytree(STORIES, tmp_path / "model")
    weights = load(model)
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.01)
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = shutil.copytree(adapted[0], tmp_path / "run")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(STORIES), str(model)))
    error = refused(capsys, "export", "--checkpoint", run / "checkpoint-4", "--output", tmp_path / "out")
    assert f"the weights of '{model}' are not those that" in error and not (tmp_path / "out").exists()
    assert (
        main(["export", "--adapter", "--checkpoint", str(run / "checkpoint-4"), "--output", str(tmp_path / "out")]) == 0
    )


def test_an_adapter_folder_is_a_model_to_evaluate(recipe, adapted, capsys):
    data = yaml.safe_load(recipe.read_text())["data"]
    wanted = json.loads((adapted[0] / "eval_results.json").read_text())["after"]
    flags = ["--data", f"{data['dataset_name']}/test.jsonl", "--cache_dir", data["cache_dir"], "--gamma", "1"]
    assert main(["evaluate", "--model", str(adapted[0] / "adapter"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_export_writes_the_adapter_or_the_model_of_any_checkpoint(adapted, unbroken, tmp_path, capsys):
    run, checkpoint = adapted[0], str(adapted[0] / "checkpoint-4")
    assert main(["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "adapter"), "--adapter"]) == 0
    ours, theirs = (load(folder, "adapter_model.safetensors") for folder in (tmp_path / "adapter", run / "adapter"))
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    flags = ["--dtype", "bfloat16", "--max_shard_size", "300KB"]
    assert main(["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "hf"), *flags]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    shards = sorted(tmp_path.glob("hf/model-*.safetensors"))
    assert len(shards) == 2 and all(shard.stat().st_size < 305_000 for shard in shards)
    whole = load(run / "hf")
    for shard in shards:
        for name, tensor in safetensors.numpy.load_file(shard).items():
            assert tensor.tobytes() == whole[name].astype(ml_dtypes.bfloat16).tobytes()
    capsys.readouterr()
    error = refused(
        capsys, "export", "--adapter", "--checkpoint", unbroken[0] / "checkpoint-12", "--output", tmp_path / "x"
    )
    assert "is of a run without use_peft, which has no adapter; leave out --adapter" in error
    for given in (["--adapter", "--dtype", "float32"], ["--hub_revision", "x"]):
        assert "leave out --dtype" in (
            error := refused(capsys, "export", "--checkpoint", checkpoint, "--output", tmp_path / "y", *given)
        ) or ("given without --push_to_hub" in error)


@pytest.mark.slow
def test_parameters_in_bfloat16_train_too(recipe, tmp_path):
    flags = [
        "--param_dtype",
        "bfloat16",
        "--moment_dtype",
        "bfloat16",
        "--adam_beta2",
        "0.99",
        "--optim",
        "lion",
        "--learning_rate",
        "1e-4",
    ]
    finished(command(recipe, tmp_path / "run", *flags, "--max_steps", "4"))
    before, after = load(STORIES), load(tmp_path / "run" / "hf")
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in after.items()}
    assert all((rounded[name].astype(np.float32) == after[name]).all() for name in after)
    moved = np.concatenate([(after[name] - before[name].astype(ml_dtypes.bfloat16)).ravel() for name in after])
    assert np.abs(moved).max() > 0 and (moved != 0).mean() > 0.01
