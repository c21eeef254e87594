"""Objectives that compare two answers under the policy alone.

M is the mean log-prob per token of the chosen answer (m_w) minus that of the rejected one (m_l), s_w and s_l are the sums. gamma is a
margin in nats per token.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import jax
import jax.numpy as jnp

from repo_jax.losses.parts import LARGEST_EXPONENT, chosen_nll, hinge, log1mexp, logistic, smoothed
from repo_jax.losses.types import PairLogps, chosen_minus_rejected


def repo(pairs: PairLogps, *, gamma: float = 0.5) -> jax.Array:
    """max(0, gamma - margin): pairs already separated by gamma (nats per token) stop contributing. arXiv:2503.07426.

    jax.nn.relu has gradient 0 at margin == gamma, so the active pairs are exactly those with margin < gamma.
    """
    return jax.nn.relu(gamma - pairs.mean_margin_B)


def repo_pp(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 0.5) -> jax.Array:
    """RePO++, softplus(max(0, beta (gamma - M))): SimPO's weights on the pairs that RePO keeps. arXiv:2503.07426, section 3.4.

    It is max(simpo, log 2): its floor is log 2, reached where M >= gamma.
    """
    return jax.nn.softplus(jax.nn.relu(beta * (gamma - pairs.mean_margin_B)))


def simpo(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 0.25, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta * (margin - gamma)), gamma in nats per token (SimPO's gamma_beta_ratio). arXiv:2405.14734.

    label_smoothing in [0, 0.5) is the chance that a label is flipped. Defaults are those of SimPO's own code. TRL's simpo_gamma is beta
    times this gamma.
    """
    return smoothed(beta * (pairs.mean_margin_B - gamma), label_smoothing)


def simpo_hinge(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 0.25) -> jax.Array:
    """max(0, 1 - beta (M - gamma)), SimPO's hinge: beta times RePO at gamma + 1 / beta. arXiv:2405.14734."""
    return hinge(beta * (pairs.mean_margin_B - gamma))


def cpo(pairs: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta (s_w - s_l)) + cpo_alpha * NLL of the chosen tokens of the batch. arXiv:2401.08417."""
    return smoothed(beta * pairs.sum_margin_B, label_smoothing) + cpo_alpha * chosen_nll(pairs, average="tokens")


def cpo_simpo(
    pairs: PairLogps, *, beta: float = 10.0, gamma: float = 0.54, cpo_alpha: float = 0.05, label_smoothing: float = 0.0
) -> jax.Array:
    """simpo + cpo_alpha * NLL of the chosen tokens of the batch. arXiv:2401.08417 with arXiv:2405.14734; github.com/fe1ixxu/CPO_SIMPO.

    Its code's simpo_gamma 5.4 is beta times this gamma.
    """
    preference_B = simpo(pairs, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return preference_B + cpo_alpha * chosen_nll(pairs, average="tokens")


def orpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """-m_w - beta log sigmoid(log-odds_w - log-odds_l), log-odds = m - log(1 - e^m). arXiv:2403.07691.

    The first term is of the answer alone, each by itself; TRL and the paper's code take the mean over the prompt's tokens, too. beta is
    the paper's lambda.
    """
    mean_B2 = pairs.mean_B2
    return -mean_B2[:, 0] + beta * logistic(chosen_minus_rejected(mean_B2 - log1mexp(mean_B2)))


def alphapo(pairs: PairLogps, *, beta: float = 2.5, gamma: float = 0.04, alpha: float = 0.25) -> jax.Array:
    """-log sigmoid(beta (u_w - u_l - gamma)), u = (1 - e^(-alpha m)) / alpha; alpha 0 is simpo. arXiv:2501.03884.

    TRL's simpo_gamma is beta times this gamma. Rewards of answers so unlikely that e^(-alpha m) has no float32 stay where it ends.
    """
    curved = jnp.where(alpha == 0, 1.0, alpha)
    exponent_B2 = jnp.minimum(-curved * pairs.mean_B2, LARGEST_EXPONENT)
    reward_B2 = jnp.where(alpha == 0, pairs.mean_B2, -jnp.expm1(exponent_B2) / curved)
    return logistic(beta * (chosen_minus_rejected(reward_B2) - gamma))


def slic(pairs: PairLogps, *, delta: float = 1.0, slic_lambda: float = 0.1) -> jax.Array:
    """max(0, delta - s_w + s_l) - slic_lambda s_w, of sums: delta is in nats per answer. arXiv:2305.10425.

    TRL's "hinge" is not this: it compares with a reference.
    """
    return jax.nn.relu(delta - pairs.sum_margin_B) - slic_lambda * pairs.sums_B2[:, 0]


def rrhf(pairs: PairLogps) -> jax.Array:
    """max(0, m_l - m_w), which is repo at gamma 0; sft_weight 1 adds the paper's second term. arXiv:2304.05302, of two answers."""
    return jax.nn.relu(-pairs.mean_margin_B)


def sft(pairs: PairLogps, *, sft_average: str = "tokens") -> jax.Array:
    """-log-prob of the chosen answers, per token of the batch or of each answer; the rejected ones are not read, and may be absent. TRL's "sft", as in arXiv:2404.19733.

    It is the loss of TRL's SFTTrainer and of transformers on the same tokens, of completions or of all the assistant's turns.
    """
    return chosen_nll(pairs, average=sft_average, there_B=pairs.there_B2[:, 0])
