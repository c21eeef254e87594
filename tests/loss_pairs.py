"""Pairs for tests of losses: the same numbers for the package and for the oracle.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.losses import Pairs

from repo_jax.losses import LOSSES, Loss, PairLogps, make_loss


class Given(NamedTuple):
    """What a loss may look at, in float64."""

    logps: np.ndarray
    lengths: np.ndarray
    reference: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = MappingProxyType({})
    terms: Mapping[str, np.ndarray] = MappingProxyType({})
    groups: Mapping[str, "Given"] = MappingProxyType({})

    @property
    def for_oracle(self) -> Pairs:
        groups = {name: group.for_oracle for name, group in self.groups.items()}
        return Pairs(*self[:3], self.columns, self.terms, groups)

    def pairs(self, dtype=None) -> PairLogps:
        def put(x):
            return None if x is None else jnp.asarray(x, dtype or jnp.float32)

        groups = {name: group.pairs(dtype) for name, group in self.groups.items()}
        columns, terms = ({k: put(v) for k, v in of.items()} for of in (self.columns, self.terms))
        return PairLogps(put(self.logps), put(self.lengths), put(self.reference), columns, terms, groups)

    def with_absent(self, at: tuple[int, ...]) -> "Given":
        """With pairs that are not there before these; what stands for them is arbitrary."""
        logps, lengths = np.insert(self.logps, at, -1.5, axis=0), np.insert(self.lengths, at, 0.0, axis=0)
        reference = None if self.reference is None else np.insert(self.reference, at, -1.0, axis=0)
        columns, terms = (
            {k: np.insert(v, at, 0.3, axis=0) for k, v in of.items()} for of in (self.columns, self.terms)
        )
        groups = {name: group.with_absent(at) for name, group in self.groups.items()}
        return Given(logps, lengths, reference, columns, terms, groups)


# Four pairs with lengths and log-probs of a size that training meets: a = 1, -1, 0.5, 1; b = -1, 0.5, -1, -3; M = 0.05, 0.55, -0.1, -0.4.
FIXTURE = Given(
    logps=np.array([[-12, -15], [-20, -18], [-8, -9], [-30, -33.0]]),
    lengths=np.array([[10, 12], [16, 10], [5, 6], [20, 30.0]]),
    reference=np.array([[-13, -14], [-19, -18.5], [-8.5, -8], [-31, -30.0]]),
    columns={
        "label_prob": np.array([0.9, 0.55, 0.2, 0.7]),
        "win_probability": np.array([[0.9, 0.2]] * 4),
        "uncertainty": np.array([[0.5, 0.2]] * 4),
        "previous_logps": np.array([[-12.7, -14.2], [-18.7, -18.7], [-8.2, -8.2], [-30.7, -30.2]]),
    },
)
# One pair by tokens: chosen and rejected, policy and reference.
TOKENS = [
    (np.array([-0.5, -1, -2]), np.array([-0.7, -0.9, -2.5])),
    (np.array([-0.6, -1.5, -0.3, -0.8, -1]), np.array([-0.4, -1.2, -0.5, -0.6, -1.1])),
]


def token_pair(chosen_weights=1.0, rejected_weights=1.0, keep=(3, 5), terms=None) -> Given:
    """That pair with its tokens weighted, or cut."""
    sums = [
        [(weights * logps)[:k].sum() for logps in side]
        for side, weights, k in zip(TOKENS, (chosen_weights, rejected_weights), keep, strict=True)
    ]
    (w, rw), (l, rl) = sums  # noqa: E741
    return Given(np.array([[w, l]]), np.array([keep], float), np.array([[rw, rl]]), terms=terms or {})


def random_pairs(seed: int = 0, n: int = 9, *, single: bool = False) -> Given:
    """Pairs of any length. `single`: some have one answer only."""
    rng = np.random.default_rng(seed)

    def sequences(lengths):
        logps = -lengths * rng.uniform(0.3, 2.5, lengths.shape)
        return logps, np.where(lengths > 0, logps + rng.normal(0, 1.5, lengths.shape), 0)

    lengths = rng.integers(2, 40, (n, 2)).astype(float)
    if single:
        lengths[1::3, 0] = 0
        lengths[2::3, 1] = 0
    logps, reference = sequences(lengths)
    kl_lengths = np.where(lengths > 0, rng.integers(1, 20, (n, 2)), 0).astype(float)
    kl_logps, kl_reference = sequences(kl_lengths)
    why = np.stack([rng.integers(5, 20, n), np.zeros(n)], axis=1).astype(float)
    return Given(
        logps,
        lengths,
        reference,
        {
            "label_prob": rng.uniform(0.1, 0.9, n),
            "weight": rng.uniform(0, 2, n),
            "margin": rng.normal(0.4, 0.3, n),
            "win_probability": rng.uniform(0, 1, (n, 2)),
            "uncertainty": rng.uniform(0, 1, (n, 2)),
            "previous_logps": logps + rng.normal(0, 1, (n, 2)),
        },
        {"kl_reference": rng.uniform(0, 3, (n, 2)), "log_sum_p2": -lengths * rng.uniform(0.5, 2, (n, 2))},
        {
            "kl": Given(kl_logps + 0.4, kl_lengths, kl_reference),
            "rationale": Given(sequences(why)[0], why),
        },
    )


def double():
    """Losses in float64, which tells a wrong formula from rounding."""
    return jax.enable_x64(True)


def values_of(loss: Loss, pairs: PairLogps, hparams: dict, **own) -> Any:
    return loss(pairs, **own, **hparams).values


def there(values, pairs: PairLogps):
    """Where values count."""
    return pairs.there_B if values.ndim == 1 else pairs.there_B2


def mean_loss(loss: Loss, pairs: PairLogps, hparams: dict, **own):
    """The mean over the pairs, or answers, that are there: what a training step takes the gradient of."""
    values = values_of(loss, pairs, hparams, **own)
    counted = there(values, pairs)
    return jnp.sum(values, where=counted) / jnp.maximum(jnp.sum(counted), 1)


def slopes_of(loss: Loss, pairs: PairLogps, hparams: dict, **own) -> PairLogps:
    """d sum of values / d pairs."""

    def objective(pairs):
        values = values_of(loss, pairs, hparams, **own)
        return jnp.sum(values, where=there(values, pairs))

    return jax.grad(objective)(pairs)


def default_state(loss: Loss):
    return None if loss.initial_state is None else jax.tree.map(jnp.asarray, loss.initial_state())


def every_loss():
    return [(name, *make_loss(name)) for name in LOSSES]


# Of what holds for every objective, by default: the most used, and one of each kind that the step knows. The others: pytest -m slow.
USUAL = ("repo", "simpo", "dpo", "ipo", "kto", "orpo", "cpo", "sft", "amapo", "bco", "gamma_po_queue", "tdpo2", "aot", "lcpo", "wpo", "beta_dpo", "rationale_dpo")  # fmt: skip


def most(names) -> list:
    """The names as parameters, those that are not usual marked slow."""
    return [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in names]
