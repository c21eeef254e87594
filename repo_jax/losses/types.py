"""What an objective is given, what it returns, and what it says of itself.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class PairLogps(NamedTuple):
    """What a loss may look at: B pairs; axis 1 is (chosen, rejected). An answer that is not there has length 0.

    Only logps_B2 and terms carry a gradient. An unpaired row is a pair of which one answer is not there.
    """

    logps_B2: jax.Array  # summed over the scored tokens, each times its weight where the data gives tokens weights
    lengths_B2: jax.Array  # how many those are
    reference_B2: jax.Array | None = None  # the same sums under the reference model, where the loss asks for one
    columns: Mapping[str, jax.Array] = {}  # of the data, float32: [B], or [B, 2] with one number for each answer
    terms: Mapping[str, jax.Array] = {}  # [B, 2]: per-position vocabulary reductions, summed over the scored tokens
    groups: Mapping[str, "PairLogps"] = {}  # further sequences that belong to the pairs, in the same order

    @property
    def there_B2(self) -> jax.Array:
        return self.lengths_B2 > 0

    @property
    def mean_B2(self) -> jax.Array:
        """Log-prob per scored token."""
        return self.logps_B2 / jnp.maximum(self.lengths_B2, 1)  # an answer that is not there has length 0

    @property
    def mean_margin_B(self) -> jax.Array:
        """M: mean log-prob of the chosen answer minus that of the rejected one, in nats per token."""
        return self.mean_B2[:, 0] - self.mean_B2[:, 1]

    @property
    def ratios_B2(self) -> jax.Array:
        """log(policy / reference) of each answer, summed over its scored tokens."""
        return self.logps_B2 - self.reference_B2

    @property
    def ratio_margin_B(self) -> jax.Array:
        """Delta: that of the chosen answer minus that of the rejected one."""
        return self.ratios_B2[:, 0] - self.ratios_B2[:, 1]


class LossOut(NamedTuple):
    """What a loss returns that has more to say than one value per pair."""

    # [B], one for each pair; or [B, 2], one for each answer, averaged over the answers that are there.
    values: jax.Array
    state: Any = None  # the running state after this batch; None where there is none
    metrics: Mapping[str, jax.Array] = {}  # scalars over the global batch, logged as they are called


class Loss(NamedTuple):
    """An objective and what it needs.

    fn(pairs, **hyperparameters) -> values_B or LossOut; with a state also fn(pairs, state=...). Whatever fn computes from several pairs, it
    computes over all pairs of the global batch, so that a loss which does (`coupled`) takes two passes.
    """

    fn: Callable[..., jax.Array | LossOut]
    reference: bool = False  # it compares with a reference model
    columns: tuple[str, ...] = ()  # of the data that it needs, one number for each pair
    answer_columns: tuple[str, ...] = ()  # likewise, one number for each answer
    terms: tuple[str, ...] = ()  # vocabulary reductions that it needs (logps.TERMS)
    groups: tuple[str, ...] = ()  # further sequences that it needs, scored beside the pairs
    data: tuple[str, ...] = ()  # options of the data section that have to be set
    coupled: bool = False  # the value of a pair depends on other pairs of the batch, or on a running state
    initial_state: Callable[[], Any] | None = None
    layout: Literal["pairs", "answers"] = "pairs"  # answers: rows with one answer and a label will do
    # Whose numbers the tests hold it to: TRL, the paper's code, the paper; "own reading" where nobody's.
    vouched: str = ""
