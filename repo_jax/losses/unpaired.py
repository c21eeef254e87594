"""Objectives of single answers, each good (as a chosen answer) or bad (as a rejected one): one value per answer.

a and b are the log-ratios of good and bad answers, summed over tokens. Their mean is over all answers that are there, good and bad together.

Axis letters: B pairs, of which one answer may be all there is; 2 is (chosen, rejected).
"""

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.losses.parts import logistic, mean_of
from repo_jax.losses.types import LossOut, PairLogps


def _by_side(good_B, bad_B) -> jax.Array:
    return jnp.stack([good_B, bad_B], axis=1)


def kto(
    pairs: PairLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossOut:
    """sigmoid(beta (z - a)) of good answers, sigmoid(beta (b - z)) of bad ones, z = max(0, mean log-ratio of mismatched rows). arXiv:2402.01306.

    The group "kl" has prompts with another prompt's answer; z has no gradient and is of the global batch, bounded after the mean.
    Weights should make (good * desirable_weight) / (bad * undesirable_weight) 1 to 4/3.
    """
    mismatched = pairs.groups["kl"]
    z = jnp.maximum(jax.lax.stop_gradient(mean_of(mismatched.ratios_B2, mismatched.there_B2)), 0.0)
    good_B, bad_B = beta * (pairs.ratios_B2 - z).T
    values_B2 = _by_side(desirable_weight * jax.nn.sigmoid(-good_B), undesirable_weight * jax.nn.sigmoid(bad_B))
    return LossOut(values_B2, metrics={"kl": z})


def apo_zero_unpaired(
    pairs: PairLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> jax.Array:
    """sigmoid(-beta a) of good answers, sigmoid(beta b) of bad ones: kto without z. arXiv:2408.06266."""
    good_B, bad_B = beta * pairs.ratios_B2.T
    return _by_side(desirable_weight * jax.nn.sigmoid(-good_B), undesirable_weight * jax.nn.sigmoid(bad_B))


def reward_shift() -> dict:
    return {"mean": np.float32(0), "count": np.float32(0)}


def bco(pairs: PairLogps, state: dict, *, beta: float = 0.1, anchor: str = "running", training: bool = True) -> LossOut:
    """-log sigmoid(beta a - shift), -log sigmoid(shift - beta b): is an answer good or bad? arXiv:2404.04656.

    anchor says what the shift is; it has no gradient. running: the mean of all rewards beta a, beta b seen so far, this batch's included,
    in evaluation without it (TRL). balanced: likewise nine tenths of the old shift and a tenth of (mean beta a + mean beta b) / 2, from
    the first batch's on (own reading of the paper). batch: the mean of this batch. The paper's weights of bad answers, where prompts of good
    and bad ones differ, go into a column that weight_column names.
    """
    reward_B2, there_B2 = beta * pairs.ratios_B2, pairs.there_B2
    known_B2 = jax.lax.stop_gradient(reward_B2)
    batch_mean, count = mean_of(known_B2, there_B2), jnp.sum(there_B2)
    if anchor == "balanced":
        sides = 0.5 * sum(mean_of(known_B2[:, side], there_B2[:, side]) for side in (0, 1))
        shift = jnp.where(state["count"] > 0, 0.9 * state["mean"] + 0.1 * sides, sides)
    else:
        shift = state["mean"] + (batch_mean - state["mean"]) * count / jnp.maximum(state["count"] + count, 1)
    new = {"mean": shift, "count": state["count"] + count}
    shift = batch_mean if anchor == "batch" else shift if training else state["mean"]
    good_B, bad_B = (reward_B2 - shift).T
    return LossOut(_by_side(logistic(good_B), logistic(-bad_B)), new, {"reward_shift": shift})


def npo(pairs: PairLogps, *, beta: float = 0.1, retain_weight: float = 1.0) -> jax.Array:
    """-2 / beta log sigmoid(-beta b) of answers to forget, + retain_weight * NLL per token of answers to keep. arXiv:2404.05868.

    Answers to forget are the bad ones, answers to keep the good ones. Each side has its own mean.
    """
    there_B2 = pairs.there_B2
    count, forgotten = jnp.sum(there_B2), jnp.maximum(jnp.sum(there_B2[:, 1]), 1)
    tokens = jnp.maximum(jnp.sum(pairs.lengths_B2[:, 0]), 1)
    forget_B = 2 / beta * logistic(-beta * pairs.ratios_B2[:, 1]) * count / forgotten
    return _by_side(-retain_weight * pairs.sums_B2[:, 0] * count / tokens, forget_B)
