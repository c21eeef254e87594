"""The objectives: pure functions of log-probs, and one table that lists them."""

import difflib
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from repo_jax.losses import batch, combine, reference_free, unpaired, with_reference
from repo_jax.losses.reference_free import repo, simpo
from repo_jax.losses.types import PASSED, Loss, LossOut, PairLogps
from repo_jax.losses.with_reference import dpo

__all__ = [
    "ALIASES",
    "CHOICES",
    "DEFAULT_LOSS",
    "LOSSES",
    "OPTIONS",
    "RANGES",
    "Loss",
    "LossOut",
    "PairLogps",
    "dpo",
    "hyperparameters",
    "make_loss",
    "repo",
    "simpo",
    "title_of",
]

free, ref = reference_free, with_reference
referred = functools.partial(Loss, reference=True)
LOSSES = {
    # loss_type           function
    # Reference-free
    "repo":               Loss(free.repo, margin_gamma=True, vouched="paper's code"),
    "repo++":             Loss(free.repo_pp, margin_gamma=True, vouched="paper"),
    "simpo":              Loss(free.simpo, margin_gamma=True, vouched="TRL"),
    "simpo_hinge":        Loss(free.simpo_hinge, margin_gamma=True, vouched="paper's code"),
    "cpo":                Loss(free.cpo, vouched="TRL"),
    "cpo_simpo":          Loss(free.cpo_simpo, margin_gamma=True, vouched="TRL"),
    "orpo":               Loss(free.orpo, vouched="TRL"),
    "alphapo":            Loss(free.alphapo, vouched="TRL"),
    "slic":               Loss(free.slic, vouched="other code"),
    "rrhf":               Loss(free.rrhf, vouched="other code"),
    "sft":                Loss(free.sft, layout="chosen", vouched="TRL"),
    # With reference
    "dpo":                referred(ref.dpo, vouched="TRL"),
    "cdpo":               referred(ref.cdpo, vouched="paper's code"),
    "robust":             referred(ref.robust, vouched="TRL"),
    "ipo":                referred(ref.ipo, vouched="TRL"),
    "hinge":              referred(ref.dpo_hinge, vouched="TRL"),
    "rso_sigmoid_norm":   referred(ref.rso_sigmoid_norm),
    "rso_hinge_norm":     referred(ref.rso_hinge_norm, vouched="TRL"),
    "dpo_norm":           referred(ref.dpo_norm, vouched="TRL"),
    "repo++_dpo":         referred(ref.repo_pp_dpo, vouched="paper"),
    "r_dpo":              referred(ref.r_dpo, vouched="other code"),
    "rpo":                referred(ref.rpo, vouched="TRL"),
    "discopop":           referred(ref.discopop, vouched="TRL"),
    "exo_pair":           referred(ref.exo_pair, vouched="TRL"),
    "nca_pair":           referred(ref.nca_pair, vouched="TRL"),
    "bco_pair":           referred(ref.bco_pair, vouched="TRL"),
    "apo_zero":           referred(ref.apo_zero, vouched="TRL"),
    "apo_down":           referred(ref.apo_down, vouched="TRL"),
    "sppo_hard":          referred(ref.sppo_hard, vouched="TRL"),
    "sppo":               referred(ref.sppo, answer_columns=("win_probability",), vouched="paper's code"),
    "inpo":               referred(ref.inpo, answer_columns=("previous_logps",), vouched="paper"),
    "bpo":                referred(ref.bpo, vouched="paper's code"),
    "dpop":               referred(ref.dpop, vouched="other code"),
    "cal_dpo":            referred(ref.cal_dpo, vouched="other code"),
    "osp":                referred(ref.osp, columns=("label_prob",)),
    "smpo":               referred(ref.smpo, columns=("label_prob",), vouched="paper's code"),
    "pessimistic_dpo":    referred(ref.pessimistic_dpo, answer_columns=("uncertainty",)),
    "tempered_dpo":       referred(ref.tempered_dpo, answer_columns=("uncertainty",)),
    "ld_dpo":             referred(ref.ld_dpo, data=("ld_alpha",), vouched="TRL"),
    "poet":               referred(ref.poet, data=("use_poet",)),
    "d2po":               referred(ref.d2po, data=("temporal_decay",), vouched="paper's code"),
    "wpo":                referred(ref.wpo, terms=("log_sum_p2",), vouched="paper's code"),
    "tdpo1":              referred(ref.tdpo1, terms=("kl_reference",), vouched="paper's code"),
    "tdpo2":              referred(ref.tdpo2, terms=("kl_reference",), vouched="paper's code"),
    "rationale_dpo":      referred(ref.rationale_dpo, groups=("rationale",), vouched="paper's code"),
    # Of the whole batch, or with a running state
    "amapo":              Loss(batch.amapo, coupled=True, vouched="paper's code"),
    "gamma_po":           Loss(batch.gamma_po, margin_gamma=True, coupled=True, vouched="paper's code"),
    "gamma_po_dpo":       referred(batch.gamma_po_dpo, coupled=True, vouched="paper's code"),
    "gamma_po_queue":     Loss(batch.gamma_po_queue, margin_gamma=True, coupled=True, initial_state=batch.gap_queue, vouched="paper's code"),
    "aot":                referred(batch.aot, coupled=True, vouched="TRL"),
    "aot_unpaired":       referred(batch.aot_unpaired, coupled=True, vouched="TRL"),
    "alpha_dpo":          referred(batch.alpha_dpo, margin_gamma=True, coupled=True, initial_state=batch.standard_statistics, vouched="paper's code"),
    "beta_dpo":           referred(batch.beta_dpo, coupled=True, initial_state=batch.random_statistics, vouched="paper's code"),
    "lcpo":               referred(batch.lcpo, coupled=True, initial_state=batch.label_confidence),
    # Of single answers
    "kto":                referred(unpaired.kto, layout="answers", groups=("kl",), coupled=True, vouched="TRL"),
    "apo_zero_unpaired":  referred(unpaired.apo_zero_unpaired, layout="answers", vouched="TRL"),
    "bco":                referred(unpaired.bco, layout="answers", coupled=True, initial_state=unpaired.reward_shift, vouched="other code"),
    "npo":                referred(unpaired.npo, layout="answers", vouched="paper's code"),
}  # fmt: skip

# Other names of the same: TRL's, and a later paper's.
ALIASES = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "ilr_dpo": "r_dpo", "re_po": "lcpo"}

LEAST = math.nextafter(0, 1)
POSITIVE, NOT_NEGATIVE = (LEAST, math.inf, "a number above 0"), (0.0, math.inf, "a number, 0 or more")
# The values a hyperparameter may have, as (lowest, below, in words); LOSS.NAME goes before NAME.
RANGES = {
    "gamma": (-math.inf, math.inf, "a number, in nats per token"),
    "gamma_end": (-math.inf, math.inf, "a number, in nats per token"),
    "repo++_dpo.gamma": (-math.inf, math.inf, "a number, in nats per answer"),
    "gamma_po_dpo.gamma": (-math.inf, math.inf, "a number, in nats per answer"),
    "alphapo.gamma": (-math.inf, math.inf, "a number, in units of u"),
    "beta": POSITIVE,
    "label_smoothing": (0.0, 0.5, "a number from 0 to below 0.5"),
    "exo_pair.label_smoothing": (LEAST, 0.5, "a number above 0 and below 0.5"),
    "alpha": (-math.inf, math.inf, "a number"),
    "cpo_alpha": NOT_NEGATIVE,
    "rpo_alpha": NOT_NEGATIVE,
    "delta": NOT_NEGATIVE,
    "slic_lambda": NOT_NEGATIVE,
    "dpop_lambda": NOT_NEGATIVE,
    "discopop_tau": POSITIVE,
    "balance_factor": NOT_NEGATIVE,
    "eta": POSITIVE,
    "tau": POSITIVE,
    "rationale_gamma": NOT_NEGATIVE,
    "keep": (LEAST, 1.0 + 1e-9, "a number above 0, at most 1"),
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    "retain_weight": NOT_NEGATIVE,
    "sft_weight": NOT_NEGATIVE,
    "lcpo_alpha": (0.0, 1.0 + 1e-9, "a number from 0 to 1"),
    "lcpo_eta": (LEAST, 1.0, "a number above 0 and below 1"),
    "reward_scale": POSITIVE,
}
# Hyperparameters that are texts, and what they may say.
CHOICES = {
    "log_ratios": ("mean", "sum"),
    "variant": ("code", "paper"),
    "link": ("logistic", "hinge", "square", "exponential"),
    "anchor": ("running", "balanced", "batch"),
    "sft_average": ("tokens", "answers"),
    "gamma_schedule": tuple(combine.SCHEDULES),
}

# What may be given beside a loss's own hyperparameters, and what of it.
OPTIONS = {
    "loss_weights": "of the losses where loss_type is a list",
    "gamma_end": "gamma goes from gamma to this while it trains",
    "gamma_schedule": f"how gamma goes to gamma_end: {', '.join(CHOICES['gamma_schedule'])}",
    "gamma_column": "column of the data with each pair's gamma",
    "lcpo_alpha": "estimate with this step how likely each label is right, and train by that (LCPO)",
    "lcpo_eta": "how likely labels are right, at first",
    "weight_column": "column of the data that says what each pair counts for",
    "use_weighting": "pairs count for how likely the policy would write them (WPO)",
    "sft_weight": "adds so much of the negative log-prob of the chosen answers",
    "sft_average": "over which that is a mean: the batch's tokens, or those of each answer and then the answers",
    "reward_scale": "logged rewards are times this where the objective has no beta; training does not read it",
}

DEFAULT_LOSS = "repo"


def title_of(loss_type: str | Sequence[str]) -> str:
    """What people call the objective: one name, or several that are summed."""
    return loss_type if isinstance(loss_type, str) else " + ".join(map(str, loss_type))


def hyperparameters(loss: Loss) -> dict[str, float | str]:
    """The hyperparameters a loss takes, with their defaults; a text chooses between forms."""
    parameters = inspect.signature(loss.fn).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in PASSED}


def make_loss(loss_type: str | Sequence[str] = DEFAULT_LOSS, **given: Any) -> tuple[Loss, dict[str, float | str]]:
    """The loss of that name and its hyperparameters, defaults filled in. `given` are hyperparameters, and OPTIONS.

    Several names are summed, each times its loss_weights; hyperparameters of one name are one. Options apply from the inside out in the
    order that OPTIONS has. Names and ranges are checked now, so that a misspelt or unused one fails before any device work.
    """
    several = isinstance(loss_type, list | tuple)
    names = list(loss_type) if several else [loss_type]
    if not names:
        raise ValueError(f"loss_type={loss_type!r} names no loss; give one or several")
    losses = {str(name): _named(name) for name in names}
    title = title_of(names)
    accepted = _together(losses, given)
    options = {name: given[name] for name in OPTIONS if name in given and name not in accepted}
    for name in given:
        if name not in accepted and name not in options:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"loss '{title}' has no hyperparameter '{name}'; {takes}")
    weights = _weights(names, options.pop("loss_weights", None), title)
    hparams = accepted | {name: _checked(name, given[name], title) for name in given if name in accepted}
    if several:
        loss = combine.sum_of(losses, weights, {name: list(hyperparameters(loss)) for name, loss in losses.items()})
    else:
        loss = losses[loss_type]
    loss, hparams = _with_gamma(loss, hparams, given, options, title)
    loss, hparams = _in_doubt(loss, names, hparams, options, title)
    if (column := options.get("weight_column")) is not None:
        _in_place(names, "weight_column", title)
        loss = combine.with_weights(loss, _column("weight_column", column, title))
    if "use_weighting" in options:
        if not isinstance(options["use_weighting"], bool):
            raise ValueError(f"loss '{title}': use_weighting={options['use_weighting']!r} must be true or false")
        if options["use_weighting"]:
            _in_place(names, "use_weighting", title, layouts=("pairs",))
            loss = combine.with_wpo_weights(loss)
    if "sft_weight" in options:
        average = _checked("sft_average", given.get("sft_average", "tokens"), title)
        if "sft" in names:
            raise ValueError(f"loss '{title}' has the term of sft_weight already; give its share in loss_weights")
        loss = combine.with_sft(loss, average)
        hparams["sft_weight"] = _checked("sft_weight", options["sft_weight"], title)
    elif "sft_average" in options:
        raise ValueError(f"loss '{title}': sft_average is given without sft_weight, so that nothing would read it")
    if "reward_scale" in options:
        if "beta" in hparams:
            raise ValueError(f"loss '{title}' has beta, which its logged rewards are times; leave reward_scale out")
        loss = combine.with_reward_scale(loss)
        hparams["reward_scale"] = _checked("reward_scale", options["reward_scale"], title)
    return loss, hparams


def _named(name: Any) -> Loss:
    loss = LOSSES.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if loss is None:
        close = difflib.get_close_matches(str(name), [*LOSSES, *ALIASES], n=1)
        nearest = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"unknown loss_type {name!r}; {nearest}`repo-jax losses` lists what there is")
    return loss


def _together(losses: Mapping[str, Loss], given: Mapping) -> dict[str, float | str]:
    """The hyperparameters of all, with their defaults. Raises ValueError where defaults differ and nothing is given."""
    accepted = {}
    for loss in losses.values():
        for key, default in hyperparameters(loss).items():
            if accepted.setdefault(key, default) != default and key not in given:
                takers = [
                    f"{hyperparameters(one)[key]} for {kind}"
                    for kind, one in losses.items()
                    if key in hyperparameters(one)
                ]
                raise ValueError(f"loss '{' + '.join(losses)}' needs {key}: its default is {', '.join(takers)}")
    return accepted


def _weights(names: list[str], weights: Any, title: str) -> list[float]:
    if weights is None:
        weights = [1.0] * len(names)
    elif len(names) == 1:
        raise ValueError(f"loss '{title}' is one, so that nothing would read loss_weights; leave it out")
    numbers = isinstance(weights, list | tuple) and all(map(_is_number, weights))
    if not numbers or len(weights) != len(names):
        raise ValueError(f"loss '{title}': loss_weights={weights!r} must be {len(names)} numbers")
    if len(set(names)) < len(names):
        raise ValueError(f"loss '{title}' has one name twice; add up its loss_weights")
    layouts = {name: _named(name).layout for name in names}
    if set(layouts.values()) > {"answers"}:
        kinds = ", ".join(f"{name} of {layout}" for name, layout in layouts.items())
        raise ValueError(f"loss '{title}' adds values of pairs to values of answers ({kinds}); take losses of one kind")
    return [float(weight) for weight in weights]


def _with_gamma(loss: Loss, hparams: dict, given: Mapping, options: dict, title: str) -> tuple[Loss, dict]:
    asked = [name for name in ("gamma_end", "gamma_schedule", "gamma_column") if name in options]
    if not asked:
        return loss, hparams
    if "gamma" not in hparams:
        raise ValueError(f"loss '{title}' has no gamma, so that nothing would read {asked[0]}; leave it out")
    if "gamma_column" in options:
        if len(asked) > 1 or "gamma" in given:
            other = "gamma" if "gamma" in given else asked[0]
            raise ValueError(f"loss '{title}': gamma_column and {other} both say what gamma is; leave one out")
        column = _column("gamma_column", options["gamma_column"], title)
        return combine.with_gamma_column(loss, column), {k: v for k, v in hparams.items() if k != "gamma"}
    schedule = _checked("gamma_schedule", options.get("gamma_schedule", "linear"), title)
    if schedule == "constant" and "gamma_end" in options:
        raise ValueError(f"loss '{title}': gamma_schedule=constant would not read gamma_end; leave one out")
    if schedule == "constant":
        return loss, hparams
    if "gamma_end" not in options:
        raise ValueError(f"loss '{title}': gamma_schedule={schedule} needs gamma_end, where gamma shall go")
    end = _checked("gamma_end", options["gamma_end"], title)
    return combine.with_schedule(loss, schedule), hparams | {"gamma_end": end}


def _in_doubt(loss: Loss, names: list[str], hparams: dict, options: dict, title: str) -> tuple[Loss, dict]:
    eta = _checked("lcpo_eta", options.get("lcpo_eta", 0.9), title)
    if "lcpo_alpha" in options:
        if loss.layout != "pairs":
            raise ValueError(f"loss '{title}' is of single answers, which lcpo_alpha cannot swap; leave it out")
        _in_place(names, "lcpo_alpha", title)
        alpha = _checked("lcpo_alpha", options["lcpo_alpha"], title)
        return combine.with_label_confidence(loss, eta), hparams | {"lcpo_alpha": alpha}
    if "lcpo_eta" not in options:
        return loss, hparams
    if title not in ("lcpo", "re_po"):
        raise ValueError(f"loss '{title}': lcpo_eta is given without lcpo_alpha, so that nothing would read it")
    return loss._replace(initial_state=functools.partial(batch.label_confidence, eta)), hparams


def _in_place(
    names: list[str], option: str, title: str, layouts: tuple[str, ...] = ("pairs", "answers", "chosen")
) -> None:
    sorts = any(_named(name).fn in (batch.aot, batch.aot_unpaired) for name in names)
    if sorts or any(_named(name).layout not in layouts for name in names):
        raise ValueError(f"loss '{title}' has no value of each pair by itself, which {option} would read; leave it out")


def _column(name: str, value: Any, title: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"loss '{title}': {name}={value!r} must be the name of a column")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked(name: str, value: Any, title: str) -> float | str:
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"loss '{title}': {name}={value!r}; choose one of {', '.join(CHOICES[name])}")
        return value
    for kind in title.split(" + "):
        lowest, below, words = RANGES.get(f"{kind}.{name}", RANGES[name])
        if not _is_number(value) or not lowest <= value < below:
            raise ValueError(f"loss '{title}': {name}={value!r} must be {words}")
    return float(value)
