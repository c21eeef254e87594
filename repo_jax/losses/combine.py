"""Losses made of losses. Each takes a Loss and gives one, whose hyperparameters are those of the first and its own.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from repo_jax.losses.batch import in_doubt, label_confidence
from repo_jax.losses.parts import chosen_nll
from repo_jax.losses.types import Loss, LossOut, PairLogps, as_float
from repo_jax.losses.with_reference import wpo_weights

# gamma at a share of the updates, of its first and last value.
SCHEDULES = {
    "constant": lambda first, last, progress: first,
    "linear": lambda first, last, progress: first + (last - first) * progress,
    "cosine": lambda first, last, progress: last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}


def with_schedule(loss: Loss, schedule: str) -> Loss:
    """gamma goes from `gamma` to `gamma_end` while it trains. arXiv:2503.07426, section 5.5: 1.0 to 0.2 did best.

    In evaluation it is where training is.
    """

    def fn(pairs, *, gamma, gamma_end, state=None, progress=0.0, training=True, **hparams):
        now = SCHEDULES[schedule](gamma, gamma_end, progress)
        out = loss(pairs, gamma=now, state=state, progress=progress, training=training, **hparams)
        return out._replace(metrics={**out.metrics, "gamma": jnp.asarray(now)})

    return loss._replace(fn=fn)


def with_gamma_column(loss: Loss, column: str) -> Loss:
    """Each pair's gamma is in a column of the data."""

    def fn(pairs, *, state=None, progress=0.0, training=True, **hparams):
        gamma_B = as_float(pairs.columns[column])
        return loss(pairs, gamma=gamma_B, state=state, progress=progress, training=training, **hparams)

    return loss._replace(fn=fn, columns=_also(loss.columns, column))


def with_label_confidence(loss: Loss, eta: float) -> Loss:
    """LCPO around any loss of pairs: see lcpo. Its state is (eta, that of the loss), the latter without swaps."""

    def fn(pairs, *, lcpo_alpha, state, progress=0.0, training=True, **hparams):
        own, inner = state
        kept = {"state": inner, "progress": progress, "training": training}
        out, other = loss(pairs, **kept, **hparams), loss(pairs.swapped, **kept, **hparams)
        doubted = in_doubt(out.values, other.values, pairs.there_B, own, lcpo_alpha)
        return LossOut(doubted.values, (doubted.state, out.state), {**out.metrics, **doubted.metrics})

    inner = loss.initial_state or (lambda: None)
    return loss._replace(fn=fn, coupled=True, initial_state=lambda: (label_confidence(eta), inner()))


def with_weights(loss: Loss, column: str) -> Loss:
    """Values count for what a column of the data says. They are not divided by the weights' sum."""

    def fn(pairs, *, state=None, progress=0.0, training=True, **hparams):
        out = loss(pairs, state=state, progress=progress, training=training, **hparams)
        weights_B = as_float(pairs.columns[column])
        return out._replace(values=out.values * (weights_B if out.values.ndim == 1 else weights_B[:, None]))

    return loss._replace(fn=fn, columns=_also(loss.columns, column))


def with_wpo_weights(loss: Loss) -> Loss:
    """Pairs count for how likely the policy would write them, as TRL's use_weighting: see wpo."""

    def fn(pairs, *, state=None, progress=0.0, training=True, **hparams):
        out = loss(pairs, state=state, progress=progress, training=training, **hparams)
        return out._replace(values=out.values * wpo_weights(pairs))

    return loss._replace(fn=fn, terms=_also(loss.terms, "log_sum_p2"))


def with_sft(loss: Loss, average: str) -> Loss:
    """The mean loss + sft_weight * the chosen answers' mean negative log-prob, per token of the batch or of each answer: see chosen_nll."""

    def fn(pairs, *, sft_weight, state=None, progress=0.0, training=True, **hparams):
        out = loss(pairs, state=state, progress=progress, training=training, **hparams)
        return out._replace(values=out.values + sft_weight * _nll_like(out.values, pairs, average))

    return loss._replace(fn=fn)


def with_reward_scale(loss: Loss) -> Loss:
    """What is logged as rewards is times `reward_scale` (metrics.py); the loss itself does not look at it."""

    def fn(pairs, *, reward_scale, state=None, progress=0.0, training=True, **hparams):
        return loss(pairs, state=state, progress=progress, training=training, **hparams)

    return loss._replace(fn=fn)


def _nll_like(values, pairs: PairLogps, average: str):
    """The negative log-prob so laid out that its mean is the same among values per pair and per answer."""
    if values.ndim == 1:
        return chosen_nll(pairs, average=average)
    chosen_B = pairs.there_B2[:, 0]
    among = jnp.sum(pairs.there_B2) / jnp.maximum(jnp.sum(chosen_B), 1)
    nll_B = chosen_nll(pairs, average=average, there_B=chosen_B)
    return jnp.stack([among * nll_B, jnp.zeros_like(nll_B)], axis=1)


def sum_of(losses: Mapping[str, Loss], weights: Sequence[float], takes: Mapping[str, Sequence[str]]) -> Loss:
    """The weighted sum of losses of answers, or of losses of pairs and chosen answers; `takes` names the hyperparameters of each. The state is a dict of those that have one."""
    stateful = {name: loss.initial_state for name, loss in losses.items() if loss.initial_state is not None}

    def fn(pairs, *, state=None, progress=0.0, training=True, **hparams):
        outs = {
            name: loss(
                pairs,
                state=state[name] if name in stateful else None,
                progress=progress,
                training=training,
                **{key: hparams[key] for key in takes[name] if key in hparams},
            )
            for name, loss in losses.items()
        }
        values = sum(weight * out.values for weight, out in zip(weights, outs.values(), strict=True))
        merged = {key: value for out in outs.values() for key, value in out.metrics.items()}
        return LossOut(values, {name: outs[name].state for name in stateful} or None, merged)

    def every(field):
        return tuple(dict.fromkeys(one for loss in losses.values() for one in getattr(loss, field)))

    gammas = [loss.margin_gamma for name, loss in losses.items() if "gamma" in takes[name]]
    lists = {field: every(field) for field in ("columns", "answer_columns", "terms", "groups", "data")}
    return Loss(
        fn,
        reference=any(loss.reference for loss in losses.values()),
        coupled=any(loss.coupled for loss in losses.values()),
        initial_state=functools.partial(_initial, stateful) if stateful else None,
        layout=next((loss.layout for loss in losses.values() if loss.layout != "chosen"), "chosen"),
        margin_gamma=bool(gammas) and all(gammas),
        **lists,
    )


def _initial(stateful: dict) -> dict:
    return {name: initial() for name, initial in stateful.items()}


def _also(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return names if name in names else (*names, name)
