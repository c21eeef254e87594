"""The story of a run, top to bottom: prepare, score, train, score again, export, report."""

import pathlib

import numpy as np

from repo_jax.checkpoint import Checkpoints
from repo_jax.config import Recipe, dump_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.evaluation import evaluate_pairs
from repo_jax.export import export_model, model_card
from repo_jax.models.hf import from_hf
from repo_jax.optimizer import make_optimizer
from repo_jax.preparation import Setup, set_up
from repo_jax.progress import Log, describe, say
from repo_jax.report import summary_text, write_report
from repo_jax.run_folder import claim, read_metrics, read_results, save_evaluation
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings
from repo_jax.step import Scorer, TrainStep


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
    setup: Setup, state: TrainState, step: TrainStep, scorer: Scorer, checkpoints: Checkpoints, log: Log, start: int
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
        gamma=setup.hparams.get("gamma"),
        about=describe(setup).splitlines(),
    )
    if results is not None:
        say(f"\n{results['pairs']} held-out pairs\n{summary_text(results['before'], results['after'])}\n")
    say(f"model   {folder / 'hf'}  (reloaded; log-probs within {difference:.1g} of the trained model's)")
    say(f"report  {report}")
