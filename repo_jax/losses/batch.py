"""Objectives in which a pair's value depends on the rest of the global batch, or on what a running state remembers of earlier ones.

Statistics are over the pairs that are there, and carry no gradient unless a docstring says so. Running ones that are updated before they are
used are used as they are in evaluation.

Axis letters: B pairs; 2 is (chosen, rejected); N gaps; Q places of the queue.
"""

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.losses.parts import exp, logistic, mean_of, ranks, smoothed, std_of
from repo_jax.losses.types import LossOut, PairLogps
from repo_jax.losses.with_reference import dpo


def amapo(pairs: PairLogps, *, beta: float = 2.0, label_smoothing: float = 0.0, variant: str = "code") -> jax.Array:
    """-log sigmoid(beta M - margin), where pairs below the batch's mean mu have a margin, those above it none. arXiv:2511.09385.

    code: margin = beta e^(mu (mu - M) / sigma) where M < mu. paper: all of it in rewards beta M, so that the exponent is beta times that,
    and a margin where the exponent is above 0 (a negative mu gives it to pairs above). The loss jumps by about beta at M = mu.
    """
    margin_B, there_B = jax.lax.stop_gradient(pairs.mean_margin_B), pairs.there_B
    mean, std = mean_of(margin_B, there_B), std_of(margin_B, there_B)
    z_B = (mean - margin_B) / jnp.where(std > 0, std, 1.0)
    if variant == "code":
        exponent_B, chosen_B = mean * z_B, margin_B < mean
    else:
        exponent_B = beta * mean * z_B
        chosen_B = exponent_B > 0
    target_B = beta * jnp.where(chosen_B, exp(exponent_B), 0.0)
    return smoothed(beta * pairs.mean_margin_B - target_B, label_smoothing)


def gamma_po(pairs: PairLogps, *, beta: float = 10.0, gamma: float = 0.4, tau: float = 10.0) -> jax.Array:
    """-log sigmoid(beta M - gamma_i): the batch's margins beta gamma shared out anew, more to clear pairs. arXiv:2506.03690.

    tau holds them together: as it grows this becomes simpo. The paper's other form takes gaps of earlier batches too: gamma_po_queue.
    """
    gap_B = beta * pairs.mean_margin_B
    return logistic(gap_B - tailored(gap_B, pairs.there_B, mean=beta * gamma, tau=tau))


def gamma_po_dpo(pairs: PairLogps, *, beta: float = 0.1, gamma: float = 0.4, tau: float = 10.0) -> jax.Array:
    """-log sigmoid(beta Delta - (gamma_i - beta gamma)): gamma_po on DPO's margin, which is less the mean. arXiv:2506.03690."""
    gap_B = beta * pairs.ratio_margin_B
    return logistic(gap_B - (tailored(gap_B, pairs.there_B, mean=beta * gamma, tau=tau) - beta * gamma))


def tailored(gap_N, there_N, *, mean, tau) -> jax.Array:
    """gamma_N = mean * N * p, p on the simplex minimising mean -log sigmoid(gap - gamma) + tau KL(p || uniform); no gradient.

    As in the paper's code: exponentiated gradient of step min(0.5 / tau, 1), 19 steps.
    """
    gap_N = jax.lax.stop_gradient(gap_N)
    count = jnp.maximum(jnp.sum(there_N), 1)
    rate = jnp.minimum(0.5 / tau, 1.0)

    def step(_, p_N):
        kl_N = tau * (1 + jnp.log(count * (p_N + 1e-10)))
        slope_N = kl_N + mean * jax.nn.sigmoid(mean * count * p_N - gap_N)
        # What is subtracted cancels; the steepest grows by 1 then, and not all to 0.
        grown_N = p_N * jnp.exp(-rate * (slope_N - jnp.min(jnp.where(p_N > 0, slope_N, jnp.inf))))
        return grown_N / jnp.sum(grown_N)

    uniform_N = jnp.where(there_N, 1 / count, 0.0).astype(gap_N.dtype)
    p_N = jax.lax.fori_loop(0, 19, step, jnp.where(jnp.any(there_N), uniform_N, 1 / len(gap_N)))
    return mean * count * p_N


QUEUE, SOLVED_FOR = 2048, 256  # gaps that are remembered, and with how many margins are shared out


def gap_queue() -> dict:
    """Eight draws of a standard normal, as the paper's code starts."""
    gaps_Q = np.zeros(QUEUE, np.float32)
    gaps_Q[:8] = np.random.default_rng(0).standard_normal(8)
    return {"gaps_Q": gaps_Q, "seen": np.int32(8), "key": np.array([0, 0], np.uint32)}


def gamma_po_queue(
    pairs: PairLogps, state: dict, *, beta: float = 10.0, gamma: float = 0.4, tau: float = 10.0
) -> LossOut:
    """gamma_po where margins are shared out among this batch and a random sample of earlier gaps, 256 in all. arXiv:2506.03690.

    The last 2,048 gaps are remembered: of the global batch, where the paper's code has a queue on each device.
    """
    gap_B, there_B = beta * pairs.mean_margin_B, pairs.there_B
    key, draw = jax.random.split(jax.random.wrap_key_data(state["key"]))
    filled_Q = jnp.arange(QUEUE) < state["seen"]
    lots_Q = jnp.where(filled_Q, jax.random.uniform(draw, (QUEUE,)), -1.0)
    lots, drawn = jax.lax.top_k(lots_Q, max(SOLVED_FOR - len(gap_B), 0))
    gaps_Q = jnp.asarray(state["gaps_Q"])
    gap_N = jnp.concatenate([gap_B, gaps_Q[drawn]])
    gamma_B = tailored(gap_N, jnp.concatenate([there_B, lots >= 0]), mean=beta * gamma, tau=tau)[: len(gap_B)]
    nth_B = jnp.cumsum(there_B) - 1
    place_B = jnp.where(there_B, (state["seen"] + nth_B) % QUEUE, QUEUE)  # beyond the end: dropped
    state = {
        "gaps_Q": gaps_Q.at[place_B].set(jax.lax.stop_gradient(gap_B).astype(gaps_Q.dtype), mode="drop"),
        "seen": state["seen"] + jnp.sum(there_B, dtype=jnp.int32),
        "key": jax.random.key_data(key),
    }
    return LossOut(logistic(gap_B - gamma_B), state)


def aot(pairs: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta (sort(s_w - s_l) - sort(r_w - r_l))), sorted over the batch. arXiv:2406.05882.

    The gradient goes through the order. Each value stands at the pair whose policy margin it has.
    """
    reference_B = PairLogps(pairs.reference_B2, pairs.lengths_B2).sum_margin_B
    return _in_order(pairs.sum_margin_B, reference_B, pairs.there_B, beta, label_smoothing)


def aot_unpaired(pairs: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta (sort(a) - sort(b))): all chosen answers' log-ratios against all rejected ones'. arXiv:2406.05882."""
    chosen_B, rejected_B = pairs.ratios_B2.T
    return _in_order(chosen_B, rejected_B, pairs.there_B, beta, label_smoothing)


def _in_order(x_B, other_B, there_B, beta, label_smoothing) -> jax.Array:
    """The smoothed loss of each x less the `other` of the same rank."""
    ascending_B = other_B[jnp.argsort(jnp.where(there_B, other_B, jnp.inf))]
    against_B = ascending_B[ranks(x_B, there_B)]
    return smoothed(beta * jnp.where(there_B, x_B - against_B, 0.0), label_smoothing)


def running_statistics() -> dict:
    return {"mean": np.float32(0), "std": np.float32(0)}


def standard_statistics() -> dict:
    return {"mean": np.float32(0), "std": np.float32(1)}


def _moved(state: dict, gap_B, there_B) -> dict:
    """Means of mean and standard deviation over batches, nine tenths of it old."""
    gap_B = jax.lax.stop_gradient(gap_B)
    found = {"mean": mean_of(gap_B, there_B), "std": std_of(gap_B, there_B)}
    return {name: 0.9 * state[name] + 0.1 * found[name] for name in found}


def alpha_dpo(
    pairs: PairLogps,
    state: dict,
    *,
    beta: float = 10.0,
    gamma: float = 0.4,
    alpha: float = 0.1,
    label_smoothing: float = 0.0,
    training: bool = True,
) -> LossOut:
    """-log sigmoid(beta (M - gamma - alpha z)), z the standardised gap between the policy's M and the reference's. arXiv:2410.10148.

    Mean and standard deviation of the gap run over batches, updated before they are used, from 0 and 1. Its defaults are not verified.
    """
    gap_B = jax.lax.stop_gradient(pairs.mean_ratio_margin_B)
    state = _moved(state, gap_B, pairs.there_B) if training else state
    z_B = (gap_B - state["mean"]) / jnp.where(state["std"] > 0, state["std"], 1.0)
    values_B = smoothed(beta * (pairs.mean_margin_B - gamma - alpha * z_B), label_smoothing)
    return LossOut(values_B, state)


def random_statistics() -> dict:
    return running_statistics() | {"key": np.array([0, 0], np.uint32)}


def beta_dpo(
    pairs: PairLogps, state: dict, *, beta: float = 0.1, alpha: float = 0.6, keep: float = 0.8, training: bool = True
) -> LossOut:
    """DPO with beta (1 + alpha (mean Delta of the kept pairs - running mean)), at least 1e-3. arXiv:2407.08639.

    A share `keep` of the pairs is drawn, likelier the nearer their Delta is to the running mean; the others count for nothing. In evaluation
    all count. The running mean and standard deviation are updated before they are used. The defaults of alpha and keep are not verified.
    """
    gap_B, there_B = jax.lax.stop_gradient(pairs.ratio_margin_B), pairs.there_B
    if training:
        key, draw = jax.random.split(jax.random.wrap_key_data(state["key"]))
        state = _moved(state, gap_B, there_B) | {"key": jax.random.key_data(key)}
        std = jnp.where(state["std"] > 0, state["std"], 1.0)
        weight_B = -0.5 * ((gap_B - state["mean"]) / std) ** 2
        # Drawing without replacement in proportion to e^weight is taking the largest after adding Gumbel noise.
        lots_B = weight_B + jax.random.gumbel(draw, weight_B.shape, jnp.float32)
        most = jnp.floor(keep * jnp.sum(there_B) + 1e-4)  # 0.8 of 10 is 8 in float32, too
        kept_B = there_B & (ranks(-lots_B, there_B) < most)
    else:
        kept_B = there_B
    used = jnp.maximum(beta * (1 + alpha * (mean_of(gap_B, kept_B) - state["mean"])), 1e-3)
    # The mean over all pairs shall be that over the kept ones.
    share = jnp.sum(there_B) / jnp.maximum(jnp.sum(kept_B), 1)
    values_B = jnp.where(kept_B, share * logistic(used * pairs.ratio_margin_B), 0.0)
    return LossOut(values_B, state, {"beta_used": used})


def label_confidence(eta: float = 0.9) -> dict:
    return {"eta": np.float32(eta)}


def lcpo(pairs: PairLogps, state: dict, *, beta: float = 0.1, lcpo_alpha: float = 0.1) -> LossOut:
    """LCPO (RE-PO) around DPO: an EM estimate of how likely each label is right says which way its pair counts. arXiv:2509.24159.

    With d = loss(swapped) - loss and p = sigmoid(d), a label is right with w = p eta / (p eta + (1 - p) (1 - eta)), and the value is
    -(w log p + (1 - w) log(1 - p)); w has no gradient. eta, 0.9 at first (lcpo_eta), then moves by lcpo_alpha to the mean of w. Around any
    other loss of pairs: give that one lcpo_alpha.
    """
    return in_doubt(dpo(pairs, beta=beta), dpo(pairs.swapped, beta=beta), pairs.there_B, state, lcpo_alpha)


def in_doubt(values_B, swapped_B, there_B, state: dict, alpha) -> LossOut:
    """One step of that EM, from the values of the pairs and those with their answers swapped."""
    eta, d_B = state["eta"], swapped_B - values_B
    w_B = jax.lax.stop_gradient(jax.nn.sigmoid(d_B + jnp.log(eta) - jnp.log1p(-eta)))
    moved = (1 - alpha) * eta + alpha * mean_of(w_B, there_B)
    state = {"eta": jnp.where(jnp.any(there_B), moved, eta)}
    return LossOut(smoothed(d_B, 1 - w_B), state, {"label_confidence": state["eta"]})
