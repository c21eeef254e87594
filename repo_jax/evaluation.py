"""Held-out pairs scored: metrics that are means over pairs, whatever the rows and batches."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from repo_jax.config import Recipe
from repo_jax.data.schema import PairTokens
from repo_jax.losses import PairLogps
from repo_jax.memory import explained, held_in_scoring, what_helps
from repo_jax.metrics import as_numbers
from repo_jax.preparation import Setup, keep_programs, set_up
from repo_jax.reference import live_reference, with_reference
from repo_jax.rewards import evaluate_rewards
from repo_jax.state import variables_of
from repo_jax.step import Scorer

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


def evaluate(recipe: Recipe) -> dict[str, float | str]:
    """The metrics of a model on its held-out pairs, with the loss they belong to, mean_margin and the number of pairs.

    A reward model has no loss: of it come its rewards, how many pairs they rank right, and the number of pairs. Raises ValueError or FileNotFoundError, before any device work, for what cannot be evaluated.
    """
    return evaluate_setup(set_up(recipe, training=False))


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
