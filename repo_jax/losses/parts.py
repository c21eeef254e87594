"""What objectives are built from: links, reward maps, and sums over the pairs that are there.

Axis letters: B pairs; 2 is (chosen, rejected); N whatever is counted.
"""

import jax
import jax.numpy as jnp

from repo_jax.losses.types import PairLogps

# exp of more has no float32.
LARGEST_EXPONENT = 80.0


def logistic(x) -> jax.Array:
    """-log sigmoid(x)."""
    return jax.nn.softplus(-x)


def smoothed(x, label_smoothing) -> jax.Array:
    """-log sigmoid(x) where the label is flipped with that chance."""
    return (1 - label_smoothing) * logistic(x) + label_smoothing * logistic(-x)


def hinge(x) -> jax.Array:
    return jax.nn.relu(1 - x)


def exp(x) -> jax.Array:
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


def log1mexp(x) -> jax.Array:
    """log(1 - e^x) for x < 0; 0 counts as -1e-6, at which both branches and their slopes are finite."""
    x = jnp.minimum(x, -1e-6)
    return jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def mean_of(x_N, there_N) -> jax.Array:
    """Over what is there; 0 where nothing is."""
    return jnp.sum(jnp.where(there_N, x_N, 0.0)) / jnp.maximum(jnp.sum(there_N), 1)


def std_of(x_N, there_N) -> jax.Array:
    """With ddof 1, as torch has it; 0 of fewer than two."""
    squares = jnp.sum(jnp.where(there_N, (x_N - mean_of(x_N, there_N)) ** 2, 0.0))
    return jnp.sqrt(squares / jnp.maximum(jnp.sum(there_N) - 1, 1))


def ranks(x_N, there_N) -> jax.Array:
    """The place of each in ascending order; what is not there comes last."""
    return jnp.argsort(jnp.argsort(jnp.where(there_N, x_N, jnp.inf)))


def chosen_nll(pairs: PairLogps, *, average: str, there_B=None) -> jax.Array:
    """Negative log-prob of the chosen answers, in nats per token.

    tokens: its mean over the pairs that are there is that over all their chosen tokens, so long answers weigh more (TRL, SimPO's and
    RePO's code). answers: of each answer by itself (LLaMA-Factory).
    """
    if average == "answers":
        return -pairs.mean_B2[:, 0]
    there_B = pairs.there_B if there_B is None else there_B
    tokens = jnp.sum(pairs.lengths_B2[:, 0], where=there_B)
    return -pairs.sums_B2[:, 0] * jnp.sum(there_B) / jnp.maximum(tokens, 1)
