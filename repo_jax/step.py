"""One update on one global batch: score, weigh, push back.

Axis letters: R rows, T token slots, S scored tokens, B pairs of the global batch; 2 is (chosen, rejected).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.data.rows import RowBatch, RowShape, row_batches
from repo_jax.data.schema import PairTokens
from repo_jax.logps import pair_logps
from repo_jax.losses import Loss, PairLogps
from repo_jax.metrics import preference_metrics
from repo_jax.models.decoder import Decoder
from repo_jax.optimizer import apply_updates
from repo_jax.sharding import BATCH
from repo_jax.state import TrainState, variables_of


def place(batch: RowBatch, mesh: Mesh) -> RowBatch:
    """Rows spread over data and fsdp, the rest on every device; each process copies its own rows only."""

    def put(name, array):
        sharding = NamedSharding(mesh, P() if name == "filled_B" else BATCH)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return RowBatch(**{name: put(name, array) for name, array in batch._asdict().items() if array is not None})


class Gathered(NamedTuple):
    """What micro-batches add up to."""

    grads: dict  # of the sum over the pairs so far divided by B; added in float32, though bfloat16 parameters round each part
    pairs: PairLogps  # zero where a pair has not come yet


def no_pairs(B: int) -> PairLogps:
    return PairLogps(jnp.zeros((B, 2), jnp.float32), jnp.zeros((B, 2), jnp.float32))


def add(one, other):
    return jax.tree.map(jnp.add, one, other)


def score(pairs: PairLogps, variables: dict, batch: RowBatch, *, model: Decoder) -> PairLogps:
    """The pairs so far and those of this batch; a pair is in exactly one batch, so sums put them together."""
    return add(pairs, pair_logps(model, variables, batch))


def add_direct(
    gathered: Gathered,
    params: dict,
    frozen: dict | None,
    batch: RowBatch,
    hparams: dict,
    dropout,
    *,
    model: Decoder,
    loss: Loss,
) -> Gathered:
    """Forward and backward of the loss over the pairs of this batch. Divides by B, the pairs of the global batch."""

    def objective(params):
        pairs = pair_logps(model, variables_of(params, frozen), batch, dropout=dropout)
        return jnp.sum(loss.fn(pairs, **hparams), where=batch.filled_B) / len(batch.filled_B), pairs

    grads, pairs = jax.grad(objective, has_aux=True)(params)
    return add(gathered, Gathered(grads, pairs))


def add_weighted(grads: dict, params: dict, frozen: dict | None, batch: RowBatch, slopes_B2, *, model: Decoder) -> dict:
    """Backward of a log-likelihood weighted by constant slopes: the chain rule's second half."""

    def objective(params):
        return jnp.sum(slopes_B2 * pair_logps(model, variables_of(params, frozen), batch).logps_B2)

    return add(grads, jax.grad(objective)(params))


def weigh(pairs: PairLogps, hparams: dict, *, loss: Loss) -> tuple[jax.Array, dict]:
    """slopes_B2 = d mean loss / d log-prob of every answer, over the whole global batch, and the metrics."""

    def objective(logps_B2):
        losses_B = loss.fn(pairs._replace(logps_B2=logps_B2), **hparams)
        return jnp.sum(losses_B, where=pairs.lengths_B2[:, 0] > 0) / len(losses_B), losses_B

    slopes_B2, losses_B = jax.grad(objective, has_aux=True)(pairs.logps_B2)
    return slopes_B2, preference_metrics(pairs, losses_B, slopes_B2, hparams)


def update(state: TrainState, grads: dict, *, optimizer: optax.GradientTransformation) -> tuple[TrainState, jax.Array]:
    """The new state and the gradient's norm before clipping."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates, step=state.step)
    return TrainState(state.step + 1, params, opt_state), optax.tree.norm(grads)


class Scorer:
    """Scores pairs in rows of one shape on one mesh."""

    def __init__(self, model: Decoder, loss: Loss, hparams: dict, mesh: Mesh, shape: RowShape):
        everywhere = NamedSharding(mesh, P())
        self.mesh, self.shape = mesh, shape
        self.hparams = jax.device_put({name: np.float32(value) for name, value in hparams.items()}, everywhere)
        self._score = jax.jit(functools.partial(score, model=model), donate_argnums=0, out_shardings=everywhere)
        self._weigh = jax.jit(functools.partial(weigh, loss=loss), out_shardings=everywhere)
        self.no_pairs = jax.jit(no_pairs, static_argnums=0, out_shardings=everywhere)

    def __call__(self, variables: dict, batches: Sequence[RowBatch]) -> PairLogps:
        """The log-probs of every pair in the batches, which share one numbering of pairs."""
        with jax.set_mesh(self.mesh):
            pairs = self.no_pairs(len(batches[0].filled_B))
            for batch in batches:
                pairs = self._score(pairs, variables, place(batch, self.mesh))
        return pairs

    def weigh(self, pairs: PairLogps) -> tuple[jax.Array, dict]:
        with jax.set_mesh(self.mesh):
            return self._weigh(pairs, self.hparams)


class TrainStep:
    """One update on one global batch, in either of two exact forms.

    direct: forward and backward of every row, once. two_pass: score every row; weigh all pairs of the global batch together;
    pack only the answers whose slope is not 0 into rows again and run forward and backward for those.

    `frozen` are the parameters under the adapters that are trained, None where all parameters are. `seed` decides what the
    adapters' dropout drops, which depends also on the update and on how pairs lie in rows.
    """

    def __init__(
        self,
        scorer: Scorer,
        model: Decoder,
        loss: Loss,
        optimizer,
        shardings: TrainState,
        *,
        mode: str,
        frozen: dict | None = None,
        seed: int = 0,
    ):
        everywhere = NamedSharding(scorer.mesh, P())
        self._scorer, self._mode, self._frozen = scorer, mode, frozen
        self._dropout = jax.device_put(jax.random.key(seed), everywhere) if model.lora_dropout else None
        self._fold = jax.jit(jax.random.fold_in, out_shardings=everywhere)
        self._zeros = jax.jit(
            lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params),
            out_shardings=shardings.params,
        )
        self._add_direct = jax.jit(
            functools.partial(add_direct, model=model, loss=loss),
            donate_argnums=0,
            out_shardings=Gathered(shardings.params, everywhere),
        )
        self._add_weighted = jax.jit(
            functools.partial(add_weighted, model=model), donate_argnums=0, out_shardings=shardings.params
        )
        self._update = jax.jit(
            functools.partial(update, optimizer=optimizer), donate_argnums=0, out_shardings=(shardings, everywhere)
        )

    def mean_grads(self, params: dict, pairs: Sequence[PairTokens], *, update=0) -> tuple[dict, dict]:
        """The gradient of the mean loss over the pairs, float32, and metrics: device scalars that need not be waited for.

        `update` is the number of the update, from 0.
        """
        scorer, frozen = self._scorer, self._frozen
        batches = row_batches(pairs, scorer.shape)
        with jax.set_mesh(scorer.mesh):
            grads = self._zeros(params)
            if self._mode == "direct":
                gathered = Gathered(grads, scorer.no_pairs(len(pairs)))
                dropout = None if self._dropout is None else self._fold(self._dropout, update)
                for i, batch in enumerate(batches):
                    key = None if dropout is None else self._fold(dropout, i)
                    gathered = self._add_direct(
                        gathered, params, frozen, place(batch, scorer.mesh), scorer.hparams, key
                    )
                grads = gathered.grads
                _, metrics = scorer.weigh(gathered.pairs)
            else:
                slopes_B2, metrics = scorer.weigh(scorer(variables_of(params, frozen), batches))
                # The one wait of this form: which answers to push back decides which rows there are.
                wanted_B2 = np.asarray(jax.device_get(slopes_B2)) != 0
                for batch in row_batches(pairs, scorer.shape, wanted_B2=wanted_B2):
                    grads = self._add_weighted(grads, params, frozen, place(batch, scorer.mesh), slopes_B2)
        used = sum(pair.slots for pair in pairs)
        slots = len(batches) * scorer.shape.R * scorer.shape.T
        return grads, metrics | {"padding_fraction": 1 - used / slots}

    def __call__(self, state: TrainState, pairs: Sequence[PairTokens]) -> tuple[TrainState, dict]:
        """The state after one update, and the metrics; the state that came in is used up."""
        grads, metrics = self.mean_grads(state.params, pairs, update=state.step)
        with jax.set_mesh(self._scorer.mesh):
            state, grad_norm = self._update(state, grads)
        return state, metrics | {"grad_norm": grad_norm}
