"""A long run of the tiny model: does the memory of host and device stay flat?

python benchmarks/soak.py [--updates 2000] [--modes direct two_pass] [--json FILE]

Samples this process's resident memory and the bytes of all of JAX's live arrays while the quickstart's recipe trains for so many updates, with
evaluations and checkpoints, in each form of the update by itself: two passes hold layer inputs for a while, so that the means of a run that
changes from one form to the other rise without a leak. Ends with 1 where the last quarter lies more than 2 % over the second: by the mean of resident
memory, and by the least of the live arrays, because what is alive for a part of an update is not growth, however often a sample meets it.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import threading

import jax

from repo_jax.config import load_recipe
from repo_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]
MIB = 2**20
GROWTH = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--modes", nargs="+", choices=["direct", "two_pass"], default=["direct", "two_pass"])
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    found = {"updates": arguments.updates, "jax": jax.__version__}
    for mode in arguments.modes:
        with tempfile.TemporaryDirectory() as folder:
            found[mode] = summary(soak(pathlib.Path(folder), arguments.updates, mode), arguments.updates)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(found[mode]["flat"] for mode in arguments.modes))


def soak(folder: pathlib.Path, updates: int, mode: str) -> list[tuple[int, float, float]]:
    """(update, resident MiB, MiB of live arrays), once a second or so."""
    given = {"optim.max_steps": updates, "optim.train_batch_size": 2, "data.rows_per_device": 1, "optim.mode": mode}
    given |= {"run.output_dir": str(folder / "run"), "data.cache_dir": str(folder / "cache")}
    given |= {"run.eval_steps": 250, "run.save_steps": 100, "run.logging_steps": 10}
    given |= {"model.model_name_or_path": str(ROOT / "assets" / "stories260K")}
    given |= {"data.dataset_name": str(ROOT / "assets" / "preferences")}
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", given)
    samples, stop = [], threading.Event()
    page = 4096 / MIB

    def watch():
        while not stop.wait(1.0):
            log = folder / "run" / "metrics.jsonl"
            lines = log.read_text().split("\n")[:-1] if log.exists() else []
            resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
            live = sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()) / MIB
            samples.append((json.loads(lines[-1])["step"] if lines else 0, resident, live))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    train(recipe)
    stop.set()
    watcher.join()
    return samples


def summary(samples: list[tuple[int, float, float]], updates: int) -> dict:
    """Of each quarter of the updates; the export at the end is in none of them."""
    quarters = [[one for one in samples if k * updates / 4 < one[0] <= (k + 1) * updates / 4 - 1] for k in range(4)]
    found = {
        what: [round(of(one[column] for one in quarter), 2) for quarter in quarters]
        for column, what, of in (
            (1, "resident MiB by quarter, mean", statistics.mean),
            (2, "live arrays MiB by quarter, least", min),
        )
    }
    growth = {what: round(numbers[3] / numbers[1] - 1, 4) for what, numbers in found.items()}
    return found | {"growth from the 2nd to the 4th": growth, "flat": all(one <= GROWTH for one in growth.values())}


if __name__ == "__main__":
    main()
