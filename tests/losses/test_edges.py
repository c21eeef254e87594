"""Ties, nothing there, very unlikely answers, bfloat16: every objective stays finite, and what is not there has no weight at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_pairs import Given, default_state, double, mean_loss, most, random_pairs, slopes_of, there, values_of

from repo_jax.losses import LOSSES, make_loss
from repo_jax.losses.parts import exp, log1mexp, mean_of, std_of

HUGE = 1e5


def assert_finite(name, pairs, **own):
    loss, hparams = make_loss(name)
    own = own or {"state": default_state(loss)}
    out = loss(pairs, **own, **hparams)
    slopes = slopes_of(loss, pairs, hparams, **own)
    assert np.isfinite(out.values).all(), name
    for leaf in jax.tree.leaves(slopes):
        assert np.isfinite(leaf).all(), name
    for leaf in jax.tree.leaves(out.state):
        assert np.isfinite(leaf).all(), name
    return out, slopes


@pytest.mark.parametrize("name", most(LOSSES))
def test_a_batch_with_nothing_in_it_costs_nothing(name):
    nothing = random_pairs(0, n=1).with_absent((0,) * 12)
    nothing = jax.tree.map(lambda x: x[:12], nothing.pairs())
    loss, hparams = make_loss(name)
    _, slopes = assert_finite(name, nothing)
    assert mean_loss(loss, nothing, hparams, state=default_state(loss)) == 0
    assert not np.asarray(slopes.logps_B2).any()


@pytest.mark.parametrize("name", most(LOSSES))
def test_what_is_not_there_has_exactly_no_slope_and_changes_nothing(name):
    given, absent = random_pairs(1, single=LOSSES[name].layout == "answers"), (0, 4, 9)
    loss, hparams = make_loss(name)
    padded = given.with_absent(absent).pairs()
    out, slopes = assert_finite(name, padded)
    there_B2 = np.asarray(padded.there_B2)
    np.testing.assert_array_equal(np.asarray(slopes.logps_B2)[~there_B2], 0)
    for term in slopes.terms.values():
        np.testing.assert_array_equal(np.asarray(term)[~there_B2], 0)
    other = padded._replace(
        logps_B2=jnp.where(padded.there_B2, padded.logps_B2, -777.0),
        reference_B2=jnp.where(padded.there_B2, padded.reference_B2, 555.0),
    )
    again = loss(other, state=default_state(loss), **hparams)
    counted = np.asarray(there(out.values, padded))
    np.testing.assert_array_equal(np.asarray(out.values)[counted], np.asarray(again.values)[counted])
    np.testing.assert_array_equal(
        np.asarray(slopes.logps_B2), np.asarray(slopes_of(loss, other, hparams, state=default_state(loss)).logps_B2)
    )
    if name not in ("beta_dpo", "gamma_po_queue"):  # which draw by place
        alone = mean_loss(loss, given.pairs(), hparams, state=default_state(loss))
        np.testing.assert_allclose(mean_loss(loss, padded, hparams, state=default_state(loss)), alone, rtol=1e-5)


@pytest.mark.parametrize("name", most(LOSSES))
def test_a_pair_by_itself_is_finite(name):
    assert_finite(name, random_pairs(2, n=1).pairs())


@pytest.mark.parametrize("name", most(LOSSES))
def test_ties_are_finite_and_equal_pairs_get_equal_slopes(name):
    """All pairs alike, policy and reference too: every rectifier, minimum, sort and deviation is at its tie."""
    one = random_pairs(3, n=1)
    alike = jax.tree.map(lambda x: jnp.repeat(x, 12, axis=0), one._replace(reference=one.logps).pairs())
    _, slopes = assert_finite(name, alike)
    if name not in ("beta_dpo", "aot_unpaired"):
        np.testing.assert_allclose(slopes.logps_B2, np.tile(slopes.logps_B2[0], (12, 1)), rtol=1e-6)


def test_rectified_losses_have_no_slope_at_their_tie():
    flat = Given(np.array([[-2.0, -4.0]]), np.full((1, 2), 4.0), np.array([[-2.0, -4.0]]))  # M = 0.5, Delta = 0
    for name, hparams in [
        ("repo", {"gamma": 0.5}),
        ("repo++", {"gamma": 0.5}),
        ("repo++_dpo", {"gamma": 0.0}),
        ("simpo_hinge", {"beta": 2.0, "gamma": 0.0}),
        ("slic", {"delta": 2.0, "slic_lambda": 0.0}),
    ]:
        loss, hparams = make_loss(name, **hparams)
        np.testing.assert_array_equal(slopes_of(loss, flat.pairs(), hparams).logps_B2, 0, err_msg=name)
    # No answer of the two lags behind: each gets half of the slope.
    loss, hparams = make_loss("bpo", balance_factor=1)
    np.testing.assert_allclose(slopes_of(loss, flat.pairs(), hparams).logps_B2, [[-0.025, 0.025]])


def test_a_batch_whose_pairs_are_all_past_gamma_has_no_slope():
    easy = random_pairs(0)
    easy = easy._replace(logps=np.stack([-0.1 * easy.lengths[:, 0], -3 * easy.lengths[:, 1]], axis=1))
    for name in ("repo", "repo++"):
        loss, hparams = make_loss(name)
        assert not np.asarray(slopes_of(loss, easy.pairs(), hparams).logps_B2).any()


def unlikely(n=12):
    """Sums of log-probs near -1e5, of answers of a few thousand tokens, and log-ratios of a few hundred."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3000, 5000, (n, 2)).astype(float)
    logps = -HUGE * rng.uniform(0.9, 1.1, (n, 2))
    reference = logps + rng.normal(0, 300, (n, 2))
    base = random_pairs(0, n=n)
    columns = base.columns | {"previous_logps": logps + rng.normal(0, 300, (n, 2))}
    kl = Given(logps + 100, lengths, reference)
    terms = {"kl_reference": rng.uniform(0, 500, (n, 2)), "log_sum_p2": logps + rng.normal(0, 300, (n, 2))}
    groups = {"kl": kl, "rationale": Given(logps, lengths * [1, 0])}
    return Given(logps, lengths, reference, columns, terms, groups)


@pytest.mark.parametrize("name", most(LOSSES))
def test_very_unlikely_answers_have_finite_losses_near_those_of_float64(name):
    given = unlikely()
    loss, hparams = make_loss(name)
    out, _ = assert_finite(name, given.pairs())
    with double():
        state = jax.tree.map(jnp.asarray, default_state(loss))
        wanted = np.asarray(values_of(loss, given.pairs(jnp.float64), hparams, state=state))
    # A sum of 1e5 has a step of 2^-7 in float32, and so have differences of them.
    np.testing.assert_allclose(out.values, wanted, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("name", most(LOSSES))
def test_answers_of_one_token_that_are_very_unlikely_are_finite(name):
    given = unlikely()
    short = given._replace(
        lengths=np.ones_like(given.lengths),
        groups=given.groups | {"kl": given.groups["kl"]._replace(lengths=np.ones_like(given.lengths))},
    )
    assert_finite(name, short.pairs())


@pytest.mark.parametrize("name", most(LOSSES))
def test_answers_that_are_certain_are_finite(name):
    """Log-probs of exactly 0, where odds have no end."""
    given = random_pairs(0, n=12)
    certain = given._replace(logps=given.logps * np.array([[0.0, 1.0]]))
    assert_finite(name, certain.pairs())
    assert_finite(name, certain._replace(logps=given.logps * 0).pairs())


@pytest.mark.parametrize("name", most(LOSSES))
def test_bfloat16_is_computed_in_float32_and_padding_has_no_weight(name):
    padded = random_pairs(1).with_absent((0, 4, 9)).pairs(jnp.bfloat16)
    out, slopes = assert_finite(name, padded)
    assert out.values.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(slopes.logps_B2)[~np.asarray(padded.there_B2)], 0)
    loss, hparams = make_loss(name)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), padded)
    np.testing.assert_allclose(
        out.values, values_of(loss, wide, hparams, state=default_state(loss)), rtol=1e-2, atol=1e-2
    )


# Parts


def test_what_is_not_there_is_0_in_all_that_pairs_say():
    pairs = random_pairs(1, single=True).with_absent((0, 4)).pairs()
    gone_B2 = ~np.asarray(pairs.there_B2)
    assert gone_B2.sum() > 4 and (np.asarray(pairs.logps_B2)[gone_B2] != 0).any()
    for x_B2 in (pairs.sums_B2, pairs.mean_B2, pairs.ratios_B2):
        np.testing.assert_array_equal(np.asarray(x_B2)[gone_B2], 0)
        assert np.asarray(x_B2)[~gone_B2].all()
    np.testing.assert_array_equal(pairs.there_B, ~gone_B2.any(axis=1))


def test_log1mexp_is_exact_on_both_branches_and_finite_in_value_and_slope():
    x = np.concatenate([-np.logspace(-5, 3, 200), [-0.6931472, -0.6931471]])
    with np.errstate(divide="ignore"):
        wanted = np.where(x > -1, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    np.testing.assert_allclose(log1mexp(jnp.asarray(x, jnp.float32)), wanted, rtol=2e-6, atol=1e-38)
    slopes = jax.grad(lambda x: log1mexp(x).sum())(
        jnp.asarray([0.0, -1e-7, -1e-3, -0.5, -0.7, -5, -200, -1e5], jnp.float32)
    )
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(slopes[2:6], [-1 / np.expm1(y) for y in (1e-3, 0.5, 0.7, 5)], rtol=1e-5)


def test_exp_ends_where_float32_does():
    assert np.isfinite(exp(jnp.float32(1e5))) and np.isclose(exp(jnp.float32(1.0)), np.e)


def test_statistics_are_of_what_is_there():
    x, there_N = jnp.array([1.0, 99.0, 2.0, 6.0]), jnp.array([True, False, True, True])
    assert mean_of(x, there_N) == 3
    np.testing.assert_allclose(std_of(x, there_N), np.std([1, 2, 6], ddof=1), rtol=1e-6)
    assert mean_of(x, there_N & False) == std_of(x, there_N & False) == std_of(x, there_N & (x == 1)) == 0


@pytest.mark.parametrize("name", ["gamma_po", "gamma_po_queue"])
def test_margins_are_shared_out_however_steep_the_problem(name):
    loss, hparams = make_loss(name, beta=10.0, gamma=10.0, tau=0.1)
    out = loss(random_pairs(0, n=64).pairs(), state=default_state(loss), **hparams)
    assert np.isfinite(out.values).all()


def test_alpha_dpo_of_one_pair_at_a_time_stays_finite():
    loss, hparams = make_loss("alpha_dpo")
    pairs, state = (
        random_pairs(0, n=1).pairs(),
        {"mean": jnp.float32(0.3), "std": jnp.float32(0)},
    )  # where 0.9 ** 900 is
    out = loss(pairs, state=state, **hparams)
    assert np.isfinite(out.values).all()
