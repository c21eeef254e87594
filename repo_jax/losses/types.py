"""What an objective is given, what it returns, and what it says of itself.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


def as_float(x) -> jax.Array:
    """In float32, or float64 where it is given so: losses are computed in no less."""
    return jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))


class PairLogps(NamedTuple):
    """What a loss may look at: B pairs; axis 1 is (chosen, rejected). An answer that is not there has length 0.

    Only logps_B2 (those of groups too) and terms carry a gradient. An unpaired row is a pair of which one answer is not there. What is
    computed below is 0 for an answer that is not there, and so are its slopes.
    """

    logps_B2: jax.Array  # summed over the scored tokens, each times its weight where the data gives tokens weights
    lengths_B2: jax.Array  # how many those are
    reference_B2: jax.Array | None = None  # the same sums under the reference model, where the loss asks for one
    columns: Mapping[str, jax.Array] = {}  # of the data, float32: [B], or [B, 2] with one number for each answer
    terms: Mapping[str, jax.Array] = {}  # [B, 2]: per-position vocabulary reductions, summed over the scored tokens
    groups: Mapping[str, "PairLogps"] = {}  # further sequences, scored beside the pairs: one or two for each pair

    @property
    def there_B2(self) -> jax.Array:
        return self.lengths_B2 > 0

    @property
    def there_B(self) -> jax.Array:
        """Pairs of which both answers are there."""
        return self.there_B2.all(axis=1)

    @property
    def sums_B2(self) -> jax.Array:
        return jnp.where(self.there_B2, as_float(self.logps_B2), 0.0)

    @property
    def mean_B2(self) -> jax.Array:
        """Log-prob per scored token."""
        return self.sums_B2 / jnp.maximum(self.lengths_B2, 1)

    @property
    def sum_margin_B(self) -> jax.Array:
        return chosen_minus_rejected(self.sums_B2)

    @property
    def mean_margin_B(self) -> jax.Array:
        """M: mean log-prob of the chosen answer minus that of the rejected one, in nats per token."""
        return chosen_minus_rejected(self.mean_B2)

    @property
    def ratios_B2(self) -> jax.Array:
        """log(policy / reference) of each answer, summed over its scored tokens."""
        return jnp.where(self.there_B2, as_float(self.logps_B2) - as_float(self.reference_B2), 0.0)

    @property
    def ratio_margin_B(self) -> jax.Array:
        """Delta: that of the chosen answer minus that of the rejected one."""
        return chosen_minus_rejected(self.ratios_B2)

    @property
    def mean_ratio_margin_B(self) -> jax.Array:
        """The same of ratios per scored token."""
        return chosen_minus_rejected(self.ratios_B2 / jnp.maximum(self.lengths_B2, 1))

    @property
    def swapped(self) -> "PairLogps":
        """The same pairs with the rejected answers as the chosen ones."""

        def turned(x):
            return x[:, ::-1] if x.ndim == 2 else x

        return self._replace(
            logps_B2=self.logps_B2[:, ::-1],
            lengths_B2=self.lengths_B2[:, ::-1],
            reference_B2=None if self.reference_B2 is None else self.reference_B2[:, ::-1],
            columns={name: turned(x) for name, x in self.columns.items()},
            terms={name: turned(x) for name, x in self.terms.items()},
        )


def chosen_minus_rejected(x_B2) -> jax.Array:
    return x_B2[:, 0] - x_B2[:, 1]


class LossOut(NamedTuple):
    """What a loss returns that has more to say than one value per pair."""

    # [B], one for each pair; or [B, 2], one for each answer, averaged over the answers that are there.
    values: jax.Array
    state: Any = None  # the running state after this batch; None where there is none
    metrics: Mapping[str, jax.Array] = {}  # scalars over the global batch, logged as they are called


class Loss(NamedTuple):
    """An objective and what it needs.

    fn(pairs, **hyperparameters) -> values_B or LossOut. Where its signature has them, it is also passed its running `state`, `progress` (the
    share of updates done) and `training` (False in evaluation, which keeps the state as it was). Calling the Loss itself passes what is
    wanted of these and always returns a LossOut. Lengths, reference and columns are those of the whole global batch; a loss that mixes the
    log-probs of several pairs (`coupled`) takes two passes, so that those are, too.
    """

    fn: Callable[..., jax.Array | LossOut]
    reference: bool = False  # it compares with a reference model
    columns: tuple[str, ...] = ()  # of the data that it needs, one number for each pair
    answer_columns: tuple[str, ...] = ()  # likewise, one number for each answer
    terms: tuple[str, ...] = ()  # vocabulary reductions that it needs (logps.TERMS)
    groups: tuple[str, ...] = ()  # further sequences that it needs, scored beside the pairs
    data: tuple[str, ...] = ()  # options of the data section that have to be set
    coupled: bool = (
        False  # the value of a pair depends on the log-probs of other pairs of the batch, or on a running state
    )
    initial_state: Callable[[], Any] | None = None
    # What it is of: pairs of answers; answers by themselves, for which rows with one answer and a label will do; or chosen answers, for which
    # rows with one answer will do.
    layout: Literal["pairs", "answers", "chosen"] = "pairs"
    # Its gamma is a margin on the scale of M (mean_margin_B, nats per token): margins can be compared with it, and it can be taken from them.
    margin_gamma: bool = False
    vouched: str = "own reading"  # whose numbers the tests hold it to: see VOUCHED in catalogue.py

    def __call__(
        self, pairs: PairLogps, *, state: Any = None, progress=0.0, training: bool = True, **hparams
    ) -> LossOut:
        takes = inspect.signature(self.fn).parameters
        own = {"state": state, "progress": progress, "training": training}
        out = self.fn(pairs, **{name: value for name, value in own.items() if name in takes}, **hparams)
        return out if isinstance(out, LossOut) else LossOut(out)


# What a loss is passed under these names is no hyperparameter.
PASSED = ("state", "progress", "training")
