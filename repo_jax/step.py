"""One update on one global batch: score, weigh, push back.

Axis letters: R rows, T token slots, S scored tokens, B pairs of the global batch, D width, L layers, X slots of row batches
end to end; 2 is (chosen, rejected).
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.data.rows import Known, RowBatch, RowShape, known_of, round_up, row_batches, slots_before
from repo_jax.data.schema import PairTokens
from repo_jax.distributed import from_primary
from repo_jax.logps import exact_matmuls, pair_logps, pair_logps_and_kept, weighted_logps
from repo_jax.losses import Loss, PairLogps
from repo_jax.metrics import preference_metrics
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import OUTPUT, Decoder, Kept
from repo_jax.optimizer import apply_updates
from repo_jax.sharding import AXES, BATCH, constrain
from repo_jax.state import TrainState, initial_loss_state, variables_of


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place(batch: RowBatch, mesh: Mesh) -> RowBatch:
    """Rows spread over data and fsdp, the rest on every device; each process copies its own rows only. What is for the host stays behind."""
    of_host = "known", "starts_B3"
    arrays = {name: array for name, array in batch._asdict().items() if array is not None and name not in of_host}
    spread, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return RowBatch(
        **{name: _put(array, everywhere if name == "filled_B" else spread) for name, array in arrays.items()}
    )


def place_known(known: Known, mesh: Mesh) -> Known:
    return jax.tree.map(lambda array: _put(array, NamedSharding(mesh, P())), known)


def takes_two_passes(loss: Loss) -> bool:
    """Whether only two passes are exact: the loss mixes log-probs of several pairs, or of a pair and its groups, which other rows hold."""
    return loss.coupled or loss.initial_state is not None or bool(loss.groups)


def needs_two_passes(what: str) -> str:
    return f"mode=direct but {what} mixes the log-probs of several pairs, for which only two passes are exact; set mode to auto"


def sequences(pairs: Sequence[PairTokens], groups: Sequence[str]) -> list[PairTokens]:
    """All that is scored for these pairs: each followed by its groups."""
    return [one for pair in pairs for one in (pair, *(pair.groups[name] for name in groups))] if groups else list(pairs)


class Gathered(NamedTuple):
    """What micro-batches add up to."""

    grads: dict  # of the sum over the pairs so far divided by B; added in float32, though bfloat16 parameters round each part
    pairs: PairLogps  # as scored; zero where a pair has not come yet


class Slopes(NamedTuple):
    """d mean loss / d what was scored, of all sequences."""

    logps_B2: jax.Array
    terms: dict[str, jax.Array]


class Weighed(NamedTuple):
    """What a loss makes of all pairs of a global batch."""

    slopes: Slopes
    metrics: dict[str, jax.Array]
    state: Any  # of the loss, after this batch


def no_pairs(B: int, terms: Sequence[str] = ()) -> PairLogps:
    zeros = jnp.zeros((B, 2), jnp.float32)
    return PairLogps(zeros, zeros, terms={name: zeros for name in terms})


def add(one, other):
    return jax.tree.map(jnp.add, one, other)


def score(
    pairs: PairLogps, variables: dict, batch: RowBatch, *, model: Decoder, terms: Sequence[str] = ()
) -> PairLogps:
    """The pairs so far and those of this batch; a pair is in exactly one batch, so sums put them together."""
    return add(pairs, pair_logps(model, variables, batch, terms=terms))


def score_and_keep(
    pairs: PairLogps, variables: dict, batch: RowBatch, *, model: Decoder, terms: Sequence[str] = ()
) -> tuple[PairLogps, Kept]:
    """score, and what each layer was given."""
    scored, kept = pair_logps_and_kept(model, variables, batch, terms=terms, keep=True)
    return add(pairs, scored), kept


# What is kept waits for second passes with D, not rows, spread over the devices: rows that are packed anew pick their tokens from all of
# them, and so each device has its share of every token. On the way the `tensor` axis, over which rows are not spread, comes last and goes
# first: then the rest is one all-to-all.
HELD = P(None, None, AXES)
BETWEEN = P(None, None, None, *BATCH)  # [L, R, T, D]


def check_held(cfg: DecoderConfig, mesh) -> None:
    """Raises ValueError where the devices do not divide D."""
    if cfg.D % mesh.size:
        raise ValueError(
            f"keep_layer_inputs=true spreads the model's width of {cfg.D} over all {mesh.size} devices, which do not divide it; leave it out"
        )


def no_kept(model: Decoder, X: int) -> Kept:
    """Room for what is kept of X slots: [L, X, D] each."""
    stacks = model.cfg.stacks | {OUTPUT: 1}
    return {stack: jnp.zeros((length, X, model.cfg.D), model.dtype) for stack, length in stacks.items()}


def hold(held: Kept, kept: Kept, n) -> Kept:
    """What is held, with that of row batch n, all of one shape."""

    def one(all_LXD, kept_LRTD):
        L, R, T, D = kept_LRTD.shape
        kept_LXD = constrain(constrain(kept_LRTD, BETWEEN).reshape(L, R * T, D), HELD)
        return jax.lax.dynamic_update_slice_in_dim(all_LXD, kept_LXD, n * R * T, axis=1)

    return jax.tree.map(one, held, kept)


def take(held: Kept, slots_RT) -> Kept:
    """What is kept of these slots, counted through all row batches, spread by rows."""

    def one(all_LXD):
        taken_LRTD = all_LXD.at[:, slots_RT].get(mode="promise_in_bounds")
        return constrain(constrain(taken_LRTD, BETWEEN), P(None, *BATCH))

    return jax.tree.map(one, held)


def join(scored: PairLogps, known: Known | None, *, groups: Sequence[str] = ()) -> PairLogps:
    """What a loss looks at: what was scored with what is known, the groups apart."""
    if known is not None:
        scored = scored._replace(
            lengths_B2=known.lengths_B2, reference_B2=known.reference_B2, columns=dict(known.columns)
        )
    if not groups:
        return scored
    step = 1 + len(groups)
    parts = [jax.tree.map(lambda x, first=first: x[first::step], scored) for first in range(step)]
    apart = {name: part._replace(columns={}) for name, part in zip(groups, parts[1:], strict=True)}
    return parts[0]._replace(groups=apart)


def _together(pairs: PairLogps, groups: Sequence[str]) -> Slopes:
    """The inverse of join, of slopes."""
    parts = [pairs, *(pairs.groups[name] for name in groups)]
    parts = [Slopes(part.logps_B2, dict(part.terms)) for part in parts]
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, 2), *parts)


def quiet(pairs: PairLogps, here_B2) -> PairLogps:
    """Harmless numbers for answers that are not here, so that no loss makes an infinity of them, whose gradient no mask would stop."""
    nothing_B2 = -jnp.maximum(pairs.lengths_B2, 1)

    def kept(x_B2):
        return None if x_B2 is None else jnp.where(here_B2, x_B2, nothing_B2)

    return pairs._replace(
        logps_B2=kept(pairs.logps_B2),
        reference_B2=kept(pairs.reference_B2),
        groups={name: quiet(group, group.there_B2) for name, group in pairs.groups.items()},
    )


def bound(loss: Loss, hparams: dict) -> tuple[Loss, dict[str, np.float32]]:
    """The loss with those hyperparameters settled that choose between forms (texts), and the others, which programs take as numbers."""
    chosen = {name: value for name, value in hparams.items() if isinstance(value, str | bool)}
    numbers = {name: np.float32(value) for name, value in hparams.items() if name not in chosen}
    return (loss._replace(fn=functools.partial(loss.fn, **chosen)) if chosen else loss), numbers


def mean_of(values, lengths_B2, here_B2, *, layout: str):
    """The part that those here have in the mean over all pairs that are there, or over all answers where there is a value for each."""
    there_B2 = lengths_B2 > 0
    if values.ndim == 1:
        counted = {
            "pairs": lambda x_B2: x_B2.all(axis=1),
            "answers": lambda x_B2: x_B2.any(axis=1),
            "chosen": lambda x_B2: x_B2[:, 0],
        }
        there_B2, here_B2 = counted[layout](there_B2), counted[layout](here_B2)
    return jnp.sum(values, where=here_B2) / jnp.maximum(jnp.sum(there_B2), 1)


def add_direct(
    gathered: Gathered,
    params: dict,
    frozen: dict | None,
    live: dict | None,
    batch: RowBatch,
    known: Known,
    hparams: dict,
    progress,
    dropout,
    *,
    model: Decoder,
    loss: Loss,
) -> Gathered:
    """Forward and backward of the loss over the pairs of this batch, as their part of the mean over the global batch."""

    def objective(params):
        scored = pair_logps(model, variables_of(params, frozen, live), batch, dropout=dropout, terms=loss.terms)
        pairs = join(scored, known)
        here_B2 = pairs.there_B2 & batch.filled_B[:, None]
        out = loss(quiet(pairs, here_B2), progress=progress, **hparams)
        return mean_of(out.values, pairs.lengths_B2, here_B2, layout=loss.layout), scored

    with exact_matmuls(model.dtype):  # also the rules of custom derivatives, which are traced here
        grads, scored = jax.grad(objective, has_aux=True)(params)
    return add(gathered, Gathered(grads, scored))


def add_weighted(
    grads: dict,
    params: dict,
    frozen: dict | None,
    live: dict | None,
    batch: RowBatch,
    slopes: Slopes,
    kept: Kept | None = None,
    *,
    model: Decoder,
) -> dict:
    """Backward of a log-likelihood weighted by constant slopes: the chain rule's second half."""

    def objective(params):
        return weighted_logps(model, variables_of(params, frozen, live), batch, *slopes, kept=kept)

    with exact_matmuls(model.dtype):
        return add(grads, jax.grad(objective)(params))


def weigh(pairs: PairLogps, hparams: dict, state, progress, *, loss: Loss, training: bool) -> Weighed:
    """The slopes of the mean loss over the whole global batch, and the metrics."""

    def objective(pairs):
        out = loss(quiet(pairs, pairs.there_B2), state=state, progress=progress, training=training, **hparams)
        value = mean_of(out.values, pairs.lengths_B2, pairs.there_B2, layout=loss.layout)
        return value, (value, out)

    by_pairs, (value, out) = jax.grad(objective, has_aux=True)(pairs)
    metrics = {"loss": value} | preference_metrics(pairs, by_pairs, hparams) | dict(out.metrics)
    if out.state is not None:
        state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), out.state, state)
    return Weighed(_together(by_pairs, loss.groups), metrics, state)


def update(
    state: TrainState, grads: dict, active, loss, loss_state, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The new state, the gradient's norm before clipping, and the running share of tokens that had a gradient.

    Where the loss or the norm is not finite, parameters, moments and the loss's state stay as they are; the update and its learning rate
    are gone.
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
    kept_state = TrainState(
        state.step + 1, kept(params, state.params), opt_state, active_2, kept(loss_state, state.loss_state)
    )
    return kept_state, norm, running


class Scorer:
    """Scores pairs in rows of a few shapes on one mesh, and weighs them by a loss."""

    def __init__(self, model: Decoder, loss: Loss, hparams: dict, mesh: Mesh, shapes: Sequence[RowShape]):
        self._everywhere = everywhere = NamedSharding(mesh, P())
        self.model, self.mesh, self.shapes = model, mesh, shapes
        self._score = jax.jit(
            functools.partial(score, model=model), donate_argnums=0, out_shardings=everywhere, static_argnames="terms"
        )
        self.no_pairs = jax.jit(no_pairs, static_argnums=(0, 1), out_shardings=everywhere)
        self._score_and_keep = jax.jit(
            functools.partial(score_and_keep, model=model),
            donate_argnums=0,
            out_shardings=(everywhere, NamedSharding(mesh, P(None, *BATCH))),
            static_argnames="terms",
        )
        held = NamedSharding(mesh, HELD)
        self._no_kept = jax.jit(functools.partial(no_kept, model), out_shardings=held, static_argnums=0)
        self._hold = jax.jit(hold, out_shardings=held, donate_argnums=0)
        self._join = jax.jit(join, out_shardings=everywhere, static_argnames="groups")
        self._weigh_by(loss, hparams)

    def _weigh_by(self, loss: Loss, hparams: dict) -> None:
        self.loss, numbers = bound(loss, hparams)
        self.hparams = jax.device_put(numbers, self._everywhere)
        self.initial_state = jax.device_put(initial_loss_state(loss), self._everywhere)
        self._weigh = jax.jit(
            functools.partial(weigh, loss=self.loss), out_shardings=self._everywhere, static_argnames="training"
        )

    def of(self, loss: Loss, hparams: dict) -> "Scorer":
        """The same for another loss; the programs that score are shared."""
        other = copy.copy(self)
        other._weigh_by(loss, hparams)
        return other

    def rows(self, pairs: Sequence[PairTokens], *, B: int | None = None) -> list[RowBatch]:
        """The rows of pairs and their groups, with room for B pairs; no device is touched."""
        room = None if B is None else B * (1 + len(self.loss.groups))
        return row_batches(sequences(pairs, self.loss.groups), self.shapes, B=room)

    def __call__(self, variables: dict, batches: Sequence[RowBatch]) -> PairLogps:
        """The log-probs of every pair in the batches, which share one numbering of pairs."""
        terms = tuple(self.loss.terms)
        with jax.set_mesh(self.mesh):
            scored = self.no_pairs(len(batches[0].filled_B), terms)
            for batch in batches:
                scored = self._score(scored, variables, place(batch, self.mesh), terms=terms)
            return self._with_known(scored, batches)

    def and_keep(self, variables: dict, batches: Sequence[RowBatch], room: int) -> tuple[PairLogps, Kept]:
        """The same, and what each layer was given, as `take` wants it, in room for so many slots or more. The batches have one shape."""
        size = batches[0].tokens_RT.size
        room = room if len(batches) * size <= room else rooms(len(batches)) * size
        terms = tuple(self.loss.terms)
        with jax.set_mesh(self.mesh):
            scored = self.no_pairs(len(batches[0].filled_B), terms)
            held = self._no_kept(room)
            for n, batch in enumerate(batches):
                scored, kept = self._score_and_keep(scored, variables, place(batch, self.mesh), terms=terms)
                held = self._hold(held, kept, n)
                del kept  # before the next one comes
            return self._with_known(scored, batches), held

    def _with_known(self, scored: PairLogps, batches: Sequence[RowBatch]) -> PairLogps:
        known = batches[0].known
        return self.join(scored, None if known is None else place_known(known, self.mesh))

    def join(self, scored: PairLogps, known: Known | None) -> PairLogps:
        return self._join(scored, known, groups=tuple(self.loss.groups))

    def weigh(self, pairs: PairLogps, state=None, progress=0.0, *, training: bool = False) -> Weighed:
        """`state` is the loss's; None: its first. `progress` is the share of updates done, 0 to 1."""
        state = self.initial_state if state is None else state
        with jax.set_mesh(self.mesh):
            return self._weigh(pairs, self.hparams, state, progress, training=training)


def rooms(n: int) -> int:
    """For how many row batches there is room where n are wanted, so that few programs are compiled for all n."""
    return round_up(n, 1 << max(0, n.bit_length() - 3))


def recomputed(remat: str) -> float:
    """How many forward passes the backward pass computes again."""
    return {"none": 0.0, "dots": 0.1, "attention": 0.9}.get(remat, 1.0)


def break_even(remat: str, *, adapters: bool = False, keeps: bool = False) -> float:
    """The active share of tokens below which scoring first is cheaper: 1 + (1 + b) p forward passes against 1 + b.

    b is what backward costs: the gradients of inputs and, unless only adapters are trained, of weights, each about a forward pass, and
    what it computes again. Where scoring keeps what layers are given, it is 1 + k p: the gradients and one forward pass, and a tenth more,
    because near p = 1, where it matters, emptier rows and moving what was kept cost about as much (benchmarks/README.md).
    """
    gradients = 1 if adapters else 2
    backward = gradients + recomputed(remat)
    return backward / (1.1 * (gradients + 1) if keeps else 1 + backward)


class TrainStep:
    """One update on one global batch, in either of two exact forms.

    direct: forward and backward of every row, once. two_pass: score every row; weigh all pairs of the global batch together;
    pack only the answers whose slope is not 0 into rows again and run forward and backward for those. Mode auto takes two passes
    while the running share of tokens with a gradient, as of the update before last, is below `two_pass_below`: that number is
    there without waiting for an update that runs, and it is part of the state, so that runs and hosts never disagree.

    `frozen` are the parameters under the adapters that are trained, None where all parameters are; `live` are the variables of a reference
    model that runs along, for terms that want its distribution. `seed` decides what the
    adapters' dropout drops, which depends also on the update and on how pairs lie in rows. `total_steps` is what progress is a share of.

    Losses that only two passes are exact for (takes_two_passes) take two passes in mode auto too.

    With `keeps` above 0 scoring keeps what each layer is given, and second passes need not compute it; that is for how many slots there is
    room from the start (updates with more make more).
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
        live: dict | None = None,
        seed: int = 0,
        total_steps: int = 1,
        keeps: int = 0,
    ):
        everywhere = NamedSharding(scorer.mesh, P())
        self._frozen, self._live, self._shardings, self._keeps = frozen, live, shardings, keeps
        even = break_even(model.remat, adapters=frozen is not None, keeps=keeps > 0)
        self._below = even if two_pass_below is None else two_pass_below
        self._dropout = jax.device_put(jax.random.key(seed), everywhere) if model.lora_dropout else None
        self._fold = jax.jit(jax.random.fold_in, out_shardings=everywhere)
        self._progress = jax.jit(
            lambda update: jnp.minimum(jnp.float32(update) / total_steps, 1.0), out_shardings=everywhere
        )
        self._zeros = jax.jit(
            lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params),
            out_shardings=shardings.params,
        )
        self._add_weighted = jax.jit(
            functools.partial(add_weighted, model=model), donate_argnums=0, out_shardings=shardings.params
        )
        self._take = jax.jit(take, out_shardings=NamedSharding(scorer.mesh, P(None, *BATCH)))
        self._update = jax.jit(
            functools.partial(update, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings._replace(loss_state=everywhere), everywhere, everywhere),
        )
        self._weigh_by(scorer, mode)

    def _weigh_by(self, scorer: Scorer, mode: str) -> None:
        if takes_two_passes(scorer.loss) and mode == "direct":
            raise ValueError(needs_two_passes("this loss"))
        self._scorer, self._mode = scorer, "two_pass" if takes_two_passes(scorer.loss) else mode
        self._lately = None  # active_2 as numbers of their own, which no later update uses up
        self._add_direct = jax.jit(
            functools.partial(add_direct, model=scorer.model, loss=scorer.loss),
            donate_argnums=0,
            out_shardings=Gathered(self._shardings.params, NamedSharding(scorer.mesh, P())),
        )

    def of(self, scorer: Scorer, mode: str) -> "TrainStep":
        """The same for another loss: the programs of two passes are shared."""
        other = copy.copy(self)
        other._weigh_by(scorer, mode)
        return other

    def rows(self, pairs: Sequence[PairTokens]) -> list[RowBatch]:
        """The rows of a global batch; no device is touched, so that a thread can build them ahead."""
        return self._scorer.rows(pairs)

    def mean_grads(
        self,
        params: dict,
        pairs: Sequence[PairTokens],
        *,
        update=0,
        rows: list[RowBatch] | None = None,
        form: str | None = None,
        loss_state=None,
    ) -> tuple[dict, dict]:
        """The gradient of the mean loss over the pairs, float32, and metrics: device scalars that need not be waited for.

        `update` is the number of the update, from 0; `form` is direct or two_pass, by default the mode; `loss_state` is the loss's running
        state, by default its first.
        """
        grads, weighed = self._gradient(params, pairs, update, rows, form, loss_state)
        return grads, weighed.metrics

    def _gradient(self, params: dict, pairs, update, rows, form: str | None, loss_state) -> tuple[dict, Weighed]:
        form = form or ("direct" if self._mode == "auto" else self._mode)
        rows = self.rows(pairs) if rows is None else rows
        every = sequences(pairs, self._scorer.loss.groups)
        known = rows[0].known or known_of(every, len(every))
        if self._scorer.loss.reference and known.reference_B2 is None:
            raise ValueError("the loss compares with a reference model, but the pairs have no log-probs under one")
        if form == "direct" and takes_two_passes(self._scorer.loss):
            raise ValueError(needs_two_passes("this loss"))
        with jax.set_mesh(self._scorer.mesh):
            at = self._progress(update), loss_state
            if form == "direct":
                grads, weighed = self._direct(params, rows, known, update, *at)
            else:
                grads, weighed = self._two_pass(params, every, rows, *at)
        used, slots = sum(one.slots for one in every), sum(batch.tokens_RT.size for batch in rows)
        of_rows = {"padding_fraction": 1 - used / slots, "two_pass": float(form == "two_pass")}
        return grads, weighed._replace(metrics=weighed.metrics | of_rows)

    def _direct(self, params: dict, rows: list[RowBatch], known: Known, update, progress, loss_state):
        scorer, known = self._scorer, place_known(known, self._scorer.mesh)
        gathered = Gathered(self._zeros(params), scorer.no_pairs(len(known.lengths_B2), tuple(scorer.loss.terms)))
        dropout = None if self._dropout is None else self._fold(self._dropout, update)
        for i, batch in enumerate(rows):
            key = None if dropout is None else self._fold(dropout, i)
            batch = place(batch, scorer.mesh)
            gathered = self._add_direct(
                *(gathered, params, self._frozen, self._live, batch, known, scorer.hparams, progress, key)
            )
        pairs = scorer.join(gathered.pairs, known)
        return gathered.grads, scorer.weigh(pairs, loss_state, progress, training=True)

    def _two_pass(self, params: dict, every: list[PairTokens], rows: list[RowBatch], progress, loss_state):
        scorer, variables, held = self._scorer, variables_of(params, self._frozen, self._live), None
        if self._keeps:
            pairs, held = scorer.and_keep(variables, rows, self._keeps)
        else:
            pairs = scorer(variables, rows)
        weighed = scorer.weigh(pairs, loss_state, progress, training=True)
        # The one wait of this form: which answers to push back decides which rows there are, the same on all hosts.
        slopes = from_primary(jax.tree.map(np.asarray, jax.device_get(weighed.slopes)))
        wanted_B2 = np.any([slopes_B2 != 0 for slopes_B2 in jax.tree.leaves(slopes)], axis=0)
        grads = self._zeros(params)
        again = row_batches(every, scorer.shapes, wanted_B2=wanted_B2)
        for n, batch in enumerate(again):
            kept = None
            if held is not None:
                slots = _put(slots_before(every, rows, batch), NamedSharding(scorer.mesh, P()))
                kept = self._take(held, slots)
                held = held if n + 1 < len(again) else None  # the last one runs without it
            batch = place(batch, scorer.mesh)
            grads = self._add_weighted(*(grads, params, self._frozen, self._live, batch, slopes, kept))
            del kept
        return grads, weighed

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
        grads, weighed = self._gradient(state.params, pairs, state.step, rows, form, state.loss_state)
        return self.apply(state, grads, weighed.metrics, weighed.state)

    def apply(self, state: TrainState, grads: dict, metrics: dict, loss_state=None) -> tuple[TrainState, dict]:
        """The state after the optimizer took these gradients, and the metrics with their norm; the state that came in is used up.

        `loss_state` is the loss's running state after this batch; None: as it was.
        """
        with jax.set_mesh(self._scorer.mesh):
            told = metrics["active_token_fraction"], metrics["loss"]
            loss_state = jax.tree.map(jnp.copy, state.loss_state) if loss_state is None else loss_state
            state, grad_norm, running = self._update(state, grads, *told, loss_state)
        if self._lately is not None:
            self._lately = [self._lately[1], running]
        return state, metrics | {"grad_norm": grad_norm}
