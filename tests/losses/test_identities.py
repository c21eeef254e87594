"""What objectives have to do with each other, and with the order of answers, of pairs and of what is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_pairs import (
    Given,
    default_state,
    double,
    every_loss,
    mean_loss,
    most,
    random_pairs,
    slopes_of,
    values_of,
)

from repo_jax.losses import LOSSES, PairLogps, hyperparameters, make_loss

LN2 = np.log(2)
PAIRS = random_pairs(3, n=12)


def values(name, given=PAIRS, **hparams):
    """In float64."""
    with double():
        loss, hparams = make_loss(name, **hparams)
        state = jax.tree.map(jnp.asarray, loss.initial_state()) if loss.initial_state else None
        return np.asarray(values_of(loss, given.pairs(jnp.float64), hparams, state=state))


def assert_same(one, other, **tolerance):
    np.testing.assert_allclose(one, other, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def test_simpo_over_beta_becomes_repo():
    assert_same(values("simpo", beta=1e4, gamma=0.3) / 1e4, values("repo", gamma=0.3), atol=1e-4)


def test_repo_pp_is_the_larger_of_simpo_and_log_2():
    assert_same(values("repo++", beta=2, gamma=0.3), np.maximum(values("simpo", beta=2, gamma=0.3), LN2))
    assert_same(values("repo++_dpo", gamma=0), np.maximum(values("dpo"), LN2))


def test_the_hinge_of_simpo_is_beta_times_repo():
    assert_same(values("simpo_hinge", beta=2, gamma=0.25), 2 * values("repo", gamma=0.75))


def test_gamma_is_a_margin_where_a_shift_of_all_margins_is_one_of_gamma():
    with_gamma = {name: loss for name, loss in LOSSES.items() if "gamma" in hyperparameters(loss)}
    margins = {name for name, loss in with_gamma.items() if loss.margin_gamma}
    assert with_gamma.keys() - margins == {"alphapo", "repo++_dpo", "gamma_po_dpo"}
    assert margins == {name for name, loss in LOSSES.items() if loss.margin_gamma}
    shifted = PAIRS._replace(logps=PAIRS.logps - [0, 0.25] * PAIRS.lengths)  # M grows by 0.25
    for name in ("repo", "repo++", "simpo", "simpo_hinge", "cpo_simpo", "alphapo", "repo++_dpo"):
        same = np.allclose(values(name, PAIRS, gamma=0.25), values(name, shifted, gamma=0.5))
        assert same == (name in margins), name


@pytest.mark.parametrize(
    "given, is_margin", [(["repo", "dpo"], True), (["repo", "alphapo"], False), (["dpo", "sft"], False)]
)
def test_gamma_of_a_sum_is_a_margin_where_it_is_one_of_all_that_have_it(given, is_margin):
    options = {"gamma": 0.5} if "repo" in given else {}
    assert make_loss(given, beta=1.0, **options)[0].margin_gamma == is_margin


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_rrhf_is_repo_at_gamma_0_whatever_beta_simpo_has(beta):
    assert_same(values("rrhf"), values("repo", gamma=0.0))
    assert_same(values("simpo", beta=beta, gamma=0.0) > LN2, values("rrhf") > 0)


def test_alphapo_is_simpo_at_alpha_0_and_goes_there_smoothly():
    same = {"beta": 2.0, "gamma": 0.3}
    assert_same(values("alphapo", alpha=0, **same), values("simpo", **same))
    assert_same(values("alphapo", alpha=1e-7, **same), values("simpo", **same), rtol=1e-5)
    loss, hparams = make_loss("alphapo", alpha=0, **same)
    simpo, simpo_hparams = make_loss("simpo", **same)
    assert_same(
        slopes_of(loss, PAIRS.pairs(), hparams).logps_B2,
        slopes_of(simpo, PAIRS.pairs(), simpo_hparams).logps_B2,
        rtol=1e-5,
    )


def test_no_label_smoothing_is_none():
    assert_same(values("cdpo", label_smoothing=0), values("dpo"))
    assert_same(values("robust", label_smoothing=0), values("dpo"))
    swapped = PAIRS._replace(**{key: getattr(PAIRS, key)[:, ::-1] for key in ("logps", "lengths", "reference")})
    assert_same(values("cdpo", label_smoothing=0.5 - 1e-12), values("cdpo", swapped, label_smoothing=0.5 - 1e-12))


def test_a_soft_label_that_is_constant_is_label_smoothing():
    sure = PAIRS._replace(columns={"label_prob": np.full(12, 0.9), "uncertainty": np.zeros((12, 2))})
    assert_same(values("osp", sure), values("cdpo", label_smoothing=0.1))
    sure = sure._replace(columns=sure.columns | {"label_prob": np.ones(12)})
    for name in ("osp", "smpo", "pessimistic_dpo", "tempered_dpo"):
        assert_same(values(name, sure), values("dpo"), err_msg=name)


def test_zeros_of_hyperparameters_lead_back_to_dpo():
    dpo = values("dpo")
    assert_same(values("r_dpo", alpha=0), dpo)
    assert_same(values("rpo", beta=0.1, rpo_alpha=0), dpo)
    assert_same(values("dpop", dpop_lambda=0), dpo)
    assert_same(values("tdpo2", alpha=0), dpo)
    no_kl = PAIRS._replace(terms={"kl_reference": np.zeros((12, 2))})
    assert_same(values("tdpo1", no_kl), dpo)
    assert_same(values("rso_sigmoid_norm"), values("dpo", beta=0.05))
    assert_same(values("rso_hinge_norm"), values("hinge", beta=0.05))
    assert_same(values("rationale_dpo", rationale_gamma=0), dpo + LN2)
    assert_same(values("tempered_dpo", tau=1e12), dpo)


def test_inpo_without_the_previous_policy_is_ipo_on_sums():
    assert_same(values("inpo", eta=0.1, tau=0.1), values("ipo", beta=0.1, log_ratios="sum"))


def test_lengths_of_one_make_means_of_sums():
    short = PAIRS._replace(lengths=np.ones((12, 2)))
    assert_same(values("dpo_norm", short, beta=0.1), values("dpo", short))
    assert_same(values("ipo", short), values("ipo", short, log_ratios="sum"))
    assert_same(values("simpo", short, beta=0.1, gamma=0), values("cpo", short, beta=0.1, cpo_alpha=0))


def test_ipo_is_0_and_flat_at_its_margin():
    margin = Given(np.array([[5.0, 0.0]]) - 6, np.ones((1, 2)), np.full((1, 2), -6.0))
    loss, hparams = make_loss("ipo", beta=0.1)
    assert_same(values("ipo", margin, beta=0.1), [0.0])
    np.testing.assert_allclose(slopes_of(loss, margin.pairs(), hparams).logps_B2, 0, atol=1e-6)


def test_losses_of_answers_and_of_pairs_agree():
    assert_same(values("apo_zero_unpaired").sum(axis=1), values("apo_zero"))
    still = PAIRS._replace(groups={"kl": PAIRS.groups["kl"]._replace(logps=PAIRS.groups["kl"].reference)})
    assert_same(values("kto", still), values("apo_zero_unpaired"))
    loss, hparams = make_loss("bco")
    at_zero = loss(PAIRS.pairs(), state=loss.initial_state(), training=False, **hparams).values.sum(axis=1)
    assert_same(at_zero, values("bco_pair"), rtol=1e-5)


def test_sorted_losses_of_one_pair_are_dpo():
    one = random_pairs(0, n=1)
    for name in ("aot", "aot_unpaired"):
        assert_same(values(name, one, beta=0.1), values("dpo", one, beta=0.1))


def test_batch_margins_that_are_held_together_are_those_of_simpo():
    same = {"beta": 2.0, "gamma": 0.3}
    assert_same(values("gamma_po", tau=1e9, **same), values("simpo", **same), rtol=1e-6)
    assert_same(values("gamma_po", random_pairs(0, n=1), **same), values("simpo", random_pairs(0, n=1), **same))


def test_margins_above_the_mean_get_none_from_amapo():
    beta, margins = 2.0, np.array([w - r for w, r in PAIRS.logps / PAIRS.lengths])
    plain = values("simpo", beta=beta, gamma=0)
    above = margins > margins.mean()
    assert_same(values("amapo", beta=beta)[above], plain[above])
    assert (values("amapo", beta=beta)[~above] > plain[~above]).all()


@pytest.mark.parametrize("eta, same_as", [(1 - 1e-7, 1), (1e-7, -1)])
def test_lcpo_that_trusts_labels_is_dpo_and_one_that_does_not_turns_them(eta, same_as):
    loss, hparams = make_loss("lcpo", lcpo_eta=eta)
    assert loss.initial_state()["eta"] == np.float32(eta)
    got = loss(PAIRS.pairs(), state=loss.initial_state(), **hparams).values
    dpo, dpo_hparams = make_loss("dpo")
    pairs = PAIRS.pairs() if same_as == 1 else PAIRS.pairs().swapped
    assert_same(got, values_of(dpo, pairs, dpo_hparams), rtol=1e-4)


def test_wpo_weighs_less_than_trls():
    wpo, trl, dpo = values("wpo"), values("dpo", use_weighting=True), values("dpo")
    assert_same(wpo, np.minimum(trl, dpo))
    assert (trl > dpo).any() and (trl < dpo).any()


def test_npo_goes_to_gradient_ascent_as_beta_falls():
    loss, hparams = make_loss("npo", beta=1e-5, retain_weight=0)
    pairs = PAIRS.pairs()
    slopes_B2 = slopes_of(loss, pairs, hparams).logps_B2 / 24
    np.testing.assert_allclose(slopes_B2[:, 1], 1 / 12, rtol=1e-3)
    np.testing.assert_array_equal(slopes_B2[:, 0], 0)


# Of every objective

WITHOUT_ORDER = {"discopop"}  # found by a language model, and not monotone: around Delta = 0 it pushes the margin down


@pytest.mark.parametrize("name", most([name for name in LOSSES if name not in WITHOUT_ORDER]))
def test_a_better_margin_costs_less_and_slopes_say_so(name):
    """From near the reference, a step against the gradient makes chosen answers likelier than rejected ones."""
    base = random_pairs(4, n=12)
    same = np.full((12, 2), 10.0)
    logps = np.random.default_rng(0).uniform(-11, -9, (12, 1)) - np.array([[0.1, 0.0]])
    start = base._replace(
        logps=logps, lengths=same, reference=logps + np.random.default_rng(1).normal(0, 0.1, (12, 2)),
        columns=base.columns | {
            "label_prob": np.full(12, 0.9), "win_probability": np.tile([0.9, 0.1], (12, 1)), "previous_logps": logps,
        },
        groups=base.groups | {"kl": base.groups["kl"]._replace(logps=base.groups["kl"].reference)},
    )  # fmt: skip
    loss, hparams = make_loss(name)
    state = default_state(loss)
    pairs = start.pairs()
    slopes_B2 = slopes_of(loss, pairs, hparams, state=state).logps_B2
    assert float(jnp.sum(slopes_B2[:, 1] - slopes_B2[:, 0])) > 0
    step = 1e-3 / float(jnp.abs(slopes_B2).max())
    moved = pairs._replace(logps_B2=pairs.logps_B2 - step * slopes_B2)
    if not loss.coupled:  # what is held constant may move the value up again
        assert mean_loss(loss, moved, hparams, state=state) < mean_loss(loss, pairs, hparams, state=state)


@pytest.mark.parametrize("name", most(LOSSES))
def test_hyperparameters_may_be_traced(name):
    loss, hparams = make_loss(name)
    numbers = {key: value for key, value in hparams.items() if not isinstance(value, str)}
    texts = {key: value for key, value in hparams.items() if isinstance(value, str)}
    pairs, state = PAIRS.pairs(), default_state(loss)
    jitted = jax.jit(lambda numbers: values_of(loss, pairs, numbers | texts, state=state))
    np.testing.assert_allclose(jitted(numbers), values_of(loss, pairs, hparams, state=state), rtol=3e-5, atol=1e-6)


# beta_dpo draws which pairs count, by their place.
@pytest.mark.parametrize("name", most([name for name in LOSSES if name != "beta_dpo"]))
def test_the_order_of_pairs_does_not_matter(name):
    loss, hparams = make_loss(name)
    state, order = default_state(loss), np.random.default_rng(1).permutation(12)
    turned = jax.tree.map(lambda x: x[order], PAIRS.pairs())
    one, other = (mean_loss(loss, pairs, hparams, state=state) for pairs in (PAIRS.pairs(), turned))
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("name", most([name for name, loss in LOSSES.items() if not loss.coupled]))
def test_only_losses_that_say_so_mix_the_log_probs_of_pairs(name):
    """Given the lengths of all, another pair's log-probs change neither value nor slope."""
    loss, hparams = make_loss(name)
    pairs, state = PAIRS.pairs(), default_state(loss)
    other = pairs._replace(logps_B2=pairs.logps_B2.at[5].add(-3.0))
    for of in (values_of, lambda *args, **own: slopes_of(*args, **own).logps_B2):
        one, two = (np.delete(of(loss, p, hparams, state=state), 5, axis=0) for p in (pairs, other))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", most([name for name, loss in LOSSES.items() if loss.coupled]))
def test_losses_that_say_they_mix_do(name):
    with double():
        loss, hparams = make_loss(name)
        pairs, state = PAIRS.pairs(jnp.float64), default_state(loss)
        groups = {key: group._replace(logps_B2=group.logps_B2.at[5, 0].add(9.0)) for key, group in pairs.groups.items()}
        other = pairs._replace(logps_B2=pairs.logps_B2.at[5, 0].add(9.0), groups=groups)
        one, two = (loss(p, state=state, **hparams) for p in (pairs, other))
        differs = (np.delete(one.values, 5, axis=0) != np.delete(two.values, 5, axis=0)).any()
        assert differs or any((one.state[key] != two.state[key]).any() for key in one.state)


def test_reference_columns_terms_and_groups_are_read_where_a_loss_says_so_and_nowhere_else():
    for name, loss, hparams in every_loss():
        given, asked = PAIRS.pairs(), (*loss.columns, *loss.answer_columns)
        pairs = PairLogps(
            given.logps_B2,
            given.lengths_B2,
            given.reference_B2 if loss.reference else None,
            {key: given.columns[key] for key in asked},
            {key: given.terms[key] for key in loss.terms},
            {key: given.groups[key] for key in loss.groups},
        )
        state = default_state(loss)
        np.testing.assert_array_equal(
            values_of(loss, pairs, hparams, state=state), values_of(loss, given, hparams, state=state), err_msg=name
        )
        if loss.reference:
            with pytest.raises((TypeError, AttributeError, ValueError)):
                values_of(loss, pairs._replace(reference_B2=None), hparams, state=state)
        for field, needed in (("columns", asked), ("terms", loss.terms), ("groups", loss.groups)):
            if needed:
                with pytest.raises(KeyError):
                    values_of(loss, pairs._replace(**{field: {}}), hparams, state=state)
        assert not set(hyperparameters(loss)) & {"state", "progress", "training"}


def test_the_layout_is_that_of_the_values():
    for name, loss, hparams in every_loss():
        values = values_of(loss, PAIRS.pairs(), hparams, state=default_state(loss))
        assert values.shape == ((12, 2) if loss.layout == "answers" else (12,)), name
