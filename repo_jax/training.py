"""The story of a run, top to bottom: prepare, score, train, score again, export, report."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterator

import jax
import numpy as np

from repo_jax.checkpoint import Checkpoints
from repo_jax.config import Recipe, as_recipe, dump_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.data.rows import RowBatch
from repo_jax.data.schema import PairTokens
from repo_jax.distributed import Interruption, agree, from_primary, join, primary, stopping_at_once
from repo_jax.evaluation import evaluate_pairs, score_pairs
from repo_jax.export import card_of, export_adapter, export_merged, export_model, push_export
from repo_jax.losses import Loss
from repo_jax.memory import explained, held_in_training, kept_slots, what_helps
from repo_jax.models.lora import init_adapters
from repo_jax.optimizer import make_optimizer
from repo_jax.preparation import Setup, keep_programs, set_up
from repo_jax.progress import Compiled, Log, as_held_out, banner, compiled, say
from repo_jax.reference import live_reference, with_reference
from repo_jax.report import FAULTS, facts_of, summary_text, watched, write_report
from repo_jax.run_folder import (
    RunFolder,
    claim,
    found_gamma,
    read_results,
    save_evaluation,
    save_margins,
    what_runs,
    with_found_gamma,
    write_whole,
)
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings, variables_of
from repo_jax.step import Scorer, TrainStep
from repo_jax.stores import with_rows
from repo_jax.trackers import Trackers, check_trackers

GAMMA_SAMPLE = 1024  # pairs whose margins `gamma: auto` looks at


def train(
    recipe: Recipe | str | os.PathLike,
    train_dataset=None,
    eval_dataset=None,
    loss: Loss | Callable | None = None,
) -> pathlib.Path:
    """Trains by a recipe, or the path of its YAML file, evaluates, exports and reports; returns the run's folder, with the model in its
    hf/. Of a run whose output_dir is a URL that is the folder on this machine that is copied there.

    `train_dataset` and `eval_dataset` are rows in any schema that files may have, in place of the recipe's dataset_name and
    eval_dataset_name: a list of dicts, a datasets.Dataset (one split) or a pandas.DataFrame. The run's recipe.yaml then has their digest
    as a name, and the run goes on when it is called again with the same rows in the same form.

    `loss` is an objective of your own, a Loss or a function of PairLogps, instead of the recipe's loss_type; its keyword arguments are its
    hyperparameters.

    Goes on from the folder's newest checkpoint. Several processes call it together (distributed.join), with an output_dir that all
    of them see. Raises ValueError, FileNotFoundError or TypeError, before any device work, for what cannot be run, and InterruptedRunError
    when SIGTERM or Ctrl-C has ended it with its state saved.
    """
    join()  # before another trainer's recipe asks for the devices
    recipe = with_rows(as_recipe(recipe), train_dataset=train_dataset, eval_dataset=eval_dataset)
    return run(prepare(recipe, loss))


def prepare(recipe: Recipe, loss: Loss | Callable | None = None) -> Setup:
    """Looks at every value of the recipe and makes its output folder this run's."""
    check_trackers(recipe.run)
    setup = set_up(recipe, training=True, loss=loss)
    agree(what_runs(setup))
    claim(setup)
    return setup


def run(setup: Setup) -> pathlib.Path:
    """The run itself, from its newest checkpoint if there is one, to its end."""
    recipe, began = setup.recipe, compiled()
    keep_programs(recipe.run.compile_cache_dir)
    optimizer = make_optimizer(recipe.optim, setup.total_steps)
    shapes = state_shapes(setup.trained_shapes, optimizer, setup.loss)
    shardings = state_shardings(shapes, optimizer, setup.mesh)
    held = held_in_training(shapes, shardings, setup.frozen_shapes, setup.live_shapes)
    slots, kept = kept_slots(setup, held)
    say(banner(setup, held, kept))
    with explained(setup.mesh, held, lambda: what_helps(recipe, setup.mesh, held | kept)), Trackers() as trackers:
        return _run(setup, optimizer, shapes, shardings, began, trackers, keeps=slots)


def _run(
    setup: Setup,
    optimizer,
    shapes: TrainState,
    shardings: TrainState,
    began: Compiled,
    trackers: Trackers,
    *,
    keeps: int,
) -> pathlib.Path:
    recipe, place = setup.recipe, RunFolder(setup.recipe)
    folder = place.here
    frozen = setup.pretrained.params(setup.mesh, recipe.model.param_dtype) if recipe.model.use_peft else None
    scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shapes)
    with place.checkpoints(keep=recipe.run.save_total_limit) as checkpoints:
        start = int(from_primary(np.int32(checkpoints.latest() or 0)))  # what a host sees of a shared folder may be old
        if start:
            say(
                f"going on from {place}/checkpoint-{start}: {setup.total_steps - start} of {setup.total_steps} updates are left"
            )
            setup = with_reference(setup, frozen if setup.reference is None else None, say=say)
            if setup.gamma_quantile is not None:
                setup = with_gamma(setup, float(from_primary(np.float64(found_gamma(folder)))))
            state = checkpoints.restore(start, shapes, shardings)
        else:
            if setup.reference is not None:  # it goes before the model comes
                setup = with_reference(setup, say=say)
            if frozen is None:
                params = setup.pretrained.params(setup.mesh, recipe.model.param_dtype)
            if setup.reference is None:
                setup = with_reference(setup, params if frozen is None else frozen, say=say)
            if frozen is not None:
                params = init_adapters(jax.random.key(recipe.run.seed), shapes.params, shardings.params)
            state = initial_state(params, optimizer, shardings, setup.loss)
            if setup.gamma_quantile is not None:
                setup = with_gamma(setup, first_gamma(setup, scorer, variables_of(state.params, frozen)))
                if primary():
                    write_whole(folder / "recipe.yaml", dump_recipe(setup.recipe))
                place.keep()
        scorer = scorer.of(setup.loss, setup.hparams)
        live = live_reference(setup, frozen)
        trackers.start(setup, place, start)
        if not start:
            found = look(setup, folder, "before", scorer, variables_of(state.params, frozen, live))
            trackers.log({"step": 0} | as_held_out(found))
            place.keep()
        step = TrainStep(
            *(scorer, setup.model, setup.loss, optimizer, shardings),
            mode=recipe.optim.mode,
            two_pass_below=recipe.optim.two_pass_below,
            frozen=frozen,
            live=live,
            seed=recipe.run.seed,
            total_steps=setup.total_steps,
            keeps=keeps,
        )
        log = Log(setup, folder / "metrics.jsonl", start, began=began, report=trackers.log)
        state = run_updates(setup, state, step, scorer, checkpoints, log, start, frozen, live, place)
        params, loss_state = state.params, state.loss_state
    with (
        stopping_at_once()
    ):  # several processes too: JAX's service would only note SIGTERM for an update that never comes
        found = look(setup, folder, "after", scorer, variables_of(params, frozen, live), loss_state, 1.0)
        trackers.log({"step": setup.total_steps} | as_held_out(found), last=True)
        place.keep()
        finish(setup, params, frozen, place)
    return folder


def look(setup: Setup, folder: pathlib.Path, when: str, scorer: Scorer, variables: dict, *state) -> dict[str, float]:
    """Scores what is held out before or after training and returns its metrics; where nothing is held out, a few training pairs, for
    the report's margins alone."""
    if setup.held_out is not None:
        evaluation = evaluate_pairs(scorer, variables, setup.held_out, *state)
        save_evaluation(folder, when, evaluation)
        return evaluation.metrics
    _, store, which = watched(setup)
    if len(which):
        scored = score_pairs(scorer, variables, [store[int(i)] for i in which])
        save_margins(folder, when, np.asarray(scored.mean_margin_B))
    return {}


def first_gamma(setup: Setup, scorer: Scorer, variables: dict) -> float:
    """The quantile of the margins that training begins with, over a sample of the pairs; the same whenever it is asked for."""
    order = np.random.default_rng(setup.recipe.run.seed).permutation(len(setup.train))[:GAMMA_SAMPLE]
    margins_B = np.asarray(score_pairs(scorer, variables, [setup.train[int(i)] for i in order]).mean_margin_B)
    gamma = float(from_primary(np.quantile(np.float64(margins_B), setup.gamma_quantile)))
    say(f"gamma is {gamma:.4g}, which {setup.gamma_quantile:.0%} of {len(order)} training pairs have not reached yet")
    return gamma


def with_gamma(setup: Setup, gamma: float) -> Setup:
    return setup._replace(recipe=with_found_gamma(setup.recipe, gamma), hparams=setup.hparams | {"gamma": gamma})


def batches_ahead(setup: Setup, step: TrainStep, start: int) -> Iterator[tuple[int, list[PairTokens], list[RowBatch]]]:
    """The number, pairs and rows of updates start .. total_steps - 1; a thread reads and packs the next while one runs."""
    size, seed = setup.recipe.optim.train_batch_size, setup.recipe.run.seed

    def build(k: int):
        pairs = [setup.train[i] for i in batch_indices(k, pairs=len(setup.train), train_batch_size=size, seed=seed)]
        return k, pairs, step.rows(pairs)

    with concurrent.futures.ThreadPoolExecutor(1, "rows") as thread:
        coming = deque(thread.submit(build, k) for k in range(start, min(start + 2, setup.total_steps)))
        for k in range(start + 2, setup.total_steps + 2):
            if not coming:
                return
            done = coming.popleft().result()
            if k < setup.total_steps:
                coming.append(thread.submit(build, k))
            try:
                yield done
            except GeneratorExit:  # the run ends here: what nobody will take is not built
                thread.shutdown(wait=False, cancel_futures=True)
                raise


def run_updates(
    setup: Setup,
    state: TrainState,
    step: TrainStep,
    scorer: Scorer,
    checkpoints: Checkpoints,
    log: Log,
    start: int,
    frozen: dict | None,
    live: dict | None,
    place: RunFolder,
) -> TrainState:
    """Updates start .. total_steps - 1, with the evaluations and checkpoints that fall due."""
    run, total = setup.recipe.run, setup.total_steps
    from_, to = run.traced
    traced = range(max(from_, start + 1), min(to, total) + 1)
    if start < total:
        say("compiling: the first update takes longer")
    with Interruption() as interruption, contextlib.closing(batches_ahead(setup, step, start)) as coming:
        for k, pairs, rows in coming:
            log.before_update()
            if traced and k + 1 == traced[0]:
                jax.block_until_ready(state)  # what still runs is not of this update
                jax.profiler.start_trace(place.here / place.TRACES)
            state, metrics = step(state, pairs, rows)
            if traced and k + 1 == traced[-1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                say(f"updates {traced[0]}-{traced[-1]} are traced in {place.shown(place.TRACES)}; xprof shows them")
            log.update(k + 1, metrics, pairs)
            checkpoints.check()
            if setup.held_out is not None and run.eval_steps and (k + 1) % run.eval_steps == 0:
                now = variables_of(state.params, frozen, live), setup.held_out, state.loss_state, (k + 1) / total
                found = log.evaluated(lambda now=now: evaluate_pairs(scorer, *now))
                save_margins(place.here, k + 1, found.margins_B)
            stopping = interruption.due(k + 1)
            if (k + 1) % run.save_steps == 0 or k + 1 == total or stopping:
                log.flush()  # what a checkpoint covers stands in the log before the checkpoint exists
                place.keep()
                last = stopping or k + 1 == total
                if last or not log.skipping:  # else the run may have diverged, and an older checkpoint be worth more
                    checkpoints.save(state, k + 1, last=last)
            if stopping:
                log.close()
                raise interruption.error(f"{place}/checkpoint-{k + 1} of {total}")
    log.close()
    return state


def finish(setup: Setup, params: dict, frozen: dict | None, place: RunFolder) -> None:
    """Exports, writes the report, and says what came of the run."""
    place.keep_traces()
    folder, url_of = place.here, place.url_of
    results = read_results(folder) if primary() else None
    recipe, base = setup.recipe, folder / "base"
    card = card_of(recipe, base, results=results, adapter=False)
    options = {"base": base, "output": folder / "hf", "url": url_of("hf"), "card": card}
    if frozen is None:
        difference = export_model(params, setup.cfg, setup.mesh, **options)
    else:
        card = card_of(recipe, base, results=results, adapter=True)
        own = {"base": base, "output": folder / "adapter", "url": url_of("adapter"), "card": card}
        export_adapter(params, setup.cfg, model=recipe.model, **own)
        difference = export_merged(params, frozen, setup.pretrained, setup.mesh, model=recipe.model, **options)
    if primary():
        _tell(setup, place, results, difference, adapter=frozen is not None)


def _tell(setup: Setup, place: RunFolder, results: dict | None, difference: float, *, adapter: bool) -> None:
    try:
        report = write_report(place.here, facts_of(setup, place))
    except FAULTS as error:  # a picture must not cost the model its way to the Hub
        report, reason = None, (str(error).strip() or "no reason given").splitlines()[0]
        say(
            f"warning: the report fails ({type(error).__name__}: {reason}); the model is whole, and the same command tries again"
        )
    place.keep(last=True)
    if results is not None and {"before", "after"} <= results.keys():
        say(f"\n{results['pairs']} held-out pairs\n{summary_text(results['before'], results['after'])}\n")
    say(f"model   {place.shown('hf')}  (reloaded; log-probs within {difference:.1g} of the trained model's)")
    if adapter:
        say(f"adapter {place.shown('adapter')}  (for PEFT)")
    if report is not None:
        say(f"report  {place.shown(report.name)}  (and report.md)")
    if setup.push_to is not None:
        run = setup.recipe.run
        page = push_export(place.here / "hf", setup.push_to, private=run.hub_private_repo, revision=run.hub_revision)
        say(f"hub     {page}")
