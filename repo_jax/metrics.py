"""What is logged, under TRL's names, so that our curves lie over TRL's.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import jax
import jax.numpy as jnp

from repo_jax.losses import PairLogps


def preference_metrics(pairs: PairLogps, losses_B, slopes_B2, hparams: dict) -> dict[str, jax.Array]:
    """Means over the pairs that are there: their lengths are not 0.

    Rewards are beta times the mean log-prob per token where the objective has a beta, else that log-prob itself. slopes_B2 is
    d loss / d log-prob: a pair is active if either of its two is not 0, a scored token if its answer's is not.
    """
    there_B = pairs.lengths_B2[:, 0] > 0

    def mean(x_B):
        return jnp.mean(x_B, where=there_B)

    mean_B2, scale = pairs.mean_B2, hparams.get("beta", 1.0)
    return {
        "loss": mean(losses_B),
        "rewards/chosen": scale * mean(mean_B2[:, 0]),
        "rewards/rejected": scale * mean(mean_B2[:, 1]),
        "rewards/margins": scale * mean(pairs.mean_margin_B),
        "rewards/accuracies": mean((pairs.mean_margin_B > 0).astype(jnp.float32)),
        "logps/chosen": mean(mean_B2[:, 0]),
        "logps/rejected": mean(mean_B2[:, 1]),
        "active_fraction": mean((slopes_B2 != 0).any(axis=1).astype(jnp.float32)),
        "active_token_fraction": jnp.sum(pairs.lengths_B2, where=slopes_B2 != 0) / jnp.sum(pairs.lengths_B2),
    }
