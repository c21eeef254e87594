"""The story of a run, top to bottom: prepare, score, train, score again, export, report."""

import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import yaml
from tqdm import tqdm

from repo_jax.checkpoint import Checkpoints
from repo_jax.config import Recipe, dump_recipe
from repo_jax.data.batches import batch_indices, steps_per_epoch
from repo_jax.evaluation import Evaluation, evaluate_pairs, summarize
from repo_jax.export import check_output, export_model, model_card, write_base
from repo_jax.models.hf import from_hf
from repo_jax.optimizer import learning_rate, make_optimizer
from repo_jax.preparation import Setup
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


def train(setup: Setup) -> pathlib.Path:
    """Runs a recipe to its end, from its newest checkpoint if there is one; returns the run's folder."""
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
        state = run_updates(setup, state, step, scorer, checkpoints, Log(folder / "metrics.jsonl", start), start)
    if setup.held_out is not None:
        save_evaluation(folder, "after", evaluate_pairs(scorer, state.params, setup.held_out))
    finish(setup, state, folder)
    return folder


def run_updates(
    setup: Setup, state: TrainState, step: TrainStep, scorer: Scorer, checkpoints: Checkpoints, log: "Log", start: int
) -> TrainState:
    """Updates start .. total_steps - 1. The device is never waited for but to log the update before the one that runs."""
    recipe, total = setup.recipe, setup.total_steps
    options = {"pairs": len(setup.train), "train_batch_size": recipe.optim.train_batch_size, "seed": recipe.run.seed}
    epoch_steps = steps_per_epoch(options["pairs"], options["train_batch_size"])
    rate = learning_rate(recipe.optim, total)
    progress = tqdm(total=total, initial=start, desc="training", unit=" updates", disable=None)
    if start < total:
        say("the first update compiles")
    pending, clock, unlogged_tokens, unlogged_steps = None, time.perf_counter(), 0, 0

    def write_pending():
        nonlocal pending, clock, unlogged_tokens, unlogged_steps
        if pending is None:
            return
        done, metrics = pending
        metrics = jax.device_get(metrics)
        pending = None
        if done % recipe.run.logging_steps and done != total:
            return
        now = time.perf_counter()
        line = {"step": done, "epoch": round(done / epoch_steps, 4), "learning_rate": float(rate(done - 1))}
        line |= {name: float(value) for name, value in metrics.items()}
        line["pairs_per_second"] = unlogged_steps * options["train_batch_size"] / (now - clock)
        line["tokens_per_second"] = unlogged_tokens / (now - clock)
        clock, unlogged_tokens, unlogged_steps = now, 0, 0
        log.write(line)
        if progress.disable:
            say(f"update {done}/{total}  " + "  ".join(f"{name} {line[name]:.4g}" for name in SHOWN))
        else:
            progress.set_postfix({name: f"{line[name]:.3g}" for name in SHOWN})

    for k in range(start, total):
        pairs = [setup.train[i] for i in batch_indices(k, **options)]
        state, metrics = step(state, pairs)
        write_pending()
        tokens = metrics.pop("num_tokens")
        pending, unlogged_tokens, unlogged_steps = (k + 1, metrics), unlogged_tokens + tokens, unlogged_steps + 1
        progress.update()
        evaluates = setup.held_out is not None and recipe.run.eval_steps and (k + 1) % recipe.run.eval_steps == 0
        saves = (k + 1) % recipe.run.save_steps == 0 or k + 1 == total
        if evaluates or saves:
            write_pending()  # what a checkpoint covers stands in the log before the checkpoint exists
        if evaluates:
            metrics = evaluate_pairs(scorer, state.params, setup.held_out).metrics
            log.write({"step": k + 1} | {f"eval_{name}": value for name, value in metrics.items()})
        if saves:
            checkpoints.save(state, k + 1)
    progress.close()
    return state


SHOWN = ("loss", "rewards/accuracies", "active_fraction", "pairs_per_second")


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
    """metrics.jsonl: one JSON object per line, each step once, also after a resume."""

    def __init__(self, path: pathlib.Path, start: int):
        # Lines beyond the checkpoint belong to updates that will be done again.
        kept = [line for line in read_metrics(path) if line["step"] <= start]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run

    def write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


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
