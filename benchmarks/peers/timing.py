"""What the peers' scripts share: their flags, the updates they train on, and the JSON line they end with. Needs the standard library alone."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import resource
import time


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("folder", type=pathlib.Path, help="what make_inputs.py wrote")
    made.add_argument("--steps", type=int, default=2, help="updates that are timed")
    made.add_argument("--warmup", type=int, default=1, help="updates before them: compilation, first allocations")
    made.add_argument("--per_device_train_batch_size", type=int, default=1, help="pairs of a micro-batch")
    return made


class Inputs:
    """The updates of a run: `steps + warmup` of them, every one of the same number of pairs."""

    def __init__(self, arguments: argparse.Namespace):
        about = json.loads((arguments.folder / "inputs.json").read_text())
        self.max_length, self.pairs_per_update = about["max_length"], about["pairs_per_update"]
        self.model = str(arguments.folder / "model")
        self.config = json.loads((arguments.folder / "model" / "config.json").read_text())
        self.warmup, self.total = arguments.warmup, arguments.warmup + arguments.steps
        if self.total > about["updates"]:
            raise SystemExit(f"warmup + steps is {self.total}, but the pairs make up {about['updates']} updates")
        self.micro = arguments.per_device_train_batch_size
        if self.pairs_per_update % self.micro:
            raise SystemExit(f"per_device_train_batch_size must divide the {self.pairs_per_update} pairs of an update")
        self.accumulation = self.pairs_per_update // self.micro
        with open(arguments.folder / "updates.jsonl", encoding="utf-8") as file:
            self.rows = [json.loads(line) for line, _ in zip(file, range(self.total * self.pairs_per_update))]  # noqa: B905

    def timed(self, rows: list) -> list:
        """What of one entry per pair belongs to the timed updates."""
        return rows[self.warmup * self.pairs_per_update :]


class Clock:
    """Seconds of each update, waiting included."""

    def __init__(self):
        self.seconds: list[float] = []

    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def report(inputs: Inputs, seconds: list[float], *, packages: tuple[str, ...], tokens: int, **more) -> None:
    """Prints the JSON line; `seconds` of all updates, `tokens` of the timed ones' sequences without padding."""
    timed = seconds[inputs.warmup :]
    line = {
        "pairs_per_second": inputs.pairs_per_update * len(timed) / sum(timed),
        "step_seconds": timed,
        "warmup_seconds": seconds[: inputs.warmup],
        "pairs_per_update": inputs.pairs_per_update,
        "per_device_train_batch_size": inputs.micro,
        "tokens": tokens,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in packages},
    }
    print(json.dumps(line | more), flush=True)
