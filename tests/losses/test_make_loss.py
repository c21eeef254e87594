"""What recipe.loss may say: hyperparameters, sums of losses, and what is put around them; and the answer to every mistake."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_pairs import default_state, double, mean_loss, random_pairs, slopes_of, values_of
from oracles import losses as oracle

from repo_jax.losses import CHOICES, LOSSES, OPTIONS, RANGES, hyperparameters, make_loss
from repo_jax.metrics import preference_metrics

GIVEN = random_pairs(0, n=12)


def made(loss_type, given=GIVEN, own=None, **options):
    """Values in float64."""
    with double():
        loss, hparams = make_loss(loss_type, **options)
        own = {"state": default_state(loss)} | (own or {})
        return np.asarray(values_of(loss, given.pairs(jnp.float64), hparams, **own))


# The table


def test_every_hyperparameter_has_a_range_and_a_default_inside_it():
    for kind, loss in LOSSES.items():
        for name, default in hyperparameters(loss).items():
            if name in CHOICES:
                assert default in CHOICES[name]
            else:
                lowest, below, _ = RANGES.get(f"{kind}.{name}", RANGES[name])
                assert lowest <= default < below


def test_ranges_choices_and_options_are_all_in_use():
    taken = {name for loss in LOSSES.values() for name in hyperparameters(loss)} | set(OPTIONS)
    assert {name.split(".")[-1] for name in RANGES} | set(CHOICES) <= taken


def test_every_loss_cites_its_paper():
    for name, loss in LOSSES.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}", inspect.getdoc(loss.fn)), name


def test_defaults_are_filled_in_and_numbers_become_floats():
    assert make_loss()[0] is LOSSES["repo"]
    assert make_loss("simpo", beta=10)[1] == {"beta": 10.0, "gamma": 0.25, "label_smoothing": 0.0}
    assert make_loss("ipo", log_ratios="sum")[1] == {"beta": 0.1, "log_ratios": "sum"}
    assert all(type(value) in (float, str) for name in LOSSES for value in make_loss(name)[1].values())


def test_what_it_returns_may_be_given_back():
    """So that a recipe with every default written out reads as the same loss."""
    given = {
        "loss_type": ["repo", "cdpo"],
        "loss_weights": [1, 2],
        "gamma_end": 0.1,
        "sft_weight": 0.1,
        "lcpo_alpha": 0.2,
    }
    hparams = make_loss(**given)[1]
    assert make_loss(**(given | hparams))[1] == hparams
    for name in LOSSES:
        assert make_loss(name, **make_loss(name)[1])[1] == make_loss(name)[1]


# Sums


def test_losses_are_summed_with_their_weights_and_share_hyperparameters():
    weighted = made(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.2)
    parts = 0.8 * made("dpo", beta=0.2) + 0.2 * made("bco_pair", beta=0.2) + made("sft")
    np.testing.assert_allclose(weighted, parts, rtol=1e-12)
    np.testing.assert_allclose(made(["repo", "dpo"]), made("repo") + made("dpo"), rtol=1e-12)


def test_a_sum_needs_what_its_losses_need():
    loss, hparams = make_loss(["repo", "tdpo2", "osp", "aot"], beta=0.1)
    assert (loss.reference, loss.columns, loss.terms, loss.coupled) == (True, ("label_prob",), ("kl_reference",), True)
    assert hparams == {"gamma": 0.5, "beta": 0.1, "alpha": 0.5, "label_smoothing": 0.0}
    assert not make_loss(["repo", "simpo"], gamma=0.3)[0].reference
    assert make_loss(["kto", "bco"])[0].layout == "answers"


def test_the_states_of_summed_losses_stay_apart():
    loss, hparams = make_loss(["alpha_dpo", "lcpo", "repo"], gamma=0.4, beta=1.0)
    out = loss(GIVEN.pairs(), state=loss.initial_state(), **hparams)
    assert set(out.state) == {"alpha_dpo", "lcpo"}
    for name in out.state:
        one, own = make_loss(name, beta=1.0)
        wanted = one(GIVEN.pairs(), state=one.initial_state(), **own).state
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out.state[name], wanted)
    assert "label_confidence" in out.metrics


# gamma


@pytest.mark.parametrize(
    "schedule, at_start, at_half, at_end",
    [("linear", 1.0, 0.6, 0.2), ("cosine", 1.0, 0.6, 0.2)],
)
def test_gamma_goes_from_its_first_value_to_its_last(schedule, at_start, at_half, at_end):
    loss, hparams = make_loss("repo", gamma=1.0, gamma_end=0.2, gamma_schedule=schedule)
    assert hparams == {"gamma": 1.0, "gamma_end": 0.2}
    for progress, gamma in ((0.0, at_start), (0.5, at_half), (1.0, at_end)):
        out = loss(GIVEN.pairs(), progress=jnp.float32(progress), **hparams)
        np.testing.assert_allclose(
            out.values, values_of(LOSSES["repo"], GIVEN.pairs(), {"gamma": gamma}), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(out.metrics["gamma"], gamma, rtol=1e-6)
    quarter = loss(GIVEN.pairs(), progress=0.25, **hparams).metrics["gamma"]
    np.testing.assert_allclose(
        quarter, 0.8 if schedule == "linear" else 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), rtol=1e-6
    )


def test_a_constant_schedule_is_none_and_linear_is_the_default():
    assert make_loss("repo", gamma_schedule="constant")[0] is LOSSES["repo"]
    own = {"progress": 0.25}
    np.testing.assert_array_equal(
        made("repo", gamma_end=0.1, own=own), made("repo", gamma_end=0.1, gamma_schedule="linear", own=own)
    )


def test_each_pair_has_its_own_gamma_in_a_column():
    loss, hparams = make_loss("repo", gamma_column="margin")
    assert (hparams, loss.columns) == ({}, ("margin",))
    got = made("simpo", gamma_column="margin", beta=2.0)
    wanted = [oracle.cost(2 * (m - g)) for m, g in zip(margins(), GIVEN.columns["margin"], strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def margins():
    p = GIVEN.for_oracle
    return [p.margin(i) for i in range(len(p))]


# Around a loss


def test_weights_multiply_values_and_are_not_divided_by_their_sum():
    weights = GIVEN.columns["weight"]
    assert make_loss("osp", weight_column="weight")[0].columns == ("label_prob", "weight")
    np.testing.assert_allclose(made("dpo", weight_column="weight"), weights * made("dpo"), rtol=1e-12)
    np.testing.assert_allclose(made("kto", weight_column="weight"), weights[:, None] * made("kto"), rtol=1e-12)


def test_trls_weighting_multiplies_values_by_how_likely_the_policy_would_write_them():
    loss, _ = make_loss("ipo", use_weighting=True)
    assert loss.terms == ("log_sum_p2",)
    assert make_loss("ipo", use_weighting=False)[0] is LOSSES["ipo"]
    wanted = [oracle.wpo_weight(GIVEN.for_oracle, i) for i in range(12)]
    np.testing.assert_allclose(made("ipo", use_weighting=True), wanted * made("ipo"), rtol=1e-9)


@pytest.mark.parametrize("average", ["tokens", "answers"])
@pytest.mark.parametrize("name", ["repo", "kto"])
def test_sft_weight_adds_the_mean_over_tokens_or_answers(name, average):
    given = random_pairs(1, n=9, single=name == "kto").with_absent((0, 4))
    loss, hparams = make_loss(name, sft_weight=0.3, sft_average=average)
    assert hparams["sft_weight"] == 0.3 and loss.coupled == LOSSES[name].coupled
    s, n = given.logps[:, 0], given.lengths[:, 0]
    s, n = s[n > 0], n[n > 0]
    nll = -s.sum() / n.sum() if average == "tokens" else -(s / n).mean()
    with double():
        pairs = given.pairs(jnp.float64)
        plain = mean_loss(LOSSES[name], pairs, make_loss(name)[1])
        got = float(mean_loss(loss, pairs, hparams))
    np.testing.assert_allclose(got, float(plain) + 0.3 * nll, rtol=1e-9)


def test_sft_weight_reaches_pairs_that_repo_leaves_alone():
    loss, hparams = make_loss("repo", gamma=-50, sft_weight=1)
    slopes_B2 = slopes_of(loss, GIVEN.pairs(), hparams).logps_B2
    assert (slopes_B2[:, 0] < 0).all() and (slopes_B2[:, 1] == 0).all()


EM = {
    "repo": {"gamma": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.25},
    "ipo": {"beta": 0.5, "log_ratios": "mean"},
    "osp": {"beta": 0.1},
}


@pytest.mark.parametrize("name", EM)
def test_label_confidence_goes_around_any_loss_of_pairs(name):
    """Values, slopes with w held constant, and the state, in float64."""
    with double():
        loss, hparams = make_loss(name, lcpo_alpha=0.2, lcpo_eta=0.7, **EM[name])
        assert loss.coupled
        pairs, state = GIVEN.pairs(jnp.float64), (({"eta": jnp.asarray(0.7)}), None)
        out = loss(pairs, state=state, **hparams)
        slopes_B2 = np.asarray(slopes_of(loss, pairs, hparams, state=state).logps_B2)
    p = GIVEN.for_oracle

    def em(q):
        return oracle.in_doubt(getattr(oracle, name), q, p, {"eta": 0.7}, 0.2, **EM[name])

    np.testing.assert_allclose(out.values, em(p)[0], rtol=1e-9)
    np.testing.assert_allclose(out.state[0]["eta"], em(p)[1]["eta"], rtol=1e-9)
    np.testing.assert_allclose(slopes_B2, oracle.slopes(lambda q: math.fsum(em(q)[0]), p), rtol=1e-5, atol=1e-8)


def test_label_confidence_keeps_the_state_of_the_loss_inside():
    loss, hparams = make_loss("alpha_dpo", lcpo_alpha=0.2)
    state = loss.initial_state()
    inner = LOSSES["alpha_dpo"](GIVEN.pairs(), state=state[1], **make_loss("alpha_dpo")[1]).state
    after = loss(GIVEN.pairs(), state=state, **hparams).state
    np.testing.assert_allclose(after[1]["mean"], inner["mean"], rtol=1e-6)


def test_reward_scale_multiplies_what_is_logged_and_changes_no_value():
    hparams = make_loss("repo", gamma=0.3, reward_scale=2.5)[1]
    assert hparams == {"gamma": 0.3, "reward_scale": 2.5}
    np.testing.assert_array_equal(made("repo", gamma=0.3, reward_scale=2.5), made("repo", gamma=0.3))
    pairs = GIVEN.pairs()
    plain, scaled = (preference_metrics(pairs, pairs, given) for given in ({"gamma": 0.3}, hparams))
    for name in plain:
        factor = 2.5 if name in ("rewards/chosen", "rewards/rejected", "rewards/margins") else 1
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-6)


def test_everything_at_once_is_the_sum_of_what_it_is_made_of():
    options = {
        "gamma_end": 0.1,
        "weight_column": "weight",
        "use_weighting": True,
        "sft_weight": 0.2,
        "sft_average": "answers",
    }
    own = {"progress": 1.0}
    got = made(["repo", "dpo"], loss_weights=[1.0, 0.5], **options, own=own)
    base = made("repo", gamma=0.1) + 0.5 * made("dpo")
    wpo = np.array([oracle.wpo_weight(GIVEN.for_oracle, i) for i in range(12)])
    nll = -GIVEN.logps[:, 0] / GIVEN.lengths[:, 0]
    np.testing.assert_allclose(got, base * GIVEN.columns["weight"] * wpo + 0.2 * nll, rtol=1e-9)


@pytest.mark.parametrize(
    "given", [{"gamma_end": 0.1}, {"gamma_column": "margin"}, {"lcpo_alpha": 0.1}, {"weight_column": "weight"}, {"use_weighting": True}, {"sft_weight": 0.1}]
)  # fmt: skip
def test_what_goes_around_a_loss_passes_on_what_the_step_passes(given):
    loss, hparams = make_loss("alpha_dpo", **given)
    assert {"progress", "training", "state"} <= set(inspect.signature(loss.fn).parameters)
    pairs, state = GIVEN.pairs(), default_state(loss)
    for training in (True, False):
        out = jax.jit(lambda state, t=training: loss(pairs, state=state, progress=0.5, training=t, **hparams))(state)
        moved = any(
            (one != other).any() for one, other in zip(jax.tree.leaves(out.state), jax.tree.leaves(state), strict=True)
        )
        assert moved == (training or "lcpo_alpha" in given)


# Mistakes


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss_type": "sipmo"}, "unknown loss_type 'sipmo'; did you mean 'simpo'? `repo-jax losses` lists what there is"),
        ({"loss_type": "?"}, "unknown loss_type '?'; `repo-jax losses` lists what there is"),
        ({"loss_type": 3}, "unknown loss_type 3; `repo-jax losses` lists what there is"),
        ({"loss_type": ["dpo", "sftt"]}, "unknown loss_type 'sftt'; did you mean 'sft'? `repo-jax losses` lists what there is"),
        ({"loss_type": []}, "loss_type=[] names no loss; give one or several"),
        ({"loss_type": "repo", "beta": 2.5}, "loss 'repo' has no hyperparameter 'beta'; it takes gamma"),
        ({"loss_type": "rrhf", "beta": 2.5}, "loss 'rrhf' has no hyperparameter 'beta'; it takes none"),
        ({"loss_type": "simpo", "gama": 1.0}, "loss 'simpo' has no hyperparameter 'gama'; it takes beta, gamma, label_smoothing"),
        ({"loss_type": "dpo", "label_smoothing": 0.1}, "loss 'dpo' has no hyperparameter 'label_smoothing'; it takes beta"),
        ({"loss_type": "simpo", "beta": 0}, "loss 'simpo': beta=0 must be a number above 0"),
        ({"gamma": "half"}, "loss 'repo': gamma='half' must be a number, in nats per token"),
        ({"gamma": math.nan}, "loss 'repo': gamma=nan must be a number, in nats per token"),
        ({"gamma": True}, "loss 'repo': gamma=True must be a number, in nats per token"),
        ({"loss_type": "simpo", "label_smoothing": 0.5}, "loss 'simpo': label_smoothing=0.5 must be a number from 0 to below 0.5"),
        ({"loss_type": "exo_pair", "label_smoothing": 0}, "loss 'exo_pair': label_smoothing=0 must be a number above 0 and below 0.5"),
        ({"loss_type": ["exo_pair", "robust"], "label_smoothing": 0}, "loss 'exo_pair + robust': label_smoothing=0 must be a number above 0 and below 0.5"),
        ({"loss_type": "ipo", "log_ratios": "median"}, "loss 'ipo': log_ratios='median'; choose one of mean, sum"),
        ({"loss_type": "beta_dpo", "keep": 1.5}, "loss 'beta_dpo': keep=1.5 must be a number above 0, at most 1"),
        ({"loss_type": ["robust", "nca_pair"]}, "loss 'robust + nca_pair' needs beta: its default is 0.1 for robust, 0.01 for nca_pair"),
        ({"loss_type": ["dpo", "hinge"], "loss_weights": [1]}, "loss 'dpo + hinge': loss_weights=[1] must be 2 numbers"),
        ({"loss_type": ["dpo", "hinge"], "loss_weights": 1}, "loss 'dpo + hinge': loss_weights=1 must be 2 numbers"),
        ({"loss_type": ["dpo", "dpo"]}, "loss 'dpo + dpo' has one name twice; add up its loss_weights"),
        ({"loss_type": "dpo", "loss_weights": [1]}, "loss 'dpo' is one, so that nothing would read loss_weights; leave it out"),
        (
            {"loss_type": ["dpo", "kto"]},
            "loss 'dpo + kto' adds values of pairs to values of answers (dpo of pairs, kto of answers); take losses of one kind",
        ),
        ({"loss_type": "dpo", "gamma_end": 1}, "loss 'dpo' has no gamma, so that nothing would read gamma_end; leave it out"),
        ({"gamma_schedule": "cosine"}, "loss 'repo': gamma_schedule=cosine needs gamma_end, where gamma shall go"),
        ({"gamma_schedule": "constant", "gamma_end": 1}, "loss 'repo': gamma_schedule=constant would not read gamma_end; leave one out"),
        ({"gamma_schedule": "cos", "gamma_end": 1}, "loss 'repo': gamma_schedule='cos'; choose one of constant, linear, cosine"),
        ({"gamma_end": "low"}, "loss 'repo': gamma_end='low' must be a number, in nats per token"),
        ({"gamma_column": "margin", "gamma": 1}, "loss 'repo': gamma_column and gamma both say what gamma is; leave one out"),
        ({"gamma_column": "margin", "gamma_end": 1}, "loss 'repo': gamma_column and gamma_end both say what gamma is; leave one out"),
        ({"gamma_column": 3}, "loss 'repo': gamma_column=3 must be the name of a column"),
        ({"weight_column": 3}, "loss 'repo': weight_column=3 must be the name of a column"),
        ({"use_weighting": "yes"}, "loss 'repo': use_weighting='yes' must be true or false"),
        ({"loss_type": "aot", "use_weighting": True}, "loss 'aot' has no value of each pair by itself, which use_weighting would read; leave it out"),
        ({"loss_type": "aot", "lcpo_alpha": 0.1}, "loss 'aot' has no value of each pair by itself, which lcpo_alpha would read; leave it out"),
        ({"loss_type": "aot", "weight_column": "weight"}, "loss 'aot' has no value of each pair by itself, which weight_column would read; leave it out"),
        ({"loss_type": "kto", "use_weighting": True}, "loss 'kto' has no value of each pair by itself, which use_weighting would read; leave it out"),
        ({"sft_weight": -1}, "loss 'repo': sft_weight=-1 must be a number, 0 or more"),
        ({"sft_weight": 1, "sft_average": "pairs"}, "loss 'repo': sft_average='pairs'; choose one of tokens, answers"),
        ({"sft_average": "tokens"}, "loss 'repo': sft_average is given without sft_weight, so that nothing would read it"),
        ({"loss_type": "sft", "sft_weight": 1}, "loss 'sft' has the term of sft_weight already; give its share in loss_weights"),
        ({"reward_scale": 0}, "loss 'repo': reward_scale=0 must be a number above 0"),
        ({"loss_type": "simpo", "reward_scale": 2}, "loss 'simpo' has beta, which its logged rewards are times; leave reward_scale out"),
        ({"lcpo_eta": 0.9}, "loss 'repo': lcpo_eta is given without lcpo_alpha, so that nothing would read it"),
        ({"lcpo_alpha": 2}, "loss 'repo': lcpo_alpha=2 must be a number from 0 to 1"),
        ({"lcpo_alpha": 0.1, "lcpo_eta": 1}, "loss 'repo': lcpo_eta=1 must be a number above 0 and below 1"),
        ({"loss_type": "kto", "lcpo_alpha": 0.1}, "loss 'kto' is of single answers, which lcpo_alpha cannot swap; leave it out"),
    ],
)  # fmt: skip
def test_make_loss_answers_a_mistake_before_any_work(given, message):
    with pytest.raises(ValueError) as error:
        make_loss(**given)
    assert str(error.value) == message
