"""Objectives that compare two answers under the policy with the same two under a reference model.

a = s_w - r_w and b = s_l - r_l are the log-ratios of the chosen and the rejected answer (sums over tokens), Delta = a - b; n_w and n_l are
the answers' lengths.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import jax
import jax.numpy as jnp

from repo_jax.losses.parts import chosen_nll, exp, hinge, logistic, smoothed
from repo_jax.losses.types import PairLogps, as_float, chosen_minus_rejected

# DPO and its links.


def dpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """-log sigmoid(beta Delta). arXiv:2305.18290. TRL's "sigmoid", which has no label_smoothing any more: see cdpo."""
    return logistic(beta * pairs.ratio_margin_B)


def cdpo(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> jax.Array:
    """DPO where labels are flipped with the chance label_smoothing: a soft label of 1 - label_smoothing. arXiv:2305.18290, ericmitchell.ai/cdpo.pdf."""
    return smoothed(beta * pairs.ratio_margin_B, label_smoothing)


def robust(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> jax.Array:
    """rDPO: ((1 - e) l(Delta) - e l(-Delta)) / (1 - 2 e), unbiased where labels are flipped with chance e. arXiv:2403.00409.

    It has no lower bound: its slope stays at -e beta / (1 - 2 e) as Delta grows.
    """
    x_B = beta * pairs.ratio_margin_B
    return ((1 - label_smoothing) * logistic(x_B) - label_smoothing * logistic(-x_B)) / (1 - 2 * label_smoothing)


def ipo(pairs: PairLogps, *, beta: float = 0.1, log_ratios: str = "mean") -> jax.Array:
    """(margin - 1 / (2 beta))^2, margin of log-ratios per token (mean) or per answer (sum). arXiv:2310.12036.

    The paper writes sums; TRL takes means, as its authors say they did. beta is the paper's tau.
    """
    margin_B = pairs.mean_ratio_margin_B if log_ratios == "mean" else pairs.ratio_margin_B
    return (margin_B - 1 / (2 * beta)) ** 2


def dpo_hinge(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """max(0, 1 - beta Delta): the margin is 1 / beta nats. arXiv:2309.06657. TRL's "hinge"; without a reference see slic."""
    return hinge(beta * pairs.ratio_margin_B)


def rso_sigmoid_norm(pairs: PairLogps, *, beta: float = 0.05) -> jax.Array:
    """RSO's sigmoid-norm, DPO with its gamma as beta; its default of 0.05 is not verified. arXiv:2309.06657. TRL's "sigmoid_norm" is dpo_norm."""
    return dpo(pairs, beta=beta)


def rso_hinge_norm(pairs: PairLogps, *, beta: float = 0.05) -> jax.Array:
    """RSO's hinge-norm, "hinge" with its gamma as beta. arXiv:2309.06657."""
    return dpo_hinge(pairs, beta=beta)


def dpo_norm(pairs: PairLogps, *, beta: float = 5.0) -> jax.Array:
    """-log sigmoid(beta (a / n_w - b / n_l)): length-normalised DPO, of Tulu 3. arXiv:2411.15124. TRL's "sigmoid_norm"."""
    return logistic(beta * pairs.mean_ratio_margin_B)


def repo_pp_dpo(pairs: PairLogps, *, beta: float = 0.1, gamma: float = 0.5) -> jax.Array:
    """RePO++ on DPO's margin, softplus(max(0, beta (gamma - Delta))); gamma in nats per answer. arXiv:2503.07426, section 3.4."""
    return jax.nn.softplus(jax.nn.relu(beta * (gamma - pairs.ratio_margin_B)))


def r_dpo(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> jax.Array:
    """-log sigmoid(beta Delta + alpha (n_w - n_l)): the reward less alpha per token. arXiv:2403.19159, arXiv:2406.11817 (iLR-DPO).

    The sign follows from that reward; two repositories have the opposite one, inside beta.
    """
    return logistic(beta * pairs.ratio_margin_B + alpha * chosen_minus_rejected(as_float(pairs.lengths_B2)))


def rpo(pairs: PairLogps, *, beta: float = 0.01, rpo_alpha: float = 0.005) -> jax.Array:
    """dpo + rpo_alpha * NLL of the chosen tokens of the batch. arXiv:2405.16436; IRPO (arXiv:2404.19733) has rpo_alpha 1."""
    return dpo(pairs, beta=beta) + rpo_alpha * chosen_nll(pairs, average="tokens")


def discopop(pairs: PairLogps, *, beta: float = 0.05, discopop_tau: float = 0.05) -> jax.Array:
    """(1 - k) l(x) + k e^-x, x = beta Delta, k = sigmoid(x / discopop_tau): the loss that a language model found. arXiv:2406.08414.

    It is not monotone: around Delta = 0, where training starts, it rises with Delta and pushes the margin down.
    """
    x_B = beta * pairs.ratio_margin_B
    log_k_B = -logistic(x_B / discopop_tau)
    return jax.nn.sigmoid(-x_B / discopop_tau) * logistic(x_B) + exp(log_k_B - x_B)


def exo_pair(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> jax.Array:
    """KL(q || (1 - e, e)), q = softmax(beta a, beta b), e = label_smoothing above 0. arXiv:2402.00856."""
    x_B = beta * pairs.ratio_margin_B
    right_B = -logistic(x_B) - jnp.log1p(-label_smoothing)
    flipped_B = -logistic(-x_B) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(x_B) * right_B + jax.nn.sigmoid(-x_B) * flipped_B


# Losses of each answer's log-ratio.


def nca_pair(pairs: PairLogps, *, beta: float = 0.01) -> jax.Array:
    """l(beta a) + l(-beta a) / 2 + l(-beta b) / 2, l = -log sigmoid. arXiv:2402.05369."""
    chosen_B, rejected_B = beta * pairs.ratios_B2.T
    return logistic(chosen_B) + 0.5 * logistic(-chosen_B) + 0.5 * logistic(-rejected_B)


def bco_pair(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """l(beta a) + l(-beta b), without BCO's shift, as TRL has it. arXiv:2404.04656. With the shift: bco."""
    chosen_B, rejected_B = beta * pairs.ratios_B2.T
    return logistic(chosen_B) + logistic(-rejected_B)


def apo_zero(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """sigmoid(-beta a) + sigmoid(beta b): for answers better than the model's own. arXiv:2408.06266."""
    chosen_B, rejected_B = beta * pairs.ratios_B2.T
    return jax.nn.sigmoid(-chosen_B) + jax.nn.sigmoid(rejected_B)


def apo_down(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """sigmoid(beta a) + sigmoid(-beta Delta): for answers worse than the model's own. arXiv:2408.06266."""
    return jax.nn.sigmoid(beta * pairs.ratios_B2[:, 0]) + jax.nn.sigmoid(-beta * pairs.ratio_margin_B)


def sppo_hard(pairs: PairLogps, *, beta: float = 1e-3) -> jax.Array:
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2, as TRL; the paper's code halves it. beta is the paper's 1 / eta. arXiv:2405.00675."""
    chosen_B, rejected_B = pairs.ratios_B2.T
    return (chosen_B - 0.5 / beta) ** 2 + (rejected_B + 0.5 / beta) ** 2


def sppo(pairs: PairLogps, *, beta: float = 1e-3) -> jax.Array:
    """The mean over both answers of (log-ratio - (P - 1/2) / beta)^2, P the answer's chance to win. arXiv:2405.00675.

    P is the answer column win_probability, in [0, 1]. At this beta targets are up to 500 and losses around 1e5.
    """
    target_B2 = (as_float(pairs.columns["win_probability"]) - 0.5) / beta
    return jnp.mean((pairs.ratios_B2 - target_B2) ** 2, axis=1)


def inpo(pairs: PairLogps, *, eta: float = 0.1, tau: float = 0.03) -> jax.Array:
    """(h - 1 / (2 eta))^2, h = (s_w - s_l) - tau / eta (r_w - r_l) - (1 - tau / eta) (q_w - q_l). arXiv:2407.00617.

    q is the previous policy's log-prob, the answer column previous_logps (sums). The defaults are ours: the paper's were not read.
    """
    share = tau / eta
    reference_B2 = jnp.where(pairs.there_B2, as_float(pairs.reference_B2), 0.0)
    previous_B2 = jnp.where(pairs.there_B2, as_float(pairs.columns["previous_logps"]), 0.0)
    h_B = chosen_minus_rejected(pairs.sums_B2 - share * reference_B2 - (1 - share) * previous_B2)
    return (h_B - 1 / (2 * eta)) ** 2


def bpo(pairs: PairLogps, *, beta: float = 0.1, balance_factor: float = 0.3, link: str = "logistic") -> jax.Array:
    """l(beta min(a, -balance_factor b)): the answer that lags behind is pushed. arXiv:2506.03557.

    link is l: logistic, hinge (that of its released recipe), square ((x - 1)^2) or exponential. Where both lag alike, as at the start,
    each gets half of the slope.
    """
    chosen_B, rejected_B = pairs.ratios_B2.T
    links = {"logistic": logistic, "hinge": hinge, "square": lambda x: (x - 1) ** 2, "exponential": lambda x: exp(-x)}
    return links[link](beta * jnp.minimum(chosen_B, -balance_factor * rejected_B))


def dpop(pairs: PairLogps, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> jax.Array:
    """-log sigmoid(beta (Delta - dpop_lambda max(0, -a))): the chosen answer shall not become less likely. arXiv:2402.13228."""
    return logistic(beta * (pairs.ratio_margin_B - dpop_lambda * jax.nn.relu(-pairs.ratios_B2[:, 0])))


def cal_dpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """-log sigmoid(Delta) + ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2) / 2. arXiv:2412.14516."""
    return logistic(pairs.ratio_margin_B) + 0.5 * sppo_hard(pairs, beta=beta)


# Labels and weights from the data.


def osp(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """Soft labels, -(p log sigmoid(x) + (1 - p) log sigmoid(-x)), x = beta Delta; a constant p is cdpo. arXiv:2405.14103.

    p is the column label_prob, in [0, 1]. The paper's own formula was not read.
    """
    p_B, x_B = as_float(pairs.columns["label_prob"]), beta * pairs.ratio_margin_B
    return smoothed(x_B, 1 - p_B)


def smpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """Smoothed DPO, -log sigmoid((2 p - 1) beta Delta), p the column label_prob. Paper: arXiv:2506.02698 (this id is not verified)."""
    p_B = as_float(pairs.columns["label_prob"])
    return logistic((2 * p_B - 1) * beta * pairs.ratio_margin_B)


def pessimistic_dpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """-log sigmoid(beta Delta + u_w - u_l): rewards less their uncertainty u, an answer column. After arXiv:2410.20187, whose signs were not read."""
    return logistic(beta * pairs.ratio_margin_B + chosen_minus_rejected(as_float(pairs.columns["uncertainty"])))


def tempered_dpo(pairs: PairLogps, *, beta: float = 0.1, tau: float = 1.0) -> jax.Array:
    """-log sigmoid(beta Delta e^(-u / tau)), u the pair's uncertainty: the sum of the answer column. After arXiv:2410.20187, whose form was not read."""
    u_B = jnp.sum(as_float(pairs.columns["uncertainty"]), axis=1)
    return logistic(beta * pairs.ratio_margin_B * jnp.exp(-u_B / tau))


# DPO over weighted tokens: the data's options give the weights, so that s, r and Delta are sums of weighted terms.


def ld_dpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """DPO where tokens beyond the shorter answer's length count for ld_alpha (of the data section). arXiv:2409.06411."""
    return dpo(pairs, beta=beta)


def poet(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """DPO on answers cut to the shorter one's length (use_poet of the data section). arXiv:2506.09457. For simpo: loss_type simpo with use_poet."""
    return dpo(pairs, beta=beta)


def d2po(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """DPO where the t-th scored token, from 1, counts for temporal_decay^t (of the data section; 0.98 in its code). arXiv:2502.14340."""
    return dpo(pairs, beta=beta)


# Terms over the vocabulary, and further sequences.


def wpo(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """dpo times min(1, wpo_weights): pairs that the policy would not write count less. arXiv:2406.11827. TRL's use_weighting has no min."""
    return jnp.minimum(wpo_weights(pairs), 1.0) * dpo(pairs, beta=beta)


def wpo_weights(pairs: PairLogps) -> jax.Array:
    """exp of the mean over tokens of log p - log sum_v p_v^2, chosen + rejected; no gradient."""
    log_sum_p2_B2 = jnp.where(pairs.there_B2, as_float(pairs.terms["log_sum_p2"]), 0.0)
    aligned_B2 = (pairs.sums_B2 - log_sum_p2_B2) / jnp.maximum(pairs.lengths_B2, 1)
    return jax.lax.stop_gradient(exp(jnp.sum(aligned_B2, axis=1)))


def tdpo1(pairs: PairLogps, *, beta: float = 0.1) -> jax.Array:
    """-log sigmoid(beta (Delta - (D_l - D_w))), D the answer's summed KL(reference || policy) per position. arXiv:2404.11999."""
    kl_B2 = jnp.where(pairs.there_B2, as_float(pairs.terms["kl_reference"]), 0.0)
    return logistic(beta * (pairs.ratio_margin_B + chosen_minus_rejected(kl_B2)))


def tdpo2(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> jax.Array:
    """-log sigmoid(beta (Delta - alpha (D_l - stop_gradient(D_w)))). arXiv:2404.11999."""
    chosen_B, rejected_B = jnp.where(pairs.there_B2, as_float(pairs.terms["kl_reference"]), 0.0).T
    return logistic(beta * (pairs.ratio_margin_B - alpha * (rejected_B - jax.lax.stop_gradient(chosen_B))))


def rationale_dpo(pairs: PairLogps, *, beta: float = 0.1, rationale_gamma: float = 0.1) -> jax.Array:
    """dpo - log sigmoid(rationale_gamma s), s the log-prob of why one answer is better, given both. arXiv:2407.14477.

    The group "rationale" has one sequence for each pair, as its chosen answer; no reference is compared with.
    """
    return dpo(pairs, beta=beta) + logistic(rationale_gamma * pairs.groups["rationale"].sums_B2[:, 0])
