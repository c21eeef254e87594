"""What the README tells people to type does what it says: ours for real, on a small model and few pairs; programs of others and of clouds are stand-ins."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
import yaml
from clouds import World
from examples import ASSETS, ROOT, STORIES
from readme import BLOCKS, EXAMPLE, PAGE

from repo_jax import cli
from repo_jax.run_folder import read_metrics

OURS, CLOUDS = "repo-jax", ("bash launch/tpu_vm.sh", "bash launch/gke.sh", "bash launch/slurm_gpu.sh", "sky")
# What would take a large model, or many updates.
SHORTER = {"--max_new_tokens 2048": "--max_new_tokens 8", "checkpoint-400": "checkpoint-2"}
SMALLER = {
    "train_batch_size: 128": "train_batch_size: 16\n      max_steps: 2",
    "runs/mine\n": "runs/mine\n      compile_cache_dir: null\n",
}


def kind(block: str) -> str:
    words = block.split()
    if words[0] in ("import", "from"):
        return "python"
    if any(line.startswith(("model:", "loss:", "data:")) for line in block.splitlines()):
        return "yaml"
    return "commands" if words[0] in PROGRAMS else "shown"


PROGRAMS = (OURS, "bash", "pip", "pytest", "sky", "vllm", "lm_eval", "jq", "alpaca_eval", "python")
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS if kind(block) == "commands" for line in block.splitlines()
]
PYTHON = [block for block in BLOCKS if kind(block) == "python" and block != EXAMPLE]  # which tests/test_api.py runs


def test_every_block_is_known_for_what_it_is():
    shown = [block.split("\n")[0] for block in BLOCKS if kind(block) == "shown"]
    assert [line[:17] for line in shown] == ["200 held-out pair", "HF folder ──► mod"]
    assert all(line.split()[0] in PROGRAMS for line in COMMANDS) and len(COMMANDS) >= 20 and len(PYTHON) == 1


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on the reader's laptop; the tests have eight."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: first)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder as the README's reader has it: the checkout's files, recipe.yaml, pairs, prompts, and the model under its name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in (
        "configs",
        "assets",
        "launch",
        "benchmarks",
        "requirements.txt",
        "requirements-test.txt",
        "pyproject.toml",
    ):
        (folder / name).symlink_to(ROOT / name)
    [recipe] = [block for block in BLOCKS if block.startswith("# recipe.yaml")]
    recipe = recipe.replace("    #", "  #")
    for given, smaller in SMALLER.items():
        assert given in recipe + "\n", given
        recipe = (recipe + "\n").replace(given, smaller.replace("      ", "  "))
    (folder / "recipe.yaml").write_text(recipe.replace("Qwen/Qwen2.5-0.5B-Instruct", str(small_model(folder))))
    rows = {}
    for split in ("train", "test"):
        lines = (ASSETS / "preferences" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[split] = sorted(lines, key=len)[:40]
        (folder / "pairs").mkdir(exist_ok=True)
        (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(rows[split]) + "\n", encoding="utf-8")
    shutil.copy(folder / "pairs" / "test.jsonl", folder / "held_out.jsonl")
    for name in ("prompts", "alpaca_eval"):
        (folder / f"{name}.jsonl").write_text('{"instruction": "Tell me a story."}\n{"instruction": "Why?"}\n')
    old = pathlib.Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(old)


def small_model(folder: pathlib.Path) -> pathlib.Path:
    """stories260K with a chat template of its own, as an instruction-tuned model has one."""
    model = folder / "model_of_the_reader"
    shutil.copytree(STORIES, model)
    given = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))["model"]
    (model / "chat_template.jinja").write_text(given["chat_template"], encoding="utf-8")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": given["eos_token"]}), encoding="utf-8")
    return model


@pytest.fixture(scope="module")
def stand_ins(world):
    """Programs of others, on PATH: they look at the files they are given and write down their line."""
    folder = world / "bin"
    folder.mkdir()
    script = f'''#!{sys.executable}
import json, os, pathlib, re, sys
program, *arguments = pathlib.Path(sys.argv[0]).name, *sys.argv[1:]
line = " ".join(arguments)
for model in re.findall(r"runs/[a-z]+/hf", line):
    names = os.listdir(model)
    assert {{"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}} <= set(names), names
if program == "jq":
    print(json.dumps([json.loads(row) for row in open(arguments[-1])]))
if program == "alpaca_eval":
    rows = json.load(open(arguments[-1]))
    assert rows and all({{"instruction", "output", "generator"}} <= set(row) for row in rows)
open("{folder}/calls", "a").write(f"{{program}} {{line}}\\n")
'''
    for program in ("pip", "pytest", "vllm", "lm_eval", "jq", "alpaca_eval"):
        (folder / program).write_text(script)
        (folder / program).chmod(0o755)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3" || echo "python $@" >> {folder}/calls\n')
    python.chmod(0o755)
    return folder


SLOW = {
    "repo-jax train configs/quickstart.yaml",
    "repo-jax bench recipe.yaml",
}  # as tests/test_quickstart.py is; test_benchmark.py


@pytest.mark.parametrize("line", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in COMMANDS])
def test_a_command_runs_as_it_is_written(line, world, stand_ins, monkeypatch, tmp_path, capsys):
    for given, shorter in SHORTER.items():
        line = line.replace(given, shorter)
    if line.startswith(CLOUDS):
        clouds = World(tmp_path / "clouds")
        (clouds.checkout / "recipe.yaml").touch()
        dry = line if line.startswith("sky") else line.replace(" -- ", " --dry-run -- ")
        done = clouds.run("bash", "-ec", dry, HF_TOKEN="hf_secret")
        assert done.returncode == 0 and (line.startswith("sky") or clouds.calls() == []), done.stderr
    elif line.startswith(OURS):
        monkeypatch.setenv("HOME", str(world))
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    else:
        environment = {
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(tmp_path),
            "devices": str(tmp_path),
        }
        done = subprocess.run(["bash", "-ec", line], env=environment, cwd=world, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for file in re.findall(r"[\w./-]+\.(?:py|sh|txt|yaml)\b", line):
            assert (ROOT / file).exists() or (world / file).exists(), file


def test_its_own_objective_trains(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    [block] = PYTHON
    exec(compile(block, "README.md", "exec"), {"__name__": "reader"})
    logged = read_metrics(world / "runs" / "my_loss" / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-5)  # the reference is the model itself
    assert "my_loss (beta 0.2, gamma 0.5)" in (world / "runs" / "my_loss" / "report.md").read_text()


def test_the_files_it_points_to_are_there():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", PAGE) + re.findall(
        r"`((?:benchmarks|tests|launch|configs|assets)/[\w./]+\.\w+)`", PAGE
    ):
        assert (ROOT / name).exists(), name
