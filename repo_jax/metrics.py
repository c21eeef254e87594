"""What is logged, under TRL's names, so that our curves lie over TRL's.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import math

import jax
import jax.numpy as jnp

from repo_jax.losses import PairLogps


def preference_metrics(pairs: PairLogps, slopes: PairLogps, hparams: dict) -> dict[str, jax.Array]:
    """Means over the answers that are there; nan where none is.

    Rewards are beta times the log-ratio to the reference model, as TRL's DPO has them, or without one beta times the mean log-prob per
    token; where the objective has no beta, reward_scale, or 1. A pair is ranked right if its margin is above 0; an answer by itself, if the
    sign of its reward is its label's, which a mean log-prob cannot be: such rows are not ranked. `slopes` is d loss / d pairs: an answer is
    active if that of its log-prob or of a term is not 0, a scored token if its answer is.
    """
    there_B2, mean_B2, scale = pairs.there_B2, pairs.mean_B2, hparams.get("beta", hparams.get("reward_scale", 1.0))
    rewards_B2 = mean_B2 if pairs.reference_B2 is None else pairs.ratios_B2
    by_side_B2 = jnp.where(there_B2, rewards_B2, 0) * jnp.array([[1.0, -1.0]])
    active_B2 = slopes.logps_B2 != 0
    for slopes_B2 in slopes.terms.values():
        active_B2 |= slopes_B2 != 0

    def mean(x_B, there_B):
        return jnp.sum(x_B, where=there_B) / jnp.sum(there_B)

    def by_side(x_B2):
        return [mean(x_B2[:, side], there_B2[:, side]) for side in (0, 1)]

    (chosen, rejected), (logps_chosen, logps_rejected) = by_side(rewards_B2), by_side(mean_B2)
    there_B, both_B = there_B2.any(axis=1), there_B2.all(axis=1)
    ranked_B = both_B if pairs.reference_B2 is None else there_B
    # Of pairs the mean of differences, which cancels less than the difference of means.
    margins = jnp.where(both_B.any(), mean(rewards_B2[:, 0] - rewards_B2[:, 1], both_B), chosen - rejected)
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * margins,
        "rewards/accuracies": mean((by_side_B2.sum(axis=1) > 0).astype(jnp.float32), ranked_B),
        "logps/chosen": logps_chosen,
        "logps/rejected": logps_rejected,
        "active_fraction": mean(active_B2.any(axis=1).astype(jnp.float32), there_B),
        "active_token_fraction": jnp.sum(pairs.lengths_B2, where=active_B2) / jnp.sum(pairs.lengths_B2),
    }


def as_numbers(metrics: dict) -> dict[str, float]:
    """Metrics as they are logged, waited for; the mean reward or log-prob of a side that no row has is left out."""
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    gone = [name for name, value in numbers.items() if name.startswith(("rewards/", "logps/")) and math.isnan(value)]
    return numbers if math.isnan(numbers.get("loss", 0.0)) else {k: v for k, v in numbers.items() if k not in gone}
