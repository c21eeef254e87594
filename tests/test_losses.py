import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import losses as oracle

from repo_jax import losses
from repo_jax.losses import LOSSES, RANGES, PairLogps, hyperparameters, make_loss

# Four pairs with lengths and log-probs of a size that training meets; margins .05, .55, -.1, -.4.
LOGPS = np.array([[-12, -15], [-20, -18], [-8, -9], [-30, -33]], np.float64)
LENGTHS = np.array([[10, 12], [16, 10], [5, 6], [20, 30]], np.float64)
# Published values for one pair: mean log-probs, beta, gamma -> repo, its slope, simpo, its slope (in the margin).
VECTORS = [
    (-1.2, -1.5, 10, 0.4, 0.1, -1, 1.313262, -7.310586),
    (-1.2, -1.7, 10, 0.4, 0.0, 0, 0.313262, -2.689414),
    (-1.2, -1.0, 2.5, 0.6, 0.8, -1, 2.126928, -2.201993),
]


def pairs(margins):
    """Pairs whose length-normalised margins are exactly these: 4 chosen tokens, 2 rejected."""
    margins_B = jnp.asarray(margins, jnp.float32)
    logps_B2 = jnp.stack([4 * (margins_B - 1.0), jnp.full_like(margins_B, -2.0)], axis=1)
    lengths_B2 = jnp.tile(jnp.array([[4.0, 2.0]]), (len(margins_B), 1))
    return PairLogps(logps_B2, lengths_B2)


def real_pairs():
    return PairLogps(jnp.asarray(LOGPS, jnp.float32), jnp.asarray(LENGTHS, jnp.float32))


def test_repo_is_zero_beyond_gamma_and_linear_below():
    np.testing.assert_allclose(losses.repo(pairs([-1.0, 0.0, 0.5, 2.0]), gamma=0.5), [1.5, 0.5, 0.0, 0.0])


def test_repo_gradient_is_all_or_nothing_and_nothing_at_gamma():
    grad_B = jax.grad(lambda m: losses.repo(pairs(m), gamma=0.5).sum())(jnp.array([-1.0, 0.4, 0.5, 0.6]))
    np.testing.assert_array_equal(grad_B, [-1.0, -1.0, 0.0, 0.0])


def test_simpo_approaches_repo_as_beta_grows():
    p = pairs([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(losses.simpo(p, beta=1e3, gamma=0.5) / 1e3, losses.repo(p, gamma=0.5), atol=1e-3)


@pytest.mark.parametrize("w, r, beta, gamma, repo, repo_slope, simpo, simpo_slope", VECTORS)
def test_repo_and_simpo_give_the_published_values_and_slopes(w, r, beta, gamma, repo, repo_slope, simpo, simpo_slope):
    def of(loss, **hparams):
        return jax.value_and_grad(lambda m: loss(PairLogps(jnp.array([[w, w - m]]), jnp.ones((1, 2))), **hparams)[0])(
            w - r
        )

    np.testing.assert_allclose(of(losses.repo, gamma=gamma), (repo, repo_slope), atol=1e-6)
    np.testing.assert_allclose(of(losses.simpo, beta=beta, gamma=gamma), (simpo, simpo_slope), rtol=1e-5)


@pytest.mark.parametrize(
    "name, hparams, mean",
    [
        ("repo", {"gamma": 0.4}, 0.4125),
        ("simpo", {"beta": 2.0, "gamma": 0.25}, 0.998674),
        ("simpo", {"beta": 2.0, "gamma": 0.25, "label_smoothing": 0.1}, 0.953674),
        ("simpo", {"beta": 10.0, "gamma": 0.3}, 3.419210),
    ],
)
def test_value_and_slope_equal_the_float64_oracle(name, hparams, mean):
    loss, hparams = make_loss(name, **hparams)
    values = np.asarray(loss.fn(real_pairs(), **hparams))
    np.testing.assert_allclose(values.mean(), mean, rtol=1e-5)  # the published mean
    np.testing.assert_allclose(values, getattr(oracle, name)(LOGPS, LENGTHS, **hparams), rtol=1e-5, atol=1e-7)
    slopes = jax.grad(lambda logps: loss.fn(PairLogps(logps, real_pairs().lengths_B2), **hparams).sum())
    wanted = oracle.slopes(getattr(oracle, name), LOGPS, LENGTHS, **hparams)
    np.testing.assert_allclose(slopes(real_pairs().logps_B2), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_ranking_a_pair_the_wrong_way_round_costs_more(name):
    loss, hparams = make_loss(name)
    assert loss.fn(pairs([-0.3]), **hparams)[0] > loss.fn(pairs([0.3]), **hparams)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_hyperparameters_may_be_traced(name):
    loss, hparams = make_loss(name)
    jitted = jax.jit(lambda hparams: loss.fn(real_pairs(), **hparams))
    np.testing.assert_allclose(jitted(hparams), loss.fn(real_pairs(), **hparams), rtol=1e-6)


def test_a_pair_that_is_not_there_yields_finite_values_and_slopes():
    nothing = jnp.zeros((1, 2))
    for loss in LOSSES.values():
        value, slope = jax.value_and_grad(lambda x, fn=loss.fn: fn(PairLogps(x, nothing)).sum())(nothing)
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_every_hyperparameter_has_a_range_and_a_default_inside_it():
    for loss in LOSSES.values():
        for name, default in hyperparameters(loss).items():
            lowest, below, _ = RANGES[name]
            assert lowest <= default < below


def test_every_loss_cites_its_paper():
    assert all("arXiv:" in inspect.getdoc(loss.fn) for loss in LOSSES.values())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss_type": "rpo"}, "unknown loss_type 'rpo'; choose one of repo, simpo"),
        ({"loss_type": "repo", "beta": 2.5}, "loss 'repo' has no hyperparameter 'beta'; it takes gamma"),
        (
            {"loss_type": "simpo", "gama": 1.0},
            "loss 'simpo' has no hyperparameter 'gama'; it takes beta, gamma, label_smoothing",
        ),
        ({"loss_type": "simpo", "beta": 0}, "loss 'simpo': beta=0 must be a number above 0"),
        ({"gamma": "half"}, "loss 'repo': gamma='half' must be a number, in nats per token"),
        (
            {"loss_type": "simpo", "label_smoothing": 0.5},
            "loss 'simpo': label_smoothing=0.5 must be a number from 0 to below 0.5",
        ),
    ],
)
def test_make_loss_answers_a_mistake_before_any_work(given, message):
    with pytest.raises(ValueError) as error:
        make_loss(**given)
    assert str(error.value) == message
