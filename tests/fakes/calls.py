"""What the fake programs share: each writes down how it was called and refuses what the real one refuses."""

import json
import os
import pathlib
import subprocess
import sys

STATE = pathlib.Path(os.environ["FAKE_STATE"])


def record(program, arguments, **more):
    """Adds a line to the calls: argv, where it was called, and what else the caller tells."""
    line = json.dumps({"argv": [program, *arguments], "where": os.environ.get("FAKE_WHERE", "here"), **more})
    with open(STATE / "calls", "a") as file:
        file.write(line + "\n")


def refuse(message):
    print(f"fake: {message}", file=sys.stderr)
    sys.exit(2)


def read(arguments, values, switches=(), *, stop_at_word=False):
    """Splits a command line into words and options as (name, value) pairs; refuses options that are in neither table.

    With stop_at_word, everything from the first word on is words: what sbatch and srun do with the command they start.
    """
    words, options, arguments = [], [], list(arguments)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if argument == "--":
            return words + arguments, options
        if not argument.startswith("-"):
            words.append(argument)
            if stop_at_word:
                return words + arguments, options
        elif name in values:
            if not equals and not arguments:
                refuse(f"{name} needs a value")
            options.append((name, value if equals else arguments.pop(0)))
        elif argument in switches:
            options.append((argument, ""))
        else:
            refuse(f"unrecognized argument: {argument}")
    return words, options


def next_outcome():
    """How the next training ends: a line of STATE/outcomes, which a test writes; 0 when there is none."""
    path = STATE / "outcomes"
    outcomes = path.read_text().split() if path.exists() else []
    path.write_text("\n".join(outcomes[1:]))
    return outcomes[0] if outcomes else "0"


def shell(command, *, home, where, **environment):
    """Runs a shell line as another machine would: its own home, and the programs that are there."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=home,
        env={**os.environ, "HOME": str(home), "FAKE_WHERE": where, **environment},
        stdin=subprocess.DEVNULL,
    ).returncode


def install(path, module, program):
    """Puts a fake program at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    script = pathlib.Path(__file__).with_name(f"{module}.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" {program} "$@"\n')
    path.chmod(0o755)
