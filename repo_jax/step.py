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
from repo_jax.distributed import from_primary
from repo_jax.logps import exact_matmuls, pair_logps, weighted_logps
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

    with exact_matmuls(model.dtype):  # also the rules of custom derivatives, which are traced here
        grads, pairs = jax.grad(objective, has_aux=True)(params)
    return add(gathered, Gathered(grads, pairs))


def add_weighted(grads: dict, params: dict, frozen: dict | None, batch: RowBatch, slopes_B2, *, model: Decoder) -> dict:
    """Backward of a log-likelihood weighted by constant slopes: the chain rule's second half."""

    def objective(params):
        return weighted_logps(model, variables_of(params, frozen), batch, slopes_B2)

    with exact_matmuls(model.dtype):
        return add(grads, jax.grad(objective)(params))


def weigh(pairs: PairLogps, hparams: dict, *, loss: Loss) -> tuple[jax.Array, dict]:
    """slopes_B2 = d mean loss / d log-prob of every answer, over the whole global batch, and the metrics."""

    def objective(logps_B2):
        losses_B = loss.fn(pairs._replace(logps_B2=logps_B2), **hparams)
        return jnp.sum(losses_B, where=pairs.lengths_B2[:, 0] > 0) / len(losses_B), losses_B

    slopes_B2, losses_B = jax.grad(objective, has_aux=True)(pairs.logps_B2)
    return slopes_B2, preference_metrics(pairs, losses_B, slopes_B2, hparams)


def update(
    state: TrainState, grads: dict, active, loss, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The new state, the gradient's norm before clipping, and the running share of tokens that had a gradient.

    Where the loss or the norm is not finite, parameters and moments stay as they are; the update and its learning rate are gone.
    """
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates, step=state.step)

    def kept(new, old):
        # A schedule counts updates, also those that were skipped.
        counts = isinstance(new, optax.ScaleByScheduleState)
        return new if counts else jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, old)

    opt_state = jax.tree.map(
        kept, opt_state, state.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState)
    )
    running = jnp.where(sound, 0.9 * state.active_2[1] + 0.1 * active, state.active_2[1])
    active_2 = jnp.stack([state.active_2[1], running])
    return TrainState(state.step + 1, kept(params, state.params), opt_state, active_2), norm, running


class Scorer:
    """Scores pairs in rows of a few shapes on one mesh."""

    def __init__(self, model: Decoder, loss: Loss, hparams: dict, mesh: Mesh, shapes: Sequence[RowShape]):
        everywhere = NamedSharding(mesh, P())
        self.mesh, self.shapes = mesh, shapes
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


def break_even(remat: str, *, adapters: bool = False) -> float:
    """The active share of tokens below which scoring first is cheaper: 1 + (1 + b) p forward passes against 1 + b.

    b is what backward costs: the gradients of inputs and, unless only adapters are trained, of weights, each about a forward pass, and
    what it computes again.
    """
    again = {"none": 0.0, "dots": 0.1, "attention": 0.9}.get(remat, 1.0)
    backward = (1 if adapters else 2) + again
    return backward / (1 + backward)


class TrainStep:
    """One update on one global batch, in either of two exact forms.

    direct: forward and backward of every row, once. two_pass: score every row; weigh all pairs of the global batch together;
    pack only the answers whose slope is not 0 into rows again and run forward and backward for those. Mode auto takes two passes
    while the running share of tokens with a gradient, as of the update before last, is below `two_pass_below`: that number is
    there without waiting for an update that runs, and it is part of the state, so that runs and hosts never disagree.

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
        two_pass_below: float | None = None,
        frozen: dict | None = None,
        seed: int = 0,
    ):
        everywhere = NamedSharding(scorer.mesh, P())
        self._scorer, self._mode, self._frozen = scorer, mode, frozen
        self._below = break_even(model.remat, adapters=frozen is not None) if two_pass_below is None else two_pass_below
        self._lately = None  # active_2 as numbers of their own, which no later update uses up
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
            functools.partial(update, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings, everywhere, everywhere),
        )

    def rows(self, pairs: Sequence[PairTokens]) -> list[RowBatch]:
        """The rows of a global batch; no device is touched, so that a thread can build them ahead."""
        return row_batches(pairs, self._scorer.shapes)

    def mean_grads(
        self,
        params: dict,
        pairs: Sequence[PairTokens],
        *,
        update=0,
        rows: list[RowBatch] | None = None,
        form: str | None = None,
    ) -> tuple[dict, dict]:
        """The gradient of the mean loss over the pairs, float32, and metrics: device scalars that need not be waited for.

        `update` is the number of the update, from 0; `form` is direct or two_pass, by default the mode.
        """
        form = form or ("direct" if self._mode == "auto" else self._mode)
        rows = self.rows(pairs) if rows is None else rows
        gradient = self._direct if form == "direct" else self._two_pass
        with jax.set_mesh(self._scorer.mesh):
            grads, metrics = gradient(params, pairs, rows, update)
        used, slots = sum(pair.slots for pair in pairs), sum(batch.tokens_RT.size for batch in rows)
        return grads, metrics | {"padding_fraction": 1 - used / slots, "two_pass": float(form == "two_pass")}

    def _direct(self, params: dict, pairs, rows: list[RowBatch], update) -> tuple[dict, dict]:
        scorer = self._scorer
        gathered = Gathered(self._zeros(params), scorer.no_pairs(len(pairs)))
        dropout = None if self._dropout is None else self._fold(self._dropout, update)
        for i, batch in enumerate(rows):
            key = None if dropout is None else self._fold(dropout, i)
            batch = place(batch, scorer.mesh)
            gathered = self._add_direct(gathered, params, self._frozen, batch, scorer.hparams, key)
        return gathered.grads, scorer.weigh(gathered.pairs)[1]

    def _two_pass(self, params: dict, pairs, rows: list[RowBatch], update) -> tuple[dict, dict]:
        scorer = self._scorer
        slopes_B2, metrics = scorer.weigh(scorer(variables_of(params, self._frozen), rows))
        # The one wait of this form: which answers to push back decides which rows there are, the same on all hosts.
        slopes_B2 = from_primary(np.asarray(jax.device_get(slopes_B2)))
        grads = self._zeros(params)
        for batch in row_batches(pairs, scorer.shapes, wanted_B2=slopes_B2 != 0):
            grads = self._add_weighted(grads, params, self._frozen, place(batch, scorer.mesh), slopes_B2)
        return grads, metrics

    def form(self, state: TrainState) -> str:
        """direct or two_pass: what the next update takes. A TrainStep follows one chain of states, of which this is the newest."""
        if self._mode != "auto":
            return self._mode
        if self._lately is None:  # the first update of a process: nothing runs yet
            self._lately = list(np.asarray(jax.device_get(state.active_2)))
        return "two_pass" if float(self._lately[0]) < self._below else "direct"

    def __call__(
        self, state: TrainState, pairs: Sequence[PairTokens], rows: list[RowBatch] | None = None
    ) -> tuple[TrainState, dict]:
        """The state after one update, and the metrics; the state that came in is used up."""
        form = self.form(state)
        grads, metrics = self.mean_grads(state.params, pairs, update=state.step, rows=rows, form=form)
        return self.apply(state, grads, metrics)

    def apply(self, state: TrainState, grads: dict, metrics: dict) -> tuple[TrainState, dict]:
        """The state after the optimizer took these gradients, and the metrics with their norm; the state that came in is used up."""
        with jax.set_mesh(self._scorer.mesh):
            told = metrics["active_token_fraction"], metrics["loss"]
            state, grad_norm, running = self._update(state, grads, *told)
        if self._lately is not None:
            self._lately = [self._lately[1], running]
        return state, metrics | {"grad_norm": grad_norm}
