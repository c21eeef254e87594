"""The objectives: pure functions of log-probs, and one table that lists them.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import inspect
import math

import jax

from repo_jax.losses.types import Loss, LossOut, PairLogps

__all__ = ["LOSSES", "RANGES", "Loss", "LossOut", "PairLogps", "hyperparameters", "make_loss"]


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
