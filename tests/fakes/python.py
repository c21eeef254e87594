"""python and uv: pip and uv bring the programs they are asked for; repo_jax ends as the test has said."""

import os
import pathlib
import sys

import calls

SEEN = ("HF_TOKEN", "LIBTPU_INIT_ARGS", "TPU_ACCELERATOR_TYPE")


def uv(arguments):
    command, *rest = arguments
    if command == "venv":
        words, options = calls.read(rest, {"--python", "-p"}, {"--quiet", "--allow-existing", "--clear", "--seed"})
        if dict(options).get("--python") != "3.12" or len(words) != 1:
            calls.refuse(f"uv venv was asked for {arguments}, not for a Python 3.12")
        calls.install(pathlib.Path(words[0], "bin", "python"), "python", "python")
    elif arguments[:2] == ["pip", "install"]:
        values = {"--python", "--editable", "-e", "--requirement", "-r"}
        _, options = calls.read(rest[1:], values, {"--quiet", "--upgrade"})
        options = dict(options)
        tree, _, extra = options["--editable"].partition("[")
        if not pathlib.Path(tree, "pyproject.toml").exists() or not os.access(options["--python"], os.X_OK):
            calls.refuse(f"uv pip install finds no project or no python: {arguments}")
        if extra not in ("tpu]", "cuda12]", "cuda13]"):
            calls.refuse(f"no such extra: [{extra}")
    else:
        calls.refuse(f"unrecognized subcommand: {command}")


def python(arguments):
    if arguments[:3] == ["-m", "pip", "install"]:
        words, options = calls.read(arguments[3:], {"--requirement"}, {"--quiet", "--user"})
        if words == ["uv"] and ("--user", "") in options:
            calls.install(pathlib.Path.home() / ".local" / "bin" / "uv", "python", "uv")
    elif arguments[:2] == ["-m", "repo_jax"]:
        print("training", flush=True)
        # A run has one end: the first process tells it, as the others would find out.
        first = os.environ.get("FAKE_WHERE", "here") in ("here", "node-0-worker-0", "task-0", "sky-0")
        outcome = calls.next_outcome() if first else "0"
        if outcome == "preempted":
            (calls.STATE / "preempted").touch()
            outcome = "143"
        sys.exit(int(outcome))
    else:
        calls.refuse(f"python was called with {arguments}")


program, *arguments = sys.argv[1:]
seen = {name: os.environ[name] for name in os.environ if name in SEEN or name.startswith("JAX_")}
calls.record(program, arguments, environment=seen, folder=os.getcwd())
{"uv": uv, "python": python, "python3": python}[program](arguments)
