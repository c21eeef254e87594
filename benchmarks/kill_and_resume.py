"""Kills a short run at random moments, again and again, and sees that it ends bit for bit where one that is never killed does.

python benchmarks/kill_and_resume.py [--kills 100] [--seed 0] [--json FILE]

Runs of the quickstart's model (12 updates, a checkpoint after every second) are started, killed (SIGKILL) at a moment drawn evenly from the time
that an unbroken run takes, start-up and export included, and started again with the same command until they end; then the next begins, until so
many have been killed. Ends with 1 where a start fails, or where weights or metrics differ from those of the unbroken run.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]
# Of a line of metrics.jsonl, what is no result of the arithmetic.
TIMINGS = ("step_time", "_per_second", "memory_gib", "compil")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(pathlib.Path(folder), arguments.kills, arguments.seed, arguments.updates)
    found |= {"seed": arguments.seed, "updates": arguments.updates, "jax": jax.__version__}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(found["differ"]))


def start(folder: pathlib.Path, name: str, updates: int) -> subprocess.Popen:
    """One run as a user starts it; what it says goes to NAME.log."""
    flags = {"max_steps": updates, "train_batch_size": 4, "save_steps": 2, "seed": 3, "two_pass_below": 0.9}
    flags |= {"output_dir": folder / name, "cache_dir": folder / "cache", "rows_per_device": 1}
    flags |= {"eval_dataset_name": "assets/preferences/test.jsonl", "dataset_test_split": "test[:40]"}
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    with open(folder / f"{name}.log", "a") as log:
        command = [sys.executable, "-m", "repo_jax", "train", "configs/quickstart.yaml", *words]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def kill_and_resume(folder: pathlib.Path, kills: int, seed: int, updates: int) -> dict:
    """What came of it, for people and programs."""
    end(start(folder, "warm", updates), folder, "warm")  # compiles and tokenizes
    began = time.monotonic()
    end(start(folder, "unbroken", updates), folder, "unbroken")
    whole, rng = time.monotonic() - began, random.Random(seed)
    done, runs, starts, differ, left, reached = 0, 0, 0, [], set(), []
    with tqdm(total=kills, unit=" kills", disable=None) as bar:
        while done < kills:
            name = f"run-{runs}"
            while True:
                process, starts = start(folder, name, updates), starts + 1
                try:
                    process.wait(rng.uniform(0, whole) if done < kills else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    done += 1
                    reached.append(len(lines(folder / name)))
                    bar.update()
                    continue
                end(process, folder, name)
                break
            runs += 1
            if result(folder / name) != result(folder / "unbroken"):
                differ.append(name)
            left |= {path.name.split("-")[0] for path in (folder / name).iterdir() if path.name.startswith(".")}
    return {
        "kills": done,
        "runs": runs,
        "starts": starts,
        "seconds of an unbroken run": round(whole, 1),
        "updates logged when killed": {str(n): reached.count(n) for n in sorted(set(reached))},
        "leftovers in finished runs": sorted(left),
        "differ": differ,
    }


def end(process: subprocess.Popen, folder: pathlib.Path, name: str) -> None:
    if process.wait() != 0:
        sys.exit(f"a start of {name} ended with {process.returncode}:\n{(folder / f'{name}.log').read_text()[-4000:]}")


def lines(run: pathlib.Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def result(run: pathlib.Path) -> tuple:
    """The exported weights' bytes, every metric, and the evaluations."""
    metrics = [
        {name: value for name, value in line.items() if not any(part in name for part in TIMINGS)}
        for line in lines(run)
    ]
    weights = [path.read_bytes() for path in sorted((run / "hf").glob("*.safetensors"))]
    return weights, metrics, json.loads((run / "eval_results.json").read_text())


if __name__ == "__main__":
    main()
