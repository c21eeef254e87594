"""The objectives in float64, pair by pair, as their papers or their code write them, and their slopes by central differences.

Every function has the pairs and `fixed`, the same pairs again: what an objective holds constant (its stop-gradients) is computed from those,
so that moving the pairs alone gives the slopes that a training step must have. It returns one number per pair, or one for each answer,
None where that is not there; those with a running state return (numbers, state).
"""

import copy
import math

import numpy as np


class Pairs:
    """Lists of floats: w and l are (chosen, rejected) sums of log-probs, rw and rl the reference's, nw and nl lengths."""

    def __init__(self, logps, lengths, reference=None, columns=None, terms=None, groups=None):
        self.w, self.l = (np.array([row[k] for row in logps], float) for k in (0, 1))
        self.nw, self.nl = ([float(row[k]) for row in lengths] for k in (0, 1))
        if reference is not None:
            self.rw, self.rl = ([float(row[k]) for row in reference] for k in (0, 1))
        self.columns, self.terms, self.groups = columns or {}, terms or {}, groups or {}

    def __len__(self):
        return len(self.w)

    def a(self, i):
        return self.w[i] - self.rw[i]

    def b(self, i):
        return self.l[i] - self.rl[i]

    def delta(self, i):
        return self.a(i) - self.b(i)

    def mw(self, i):
        return self.w[i] / self.nw[i]

    def ml(self, i):
        return self.l[i] / self.nl[i]

    def margin(self, i):
        return self.mw(i) - self.ml(i)

    def mean_delta(self, i):
        return self.a(i) / self.nw[i] - self.b(i) / self.nl[i]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def cost(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-abs(x))) + max(-x, 0)


def relu(x):
    return max(0.0, x)


def per_pair(function):
    """An objective of one pair at a time: function(p, i, **hparams)."""

    def of(p, fixed, **hparams):
        return [function(p, i, **hparams) for i in range(len(p))]

    return of


def mean(xs):
    return sum(xs) / len(xs)


def std(xs):
    return math.sqrt(sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - 1))


# Reference-free


@per_pair
def repo(p, i, gamma):
    return relu(gamma - p.margin(i))


@per_pair
def repo_pp(p, i, beta, gamma):
    return math.log1p(math.exp(relu(beta * (gamma - p.margin(i)))))


def flipped(x, epsilon):
    return (1 - epsilon) * cost(x) + epsilon * cost(-x)


@per_pair
def simpo(p, i, beta, gamma, label_smoothing=0.0):
    return flipped(beta * p.margin(i) - beta * gamma, label_smoothing)


@per_pair
def simpo_hinge(p, i, beta, gamma):
    return relu(1 - (beta * p.mw(i) - beta * p.ml(i) - beta * gamma))


def token_nll(p, i):
    """The part of pair i in the mean over all chosen tokens, times the number of pairs."""
    return -p.w[i] * len(p) / sum(p.nw)


def cpo(p, fixed, beta, cpo_alpha, label_smoothing=0.0):
    return [flipped(beta * (p.w[i] - p.l[i]), label_smoothing) + cpo_alpha * token_nll(p, i) for i in range(len(p))]


def cpo_simpo(p, fixed, beta, gamma, cpo_alpha, label_smoothing=0.0):
    return [flipped(beta * (p.margin(i) - gamma), label_smoothing) + cpo_alpha * token_nll(p, i) for i in range(len(p))]


@per_pair
def orpo(p, i, beta):
    odds_w = math.exp(p.mw(i)) / (1 - math.exp(p.mw(i)))
    odds_l = math.exp(p.ml(i)) / (1 - math.exp(p.ml(i)))
    return -p.mw(i) + beta * cost(math.log(odds_w / odds_l))


@per_pair
def alphapo(p, i, beta, gamma, alpha):
    def reward(m):
        return (1 - math.exp(m) ** -alpha) / alpha

    return cost(beta * (reward(p.mw(i)) - reward(p.ml(i))) - beta * gamma)


@per_pair
def slic(p, i, delta, slic_lambda):
    return relu(delta - p.w[i] + p.l[i]) + slic_lambda * -p.w[i]


@per_pair
def rrhf(p, i):
    return relu(p.ml(i) - p.mw(i))


def sft(p, fixed, sft_average):
    return [token_nll(p, i) if sft_average == "tokens" else -p.mw(i) for i in range(len(p))]


# With reference


@per_pair
def dpo(p, i, beta):
    return cost(beta * p.delta(i))


@per_pair
def cdpo(p, i, beta, label_smoothing):
    return flipped(beta * p.delta(i), label_smoothing)


@per_pair
def robust(p, i, beta, label_smoothing):
    e, x = label_smoothing, beta * p.delta(i)
    return ((1 - e) * cost(x) - e * cost(-x)) / (1 - 2 * e)


@per_pair
def ipo(p, i, beta, log_ratios):
    margin = p.mean_delta(i) if log_ratios == "mean" else p.delta(i)
    return (margin - 1 / (2 * beta)) ** 2


@per_pair
def hinge(p, i, beta):
    return relu(1 - beta * p.delta(i))


rso_sigmoid_norm, rso_hinge_norm = dpo, hinge


@per_pair
def dpo_norm(p, i, beta):
    return cost(beta * p.mean_delta(i))


@per_pair
def repo_pp_dpo(p, i, beta, gamma):
    return math.log1p(math.exp(relu(beta * (gamma - p.delta(i)))))


@per_pair
def r_dpo(p, i, beta, alpha):
    return cost(beta * p.delta(i) + alpha * (p.nw[i] - p.nl[i]))


def rpo(p, fixed, beta, rpo_alpha):
    return [cost(beta * p.delta(i)) + rpo_alpha * token_nll(p, i) for i in range(len(p))]


@per_pair
def discopop(p, i, beta, discopop_tau):
    x = beta * p.delta(i)
    k = sigmoid(x / discopop_tau)
    return (1 - k) * cost(x) + k * math.exp(-x)


@per_pair
def exo_pair(p, i, beta, label_smoothing):
    q = sigmoid(beta * p.delta(i))
    return q * math.log(q / (1 - label_smoothing)) + (1 - q) * math.log((1 - q) / label_smoothing)


@per_pair
def nca_pair(p, i, beta):
    return cost(beta * p.a(i)) + cost(-beta * p.a(i)) / 2 + cost(-beta * p.b(i)) / 2


@per_pair
def bco_pair(p, i, beta):
    return cost(beta * p.a(i)) + cost(-beta * p.b(i))


@per_pair
def apo_zero(p, i, beta):
    return 1 - sigmoid(beta * p.a(i)) + sigmoid(beta * p.b(i))


@per_pair
def apo_down(p, i, beta):
    return sigmoid(beta * p.a(i)) + 1 - sigmoid(beta * p.delta(i))


@per_pair
def sppo_hard(p, i, beta):
    return (p.a(i) - 1 / (2 * beta)) ** 2 + (p.b(i) + 1 / (2 * beta)) ** 2


@per_pair
def sppo(p, i, beta):
    win, lose = p.columns["win_probability"][i]
    return ((p.a(i) - (win - 0.5) / beta) ** 2 + (p.b(i) - (lose - 0.5) / beta) ** 2) / 2


@per_pair
def inpo(p, i, eta, tau):
    qw, ql = p.columns["previous_logps"][i]
    h = (p.w[i] - p.l[i]) - tau / eta * (p.rw[i] - p.rl[i]) - (eta - tau) / eta * (qw - ql)
    return (h - 1 / (2 * eta)) ** 2


@per_pair
def bpo(p, i, beta, balance_factor, link):
    x = beta * min(p.a(i), -balance_factor * p.b(i))
    return {"logistic": cost(x), "hinge": relu(1 - x), "square": (x - 1) ** 2, "exponential": math.exp(-x)}[link]


@per_pair
def dpop(p, i, beta, dpop_lambda):
    return cost(beta * (p.delta(i) - dpop_lambda * relu(p.rw[i] - p.w[i])))


@per_pair
def cal_dpo(p, i, beta):
    return cost(p.delta(i)) + ((p.a(i) - 1 / (2 * beta)) ** 2 + (p.b(i) + 1 / (2 * beta)) ** 2) / 2


@per_pair
def osp(p, i, beta):
    x, label = beta * p.delta(i), p.columns["label_prob"][i]
    return label * cost(x) + (1 - label) * cost(-x)


@per_pair
def smpo(p, i, beta):
    return cost((2 * p.columns["label_prob"][i] - 1) * beta * p.delta(i))


@per_pair
def pessimistic_dpo(p, i, beta):
    uw, ul = p.columns["uncertainty"][i]
    return cost(beta * p.delta(i) + uw - ul)


@per_pair
def tempered_dpo(p, i, beta, tau):
    return cost(beta * p.delta(i) * math.exp(-sum(p.columns["uncertainty"][i]) / tau))


ld_dpo = poet = d2po = dpo


def wpo_weight(fixed, i):
    sw, sl = fixed.terms["log_sum_p2"][i]
    return math.exp((fixed.w[i] - sw) / fixed.nw[i] + (fixed.l[i] - sl) / fixed.nl[i])


def wpo(p, fixed, beta):
    return [min(1.0, wpo_weight(fixed, i)) * cost(beta * p.delta(i)) for i in range(len(p))]


@per_pair
def tdpo1(p, i, beta):
    dw, dl = p.terms["kl_reference"][i]
    return cost(beta * (p.delta(i) - (dl - dw)))


def tdpo2(p, fixed, beta, alpha):
    out = []
    for i in range(len(p)):
        (constant, _), (_, dl) = fixed.terms["kl_reference"][i], p.terms["kl_reference"][i]
        out.append(cost(beta * (p.delta(i) - alpha * (dl - constant))))
    return out


@per_pair
def rationale_dpo(p, i, beta, rationale_gamma):
    return cost(beta * p.delta(i)) + cost(rationale_gamma * p.groups["rationale"].w[i])


# Of the whole batch


def amapo(p, fixed, beta, label_smoothing, variant):
    margins = [fixed.margin(i) for i in range(len(p))]
    out = []
    for i, m in enumerate(margins):
        if variant == "code":
            gate, exponent = m < mean(margins), mean(margins) * (mean(margins) - m) / std(margins)
        else:
            rewards = [beta * x for x in margins]
            exponent = max((mean(rewards) - beta * m) / std(rewards) * mean(rewards), 0.0)
            gate = exponent > 0
        target = beta * math.exp(exponent) if gate else 0.0
        out.append(flipped(beta * p.margin(i) - target, label_smoothing))
    return out


def shared_out(gaps, gamma0, tau):
    n = len(gaps)
    p = [1 / n] * n
    for _ in range(20):
        gammas = [gamma0 * n * x for x in p]
        slopes = [
            tau * (1 + math.log(n * (x + 1e-10))) + gamma0 * sigmoid(g - gap)
            for x, g, gap in zip(p, gammas, gaps, strict=True)
        ]
        grown = [x * math.exp(-min(0.5 / tau, 1) * slope) for x, slope in zip(p, slopes, strict=True)]
        p = [x / sum(grown) for x in grown]
    return gammas


def gamma_po(p, fixed, beta, gamma, tau):
    gammas = shared_out([beta * fixed.margin(i) for i in range(len(p))], beta * gamma, tau)
    return [cost(beta * p.margin(i) - gammas[i]) for i in range(len(p))]


def gamma_po_dpo(p, fixed, beta, gamma, tau):
    gammas = shared_out([beta * fixed.delta(i) for i in range(len(p))], beta * gamma, tau)
    return [cost(beta * p.delta(i) - (gammas[i] - beta * gamma)) for i in range(len(p))]


def aot(p, fixed, beta, label_smoothing):
    """In ascending order of the policy's margins."""
    ours = sorted(p.w[i] - p.l[i] for i in range(len(p)))
    theirs = sorted(p.rw[i] - p.rl[i] for i in range(len(p)))
    return [flipped(beta * (x - y), label_smoothing) for x, y in zip(ours, theirs, strict=True)]


def aot_unpaired(p, fixed, beta, label_smoothing):
    good, bad = sorted(p.a(i) for i in range(len(p))), sorted(p.b(i) for i in range(len(p)))
    return [flipped(beta * (x - y), label_smoothing) for x, y in zip(good, bad, strict=True)]


def moved(state, gaps):
    return {"mean": 0.9 * state["mean"] + 0.1 * mean(gaps), "std": 0.9 * state["std"] + 0.1 * std(gaps)}


def alpha_dpo(p, fixed, state, beta, gamma, alpha, label_smoothing, training=True):
    gaps = [fixed.mean_delta(i) for i in range(len(p))]
    state = moved(state, gaps) if training else state
    z = [(gap - state["mean"]) / state["std"] for gap in gaps]
    return [flipped(beta * (p.margin(i) - gamma - alpha * z[i]), label_smoothing) for i in range(len(p))], state


def beta_dpo(p, fixed, state, beta, alpha, kept, training=True):
    """`kept`: which pairs were drawn."""
    gaps = [fixed.delta(i) for i in range(len(p))]
    state = moved(state, gaps) if training else state
    used = max(beta * (1 + alpha * (mean([gaps[i] for i in kept]) - state["mean"])), 1e-3)
    return [cost(used * p.delta(i)) * len(p) / len(kept) if i in kept else 0.0 for i in range(len(p))], state


def in_doubt(loss, p, fixed, state, lcpo_alpha, **hparams):
    """`loss` around which EM goes."""

    def both(p):
        return loss(p, p, **hparams), loss(swapped(p), swapped(p), **hparams)

    eta, out, clean = state["eta"], [], []
    for right, wrong, right_now, wrong_now in zip(*both(p), *both(fixed), strict=True):
        q = sigmoid(wrong_now - right_now)
        w = q * eta / (q * eta + (1 - q) * (1 - eta))
        likely = sigmoid(wrong - right)
        out.append(-w * math.log(likely) - (1 - w) * math.log(1 - likely))
        clean.append(w)
    return out, {"eta": (1 - lcpo_alpha) * eta + lcpo_alpha * mean(clean)}


def swapped(p):
    other = copy.copy(p)
    other.w, other.l, other.nw, other.nl = p.l, p.w, p.nl, p.nw
    if hasattr(p, "rw"):
        other.rw, other.rl = p.rl, p.rw
    other.columns = {k: [v[::-1] if np.ndim(v) else v for v in column] for k, column in p.columns.items()}
    return other


def lcpo(p, fixed, state, beta, lcpo_alpha):
    return in_doubt(dpo, p, fixed, state, lcpo_alpha, beta=beta)


# Of single answers


def answers(p):
    return [(i, side) for i in range(len(p)) for side in (0, 1) if (p.nw, p.nl)[side][i] > 0]


def by_answer(p, function):
    there = set(answers(p))
    return [tuple(function(i, side) if (i, side) in there else None for side in (0, 1)) for i in range(len(p))]


def kto(p, fixed, beta, desirable_weight, undesirable_weight):
    rows = fixed.groups["kl"]
    z = max(0.0, mean([(rows.a, rows.b)[side](i) for i, side in answers(rows)]))

    def value(i, side):
        if side == 0:
            return desirable_weight * (1 - sigmoid(beta * (p.a(i) - z)))
        return undesirable_weight * (1 - sigmoid(beta * (z - p.b(i))))

    return by_answer(p, value)


def apo_zero_unpaired(p, fixed, beta, desirable_weight, undesirable_weight):
    def value(i, side):
        good = desirable_weight * (1 - sigmoid(beta * p.a(i))) if side == 0 else None
        return good if side == 0 else undesirable_weight * sigmoid(beta * p.b(i))

    return by_answer(p, value)


def bco(p, fixed, state, beta, anchor, training=True):
    good = [beta * fixed.a(i) for i, side in answers(p) if side == 0]
    bad = [beta * fixed.b(i) for i, side in answers(p) if side == 1]
    count = state["count"] + len(good + bad)
    if anchor == "balanced":
        own = (mean(good) + mean(bad)) / 2
        shift = own if state["count"] == 0 else 0.9 * state["mean"] + 0.1 * own
    else:
        shift = (state["count"] * state["mean"] + sum(good + bad)) / count
    new = {"mean": shift, "count": count}
    used = mean(good + bad) if anchor == "batch" else shift if training else state["mean"]
    values = by_answer(p, lambda i, side: cost(beta * p.a(i) - used) if side == 0 else cost(used - beta * p.b(i)))
    return values, new


def npo(p, fixed, beta, retain_weight):
    """So that the mean over all answers is the mean of those to forget and the token-mean of those to keep."""
    there = answers(p)
    forget, tokens = sum(side for _, side in there), sum(p.nw[i] for i, side in there if side == 0)

    def value(i, side):
        if side == 0:
            return retain_weight * -p.w[i] / tokens * len(there)
        return -2 / beta * math.log(sigmoid(-beta * p.b(i))) / forget * len(there)

    return by_answer(p, value)


def total(values):
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return math.fsum(x for x in flat if x is not None)


def slopes(value, p, h=1e-5):
    """d value(p) / d each log-prob [B, 2], by central differences; `value` holds constant what is to be."""
    out = np.zeros((len(p), 2))
    for i in range(len(p)):
        for side, name in enumerate("wl"):
            at = []
            for sign in (1, -1):
                other = copy.copy(p)
                setattr(other, name, getattr(p, name).copy())
                getattr(other, name)[i] += sign * h
                at.append(value(other))
            out[i, side] = (at[0] - at[1]) / (2 * h)
    return out
