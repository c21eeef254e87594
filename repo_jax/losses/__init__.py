"""The objectives: pure functions of log-probs, and one table that lists them.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class PairLogps(NamedTuple):
    """What a loss may look at: B pairs; axis 1 is (chosen, rejected)."""

    logps_B2: jax.Array  # summed over the scored tokens
    lengths_B2: jax.Array  # how many those are

    @property
    def mean_B2(self) -> jax.Array:
        """Log-prob per scored token."""
        return self.logps_B2 / jnp.maximum(self.lengths_B2, 1)  # a pair that is not there has length 0

    @property
    def mean_margin_B(self) -> jax.Array:
        """M: mean log-prob of the chosen answer minus that of the rejected one, in nats per token."""
        return self.mean_B2[:, 0] - self.mean_B2[:, 1]


def repo(pairs: PairLogps, *, gamma: float = 0.5) -> jax.Array:
    """max(0, gamma - margin): pairs already separated by gamma (nats per token) stop contributing. arXiv:2503.07426.

    jax.nn.relu has gradient 0 at margin == gamma, so the active pairs are exactly those with margin < gamma.
    """
    return jax.nn.relu(gamma - pairs.mean_margin_B)


def simpo(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 0.25, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta * (margin - gamma)), gamma in nats per token (SimPO's gamma_beta_ratio). arXiv:2405.14734.

    label_smoothing in [0, 0.5) is the chance that a label is flipped. Defaults are those of SimPO's own code.
    """
    logits_B = beta * (pairs.mean_margin_B - gamma)
    return (1 - label_smoothing) * jax.nn.softplus(-logits_B) + label_smoothing * jax.nn.softplus(logits_B)


class Loss(NamedTuple):
    """An objective and what it needs."""

    fn: Callable[..., jax.Array]  # (PairLogps, *, hyperparameters) -> one value per pair


LOSSES = {
    # loss_type     function
    "repo":    Loss(repo),
    "simpo":   Loss(simpo),
}  # fmt: skip

# The values a hyperparameter may have, as (lowest, below, in words).
RANGES = {
    "gamma": (-math.inf, math.inf, "a number, in nats per token"),
    "beta": (math.nextafter(0, 1), math.inf, "a number above 0"),
    "label_smoothing": (0.0, 0.5, "a number from 0 to below 0.5"),
}


def hyperparameters(loss: Loss) -> dict[str, float]:
    """The hyperparameters a loss takes, with their defaults."""
    return {p.name: p.default for p in inspect.signature(loss.fn).parameters.values() if p.kind is p.KEYWORD_ONLY}


DEFAULT_LOSS = "repo"


def make_loss(loss_type: str = DEFAULT_LOSS, **given: float) -> tuple[Loss, dict[str, float]]:
    """The loss of that name and its hyperparameters, defaults filled in.

    Names and ranges are checked now, so that a misspelt or unused hyperparameter fails before any device work.
    """
    if loss_type not in list(LOSSES):
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(sorted(LOSSES))}")
    loss = LOSSES[loss_type]
    accepted = hyperparameters(loss)
    for name, value in given.items():
        if name not in accepted:
            raise ValueError(f"loss '{loss_type}' has no hyperparameter '{name}'; it takes {', '.join(accepted)}")
        lowest, below, words = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < below:
            raise ValueError(f"loss '{loss_type}': {name}={value!r} must be {words}")
    return loss, accepted | {name: float(value) for name, value in given.items()}
