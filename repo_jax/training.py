"""The story of a run, top to bottom: prepare, score, train, score again, export, report."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import yaml
from tqdm import tqdm

from repo_jax.checkpoint import Checkpoints
from repo_jax.config import Recipe, dump_recipe
from repo_jax.data.batches import batch_indices, steps_per_epoch
from repo_jax.data.schema import PairTokens
from repo_jax.evaluation import Evaluation, evaluate_pairs, summarize
from repo_jax.export import check_output, export_model, model_card, write_base
from repo_jax.models.hf import from_hf
from repo_jax.optimizer import learning_rate, make_optimizer
from repo_jax.preparation import Setup, set_up
from repo_jax.report import read_metrics, summary_text, write_report
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings
from repo_jax.step import Scorer, TrainStep

# What may change when a run goes on: where and how it computes, not what.
FREE = {
    "data": {"row_length", "scored_length", "rows_per_device", "cache_dir"},
    "optim": {"mode"},
    "model": {"remat"},
    "mesh": {"data", "fsdp", "tensor"},
    "run": {"output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit"},
}


def train(recipe: Recipe) -> pathlib.Path:
    """Trains by a recipe, evaluates, exports and reports; returns the run's folder, with the model in its hf/.

    Goes on from the folder's newest checkpoint. Raises ValueError or FileNotFoundError, before any device work, for what
    cannot be run.
    """
    return run(prepare(recipe))


def prepare(recipe: Recipe) -> Setup:
    """Looks at every value of the recipe and makes its output folder this run's."""
    setup = set_up(recipe, training=True)
    claim(setup)
    return setup


def run(setup: Setup) -> pathlib.Path:
    """The run itself, from its newest checkpoint if there is one, to its end."""
    recipe, folder = setup.recipe, pathlib.Path(setup.recipe.run.output_dir)
    say(describe(setup))
    optimizer = make_optimizer(recipe.optim, setup.total_steps)
    shapes = state_shapes(setup.cfg, optimizer)
    shardings = state_shardings(shapes, optimizer, setup.mesh)
    scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shape)
    step = TrainStep(scorer, setup.model, setup.loss, optimizer, shardings, mode=recipe.optim.mode)
    with Checkpoints(folder, keep=recipe.run.save_total_limit) as checkpoints:
        start = checkpoints.latest() or 0
        if start:
            say(
                f"going on from {folder}/checkpoint-{start}: {setup.total_steps - start} of {setup.total_steps} updates are left"
            )
            state = checkpoints.restore(start, shapes, shardings)
        else:
            params = from_hf(recipe.model.model_name_or_path, setup.cfg, shardings.params)
            state = initial_state(params, optimizer, shardings)
            if setup.held_out is not None:
                save_evaluation(folder, "before", evaluate_pairs(scorer, state.params, setup.held_out))
        state = run_updates(setup, state, step, scorer, checkpoints, Log(setup, folder / "metrics.jsonl", start), start)
    if setup.held_out is not None:
        save_evaluation(folder, "after", evaluate_pairs(scorer, state.params, setup.held_out))
    finish(setup, state, folder)
    return folder


def run_updates(
    setup: Setup, state: TrainState, step: TrainStep, scorer: Scorer, checkpoints: Checkpoints, log: "Log", start: int
) -> TrainState:
    """Updates start .. total_steps - 1, with the evaluations and checkpoints that fall due."""
    run, total, size = setup.recipe.run, setup.total_steps, setup.recipe.optim.train_batch_size
    if start < total:
        say("the first update compiles")
    for k in range(start, total):
        indices = batch_indices(k, pairs=len(setup.train), train_batch_size=size, seed=run.seed)
        pairs = [setup.train[i] for i in indices]
        log.before_update()
        state, metrics = step(state, pairs)
        log.update(k + 1, metrics, pairs)
        if setup.held_out is not None and run.eval_steps and (k + 1) % run.eval_steps == 0:
            log.evaluated(lambda params=state.params: evaluate_pairs(scorer, params, setup.held_out))
        if (k + 1) % run.save_steps == 0 or k + 1 == total:
            log.flush()  # what a checkpoint covers stands in the log before the checkpoint exists
            checkpoints.save(state, k + 1)
    log.close()
    return state


def finish(setup: Setup, state: TrainState, folder: pathlib.Path) -> None:
    """Exports, writes the report, and says what came of the run."""
    results = read_results(folder)
    margins = None
    if results is not None:
        margins = tuple(np.load(folder / f"margins_{when}.npy") for when in ("before", "after"))
    card = model_card(dump_recipe(setup.recipe), base=setup.recipe.model.model_name_or_path, results=results)
    difference = export_model(
        state.params, setup.cfg, setup.mesh, base=folder / "base", output=folder / "hf", card=card
    )
    report = write_report(
        folder,
        metrics=read_metrics(folder / "metrics.jsonl"),
        margins=margins,
        results=results,
        gamma=setup.hparams["gamma"],
        about=describe(setup).splitlines(),
    )
    if results is not None:
        say(f"\n{results['pairs']} held-out pairs\n{summary_text(results['before'], results['after'])}\n")
    say(f"model   {folder / 'hf'}  (reloaded; log-probs within {difference:.1g} of the trained model's)")
    say(f"report  {report}")


def describe(setup: Setup) -> str:
    """What a run is, in a few lines."""
    recipe = setup.recipe
    objective = ", ".join(f"{name} {value:g}" for name, value in setup.hparams.items())
    lines = [f"{recipe.loss.get('loss_type', 'repo')} ({objective}) on {recipe.model.model_name_or_path}"]
    for name, store in (("training", setup.train), ("held-out", setup.held_out)):
        if store is not None:
            dropped = "".join(
                f"; dropped {n} {why} ({', '.join(store.dropped_ids[why])}{', ...' if n > len(store.dropped_ids[why]) else ''})"
                for why, n in store.dropped.items()
            )
            lines.append(f"{name}: {len(store)} pairs{dropped}")
    R, T, S = setup.shape
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    lines.append(
        f"{setup.total_steps} updates of {recipe.optim.train_batch_size} pairs, {R} rows of {T} slots ({S} scored) at a time, on {mesh}"
    )
    return "\n".join(lines)


def claim(setup: Setup) -> None:
    """Makes the output folder this run's, or finds that it is: a folder holds one run.

    Raises ValueError naming what differs when the folder holds a run of another recipe or other data.
    """
    recipe, folder = setup.recipe, pathlib.Path(setup.recipe.run.output_dir)
    check_output(folder / "hf")
    identity = {
        "recipe": _fixed(recipe),
        "data": {"train": setup.train.key, "held_out": setup.held_out and setup.held_out.key},
    }
    claimed = folder / "recipe.yaml"
    if claimed.exists():
        before = yaml.safe_load((folder / "identity.yaml").read_text(encoding="utf-8"))
        changes = _differences(before, identity)
        if changes:
            raise ValueError(
                f"output_dir='{folder}' holds another run ({'; '.join(changes)}); name a new output_dir, or remove that folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_base(recipe.model.model_name_or_path, setup.tokenizer, folder / "base")
        write_whole(folder / "identity.yaml", yaml.safe_dump(identity, sort_keys=False, allow_unicode=True))
    write_whole(claimed, dump_recipe(recipe))


def _fixed(recipe: Recipe) -> dict:
    tree = yaml.safe_load(dump_recipe(recipe))
    return {
        section: {name: value for name, value in fields.items() if name not in FREE.get(section, ())}
        for section, fields in tree.items()
    }


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    found = []
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, name)
        elif old != new:
            found.append(f"{path}.{name} {old!r} there, {new!r} here")
    return sorted(found)


class Log:
    """metrics.jsonl, one JSON object per line and each step once, and the progress that people see.

    Stays one update behind, so that the device is never waited for while it has nothing else to do.
    """

    SHOWN = ("loss", "rewards/accuracies", "active_fraction", "pairs_per_second")

    def __init__(self, setup: Setup, path: pathlib.Path, start: int):
        self._every, self._total = setup.recipe.run.logging_steps, setup.total_steps
        self._rate = learning_rate(setup.recipe.optim, setup.total_steps)
        self._epoch_steps = steps_per_epoch(len(setup.train), setup.recipe.optim.train_batch_size)
        # Lines beyond the checkpoint belong to updates that will be done again.
        kept = [line for line in read_metrics(path) if line["step"] <= start]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run
        self._bar = tqdm(total=self._total, initial=start, desc="training", unit=" updates", disable=None)
        self._pending = None  # (step, metrics) of an update that may still run
        self._clock, self._pairs, self._tokens = time.perf_counter(), 0, 0  # since the last line

    def update(self, step: int, metrics: dict, pairs: list[PairTokens]) -> None:
        """Takes the metrics of an update just started; writes those of the one before."""
        self.flush()
        self._pending = (step, metrics)
        self._pairs += len(pairs)
        self._tokens += sum(pair.slots for pair in pairs)
        self._bar.update()

    def evaluated(self, evaluate: Callable[[], Evaluation]) -> None:
        """Adds an evaluation to the line of the pending update; its time is not counted as training."""
        step, metrics = self._pending
        jax.block_until_ready(metrics)
        started = time.perf_counter()
        metrics |= {f"eval_{name}": value for name, value in evaluate().metrics.items()}
        self._clock += time.perf_counter() - started
        self._pending = (step, metrics)

    def before_update(self) -> None:
        """On CPU, where running ahead gains nothing, the pending line is written now: its time is then its own."""
        if jax.default_backend() == "cpu":
            self.flush()

    def flush(self) -> None:
        """Waits for the pending update and writes its line if one is due."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        if step % self._every and step != self._total and "eval_loss" not in metrics:
            return
        line = {"step": step, "epoch": round(step / self._epoch_steps, 4), "learning_rate": float(self._rate(step - 1))}
        line |= {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        line["pairs_per_second"] = self._pairs / (now - self._clock)
        line["tokens_per_second"] = self._tokens / (now - self._clock)
        self._clock, self._pairs, self._tokens = now, 0, 0
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._bar.disable:
            say(f"update {step}/{self._total}  " + "  ".join(f"{name} {line[name]:.4g}" for name in self.SHOWN))
        else:
            self._bar.set_postfix({name: f"{line[name]:.3g}" for name in self.SHOWN})

    def close(self) -> None:
        self.flush()
        self._bar.close()
        self._file.close()


def save_evaluation(folder: pathlib.Path, when: str, evaluation: Evaluation) -> None:
    """Adds one side, before or after, to eval_results.json."""
    margins_B = evaluation.margins_B
    np.save(folder / f"margins_{when}.npy", margins_B)
    results = (read_results(folder) or {}) | {"pairs": len(margins_B)}
    results[when] = summarize(evaluation)
    write_whole(folder / "eval_results.json", json.dumps(results, indent=2) + "\n")


def read_results(folder: pathlib.Path) -> dict | None:
    path = folder / "eval_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_whole(path: pathlib.Path, text: str) -> None:
    """A file that is either the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def say(text: str) -> None:
    """A line for whoever watches, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
