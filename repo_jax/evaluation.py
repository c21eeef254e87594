"""Held-out pairs scored: metrics that are means over pairs, whatever the rows and batches."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from repo_jax.config import Recipe, recipe_of_model
from repo_jax.data.schema import PairTokens
from repo_jax.losses import Loss, PairLogps
from repo_jax.memory import explained, held_in_scoring, what_helps
from repo_jax.metrics import as_numbers
from repo_jax.preparation import Setup, keep_programs, set_up
from repo_jax.reference import live_reference, with_reference
from repo_jax.rewards import evaluate_rewards
from repo_jax.state import variables_of
from repo_jax.step import Scorer
from repo_jax.stores import let_go, with_rows

GROUP = 256  # pairs that are packed together


class Evaluation(NamedTuple):
    metrics: dict[str, float]  # preference_metrics over all pairs
    margins_B: np.ndarray  # mean-token margin of every pair that has both answers, in the order of the file
    pairs: int


def score_pairs(scorer: Scorer, variables: dict, pairs: Sequence[PairTokens]) -> PairLogps:
    """Log-probs of every pair, in order, on the host."""
    groups = []
    for start in tqdm(range(0, len(pairs), GROUP), desc="scoring", unit=f" x {GROUP} pairs", disable=None, leave=False):
        group = [pairs[i] for i in range(start, min(start + GROUP, len(pairs)))]
        groups.append(jax.device_get(scorer(variables, scorer.rows(group, B=GROUP))))
    # Only the last group has room left over.
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pairs)], *groups)


def evaluate_pairs(
    scorer: Scorer, variables: dict, pairs: Sequence[PairTokens], loss_state=None, progress: float = 0.0
) -> Evaluation:
    """Metrics over all pairs, as training logs them over a batch; the loss's state is that of the training so far, and stays."""
    scored = score_pairs(scorer, variables, pairs)
    metrics = scorer.weigh(scored, loss_state, np.float32(progress)).metrics
    both_B = np.asarray(scored.there_B2).all(axis=1)
    return Evaluation(as_numbers(metrics), np.asarray(scored.mean_margin_B)[both_B], len(both_B))


def evaluate(recipe_or_model: Recipe | str | os.PathLike, eval_dataset=None) -> dict[str, float | str]:
    """The metrics of a model on held-out pairs, with the loss they belong to, mean_margin (nats per token) and the number of pairs.

    What comes first is a recipe, the path of its YAML file, or a model (a folder such as a run's hf/, a URL, ORG/NAME), which is evaluated
    under RePO's defaults. `eval_dataset` is a list of dicts, a datasets.Dataset or a pandas.DataFrame, in place of the recipe's eval_dataset_name.
    A reward model has no loss: of it come its rewards, how many pairs they rank right, and the number of pairs. Raises ValueError, FileNotFoundError
    or TypeError, before any device work, for what cannot be evaluated.
    """
    recipe = with_rows(recipe_of_model(recipe_or_model), eval_dataset=eval_dataset)
    try:
        return evaluate_setup(set_up(recipe, training=False))
    finally:
        let_go(recipe)


class Scores(NamedTuple):
    """Log-probs of B pairs in the order of their rows; axis 1 is (chosen, rejected). A row with one answer has 0 for the other one."""

    ids: list[str]  # the rows' own, or "dataset:N" for the N-th row, from 1
    logps_B2: np.ndarray  # float32, in nats: summed over the scored tokens of each answer
    lengths_B2: np.ndarray  # int32: how many tokens those are; 0: the row has no such answer
    margins_B: np.ndarray  # float32, nats per token: the mean log-probs' difference, chosen - rejected; 0 without both
    dropped: dict[str, int]  # why rows are not here (over_long, identical, ...) -> how many

    def as_rows(self) -> list[dict]:
        """A dict for each row, as pandas.DataFrame takes them: id, logps_SIDE and tokens_SIDE of each answer that is there, and the margin
        where both are."""
        rows = []
        for i, name in enumerate(self.ids):
            row = {"id": name}
            for k, side in enumerate(("chosen", "rejected")):
                if self.lengths_B2[i, k]:
                    row |= {f"logps_{side}": float(self.logps_B2[i, k]), f"tokens_{side}": int(self.lengths_B2[i, k])}
            rows.append(row | ({"margin": float(self.margins_B[i])} if self.lengths_B2[i].all() else {}))
        return rows


def score(recipe_or_model: Recipe | str | os.PathLike, dataset) -> Scores:
    """The log-probs of every answer of `dataset` under a model, with counts of tokens and margins; no loss is needed or read.

    What comes first is a recipe, the path of its YAML file, or a model, as in evaluate; of a recipe its model and how it makes tokens count.
    `dataset` is a list of dicts, a datasets.Dataset or a pandas.DataFrame of pairs, or of rows with one answer. Rows that cannot be scored
    are left out and counted, as in training: the ids tell which are here. Raises ValueError, FileNotFoundError or TypeError, before any
    device work, for what cannot be scored.
    """
    recipe = recipe_of_model(recipe_or_model)
    data = dataclasses.replace(recipe.data, eval_dataset_name=None, dataset_test_split="test")
    model = dataclasses.replace(recipe.model, reference_model_name_or_path=None)
    recipe = with_rows(dataclasses.replace(recipe, data=data, model=model, loss={}), dataset=dataset)
    try:
        setup = set_up(recipe, training=False, loss=Loss(_nothing, layout="answers"), unweighed=True)
    finally:
        let_go(recipe)  # the store has them
    if setup.cfg.labels:
        raise ValueError(
            f"'{recipe.model.model_name_or_path}' is a reward model, which gives tokens no probability; use evaluate"
        )
    keep_programs(recipe.run.compile_cache_dir)
    place = setup.mesh, setup.recipe.model.param_dtype
    held = held_in_scoring(setup.pretrained.shapes(*place))
    with explained(setup.mesh, held, lambda: what_helps(setup.recipe, setup.mesh, held)):
        scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shapes)
        scored = score_pairs(scorer, variables_of(setup.pretrained.params(*place), None, None), setup.held_out)
    ids = [setup.held_out.plain(i).id for i in range(len(setup.held_out))]
    both_B = np.asarray(scored.there_B)
    return Scores(
        ids,
        np.asarray(scored.sums_B2, np.float32),
        np.asarray(scored.lengths_B2, np.int32),
        np.where(both_B, np.asarray(scored.mean_margin_B, np.float32), np.float32(0)),
        dict(setup.held_out.dropped),
    )


def _nothing(pairs: PairLogps) -> jax.Array:
    """No objective: what is only scored is not weighed."""
    return jnp.zeros_like(pairs.logps_B2)


def evaluate_setup(setup: Setup) -> dict[str, float | str]:
    """evaluate, for a recipe that has been looked at."""
    keep_programs(setup.recipe.run.compile_cache_dir)
    place = setup.mesh, setup.recipe.model.param_dtype
    held = held_in_scoring(setup.pretrained.shapes(*place), setup.live_shapes)
    with explained(setup.mesh, held, lambda: what_helps(setup.recipe, setup.mesh, held)):
        if setup.cfg.labels:
            return evaluate_rewards(setup)
        setup = with_reference(setup, say=_aside)
        variables = variables_of(setup.pretrained.params(*place), None, live_reference(setup, None))
        scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shapes)
        results = summarize(evaluate_pairs(scorer, variables, setup.held_out, progress=1.0))
    return setup.recipe.loss | results | {"pairs": len(setup.held_out)}


def _aside(text: str) -> None:
    print(text, file=sys.stderr)


def summarize(evaluation: Evaluation) -> dict[str, float]:
    """The metrics with the mean margin, which no beta scales; of unpaired rows the difference of the means."""
    metrics, margins_B, _ = evaluation
    sides = [metrics[name] for name in ("logps/chosen", "logps/rejected") if name in metrics]
    if len(margins_B):
        return metrics | {"mean_margin": float(margins_B.mean())}
    return metrics | ({"mean_margin": sides[0] - sides[1]} if len(sides) == 2 else {})
