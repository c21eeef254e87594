"""Held-out pairs scored: metrics that are means over pairs, whatever the rows and batches."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from repo_jax.config import Recipe
from repo_jax.data.rows import row_batches
from repo_jax.data.schema import PairTokens
from repo_jax.losses import PairLogps
from repo_jax.memory import explained, held_in_scoring, what_helps
from repo_jax.preparation import Setup, keep_programs, set_up
from repo_jax.rewards import evaluate_rewards
from repo_jax.step import Scorer

GROUP = 256  # pairs that are packed together


class Evaluation(NamedTuple):
    metrics: dict[str, float]  # preference_metrics over all pairs
    margins_B: np.ndarray  # mean-token margin of every pair, in the order of the file


def score_pairs(scorer: Scorer, variables: dict, pairs: Sequence[PairTokens]) -> PairLogps:
    """Log-probs of every pair, in order, on the host."""
    groups = []
    for start in tqdm(range(0, len(pairs), GROUP), desc="scoring", unit=f" x {GROUP} pairs", disable=None, leave=False):
        group = [pairs[i] for i in range(start, min(start + GROUP, len(pairs)))]
        scored = jax.device_get(scorer(variables, row_batches(group, scorer.shapes, B=GROUP)))
        groups.append(PairLogps(*(x_B2[: len(group)] for x_B2 in scored)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *groups)


def evaluate_pairs(scorer: Scorer, variables: dict, pairs: Sequence[PairTokens]) -> Evaluation:
    """Metrics over all pairs, as training logs them over a batch."""
    scored = score_pairs(scorer, variables, pairs)
    _, metrics = scorer.weigh(scored)
    return Evaluation({name: float(value) for name, value in metrics.items()}, np.asarray(scored.mean_margin_B))


def evaluate(recipe: Recipe) -> dict[str, float | str]:
    """The metrics of a model on its held-out pairs, with the loss they belong to, mean_margin and the number of pairs.

    A reward model has no loss: of it come its rewards, how many pairs they rank right, and the number of pairs. Raises ValueError or FileNotFoundError, before any device work, for what cannot be evaluated.
    """
    return evaluate_setup(set_up(recipe, training=False))


def evaluate_setup(setup: Setup) -> dict[str, float | str]:
    """evaluate, for a recipe that has been looked at."""
    keep_programs(setup.recipe.run.compile_cache_dir)
    place = setup.mesh, setup.recipe.model.param_dtype
    held = held_in_scoring(setup.pretrained.shapes(*place))
    with explained(setup.mesh, held, lambda: what_helps(setup.recipe, setup.mesh, held)):
        if setup.cfg.labels:
            return evaluate_rewards(setup)
        variables = {"params": setup.pretrained.params(*place)}
        scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shapes)
        results = summarize(evaluate_pairs(scorer, variables, setup.held_out))
    return setup.recipe.loss | results | {"pairs": len(setup.held_out)}


def summarize(evaluation: Evaluation) -> dict[str, float]:
    """The metrics with the mean margin, which no beta scales."""
    return evaluation.metrics | {"mean_margin": float(evaluation.margins_B.mean())}
