"""RePO and SimPO, in small numbers that can be checked in the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repo_jax import losses
from repo_jax.losses import PairLogps

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
