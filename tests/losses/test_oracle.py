"""Every objective's values and slopes against a float64 oracle that works pair by pair, and against published numbers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_pairs import FIXTURE, Given, double, random_pairs, slopes_of, there, token_pair, values_of
from oracles import losses as oracle

from repo_jax.losses import ALIASES, CHOICES, LOSSES, hyperparameters, make_loss

# A running state in the middle of training, for the package and for the oracle.
STATES = {
    "alpha_dpo": {"mean": 0.1, "std": 0.7},
    "beta_dpo": {"mean": 0.3, "std": 1.7},
    "lcpo": {"eta": 0.8},
    "bco": {"mean": 0.02, "count": 50.0},
}
VARIANTS = [
    (name, {key: choice})
    for name, loss in LOSSES.items()
    for key in hyperparameters(loss)
    for choice in CHOICES.get(key, ())
]
# Away from the defaults, so that no hyperparameter is forgotten.
OTHERS = {
    "gamma": 0.9,
    "beta": 0.7,
    "label_smoothing": 0.23,
    "alpha": 0.4,
    "cpo_alpha": 0.6,
    "rpo_alpha": 0.3,
    "delta": 2.0,
    "slic_lambda": 0.3,
    "dpop_lambda": 3.0,
    "discopop_tau": 0.4,
    "balance_factor": 0.6,
    "eta": 0.2,
    "tau": 0.15,
    "rationale_gamma": 0.05,
    "keep": 0.5,
    "desirable_weight": 1.3,
    "undesirable_weight": 0.7,
    "retain_weight": 0.4,
    "lcpo_alpha": 0.3,
}


def oracle_of(name):
    return getattr(oracle, name.replace("++", "_pp"))


def state_of(name):
    if name == "gamma_po_queue":
        return jax.tree.map(jnp.asarray, LOSSES[name].initial_state())
    state = {key: jnp.asarray(value) for key, value in STATES.get(name, {}).items()}
    return state | ({"key": jnp.array([0, 7], jnp.uint32)} if name == "beta_dpo" else {})


def expected(name, given, hparams, *, kept=(), fixed=None, training=True):
    """numbers(p) of the oracle, what is to be constant held so, and its new state."""
    p = given.for_oracle
    if name == "gamma_po_queue":
        start = [float(x) for x in state_of(name)["gaps_Q"][:8]]

        def numbers(q):
            gaps = start + [hparams["beta"] * p.margin(i) for i in range(len(p))]
            gammas = oracle.shared_out(gaps, hparams["beta"] * hparams["gamma"], hparams["tau"])[8:]
            return [oracle.cost(hparams["beta"] * q.margin(i) - gammas[i]) for i in range(len(p))]

        return numbers, None
    if name == "beta_dpo":
        hparams = {key: value for key, value in hparams.items() if key != "keep"} | {"kept": kept}
    function = oracle_of(name)
    if name not in STATES:
        return (lambda q: function(q, p, **hparams)), None
    own = {} if name == "lcpo" else {"training": training}
    return (
        lambda q: function(q, p, STATES[name], **hparams, **own)[0],
        function(p, p, STATES[name], **hparams, **own)[1],
    )


def as_rows(numbers) -> np.ndarray:
    """[B] or [B, 2], 0 where no answer is."""
    return np.array([[x or 0.0 for x in one] if isinstance(one, tuple) else one for one in numbers], float)


def assert_equals_oracle(name, given, hparams):
    """Values, slopes and state in float64, with pairs that are not there in between."""
    with double():
        loss, hparams = make_loss(name, **hparams)
        own = {"state": state_of(name)} if loss.initial_state else {}
        absent = (0, 2, 9)
        pairs = given.with_absent(absent).pairs(jnp.float64)
        out = loss(pairs, **own, **hparams)
        values, counted = out.values, there(out.values, pairs)
        slopes = np.asarray(slopes_of(loss, pairs, hparams, **own).logps_B2)
    rows = np.asarray(pairs.lengths_B2).any(axis=1)
    values = np.where(counted, values, 0)[rows]
    kept = np.flatnonzero(values)
    numbers, state = expected(name, given, hparams, kept=kept)
    wanted, wanted_slopes = (
        as_rows(numbers(given.for_oracle)),
        oracle.slopes(lambda p: oracle.total(numbers(p)), given.for_oracle),
    )
    if name.startswith("aot"):  # the oracle's are in order
        values, wanted = np.sort(values), np.sort(wanted)
    np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(slopes[rows], wanted_slopes, rtol=1e-5, atol=1e-6 * np.abs(wanted_slopes).max())
    np.testing.assert_array_equal(slopes[~rows], 0)
    for key, value in (state or {}).items():
        np.testing.assert_allclose(out.state[key], value, rtol=1e-9, err_msg=key)


def batch_for(name, seed):
    return random_pairs(seed, single=LOSSES[name].layout == "answers")


@pytest.mark.parametrize("name", LOSSES)
def test_values_slopes_and_state_equal_the_oracle(name):
    assert_equals_oracle(name, batch_for(name, 0), {})


@pytest.mark.parametrize("name", [name for name in LOSSES if hyperparameters(LOSSES[name])])
def test_every_hyperparameter_is_read_as_the_oracle_reads_it(name):
    numbers = {key: OTHERS[key] for key in hyperparameters(LOSSES[name]) if key not in CHOICES}
    assert_equals_oracle(name, batch_for(name, 1), numbers)


@pytest.mark.parametrize("name, form", VARIANTS)
def test_every_form_equals_the_oracle(name, form):
    assert_equals_oracle(name, batch_for(name, 2), form)


@pytest.mark.parametrize("name", LOSSES)
def test_in_float32_values_are_those_of_float64(name):
    loss, hparams = make_loss(name)
    given = batch_for(name, 3).with_absent((0, 2, 9))
    found = values_of(loss, given.pairs(), hparams, state=state_of(name))
    with double():
        wanted = np.asarray(values_of(loss, given.pairs(jnp.float64), hparams, state=state_of(name)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)


# Published numbers, of the fixture: (loss, hyperparameters, mean) or (loss, hyperparameters, values).
NUMBERS = [
    ("repo", {"gamma": 0.4}, [0.35, 0, 0.5, 0.8]),
    ("repo++", {"beta": 2, "gamma": 0.4}, [1.103186, 0.693147, 1.313262, 1.783901]),
    ("repo++_dpo", {"beta": 0.1, "gamma": 0.4}, [0.693147, 0.792653, 0.693147, 0.693147]),
    ("simpo", {"beta": 2, "gamma": 0.25}, [0.913015, 0.437488, 1.103186, 1.541008]),
    ("simpo", {"beta": 2, "gamma": 0.25, "label_smoothing": 0.1}, 0.953674),
    ("simpo", {"beta": 10, "gamma": 0.3}, 3.419210),
    ("simpo_hinge", {"beta": 2, "gamma": 0.25}, 1.45),
    ("cpo", {"beta": 0.1, "cpo_alpha": 0}, [0.554355, 0.798139, 0.644397, 0.554355]),
    ("cpo", {}, 2.010361),
    ("cpo_simpo", {}, 5.407017),
    ("orpo", {"beta": 0.1}, 1.458122),
    ("slic", {"delta": 1, "slic_lambda": 0.1}, [1.2, 5, 0.8, 3]),
    ("slic", {"slic_lambda": 0}, 0.75),
    ("rrhf", {}, 0.125),
    ("alphapo", {"alpha": 0.25, "beta": 2.5, "gamma": 0.2}, [0.871820, 0.198740, 1.218744, 2.026010]),
    ("dpo", {"beta": 0.1}, [0.598139, 0.770957, 0.620957, 0.513015]),
    ("cdpo", {"label_smoothing": 0.1}, 0.640767),
    ("robust", {"label_smoothing": 0.1}, [0.573139, 0.789707, 0.602207, 0.463015]),
    ("hinge", {"beta": 0.1}, 0.85),
    ("ipo", {"beta": 0.1, "log_ratios": "sum"}, 16.125),
    ("ipo", {"beta": 0.1}, 23.816220),
    ("dpo_norm", {"beta": 5}, 0.492659),
    ("r_dpo", {"beta": 0.1, "alpha": 0.01}, 0.631575),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, 2.512328),
    ("nca_pair", {"beta": 0.1}, 1.352070),
    ("apo_zero", {"beta": 0.1}, 0.962655),
    ("apo_down", {"beta": 0.1}, 0.972239),
    ("apo_zero_unpaired", {"beta": 0.1}, 0.962655 / 2),
    ("aot", {"beta": 0.1}, 0.624219),
    ("aot_unpaired", {"beta": 0.1}, 0.621424),
    ("discopop", {"beta": 0.1, "discopop_tau": 0.05}, [0.814763, 0.789495, 0.849338, 0.670267]),
    ("bpo", {"balance_factor": 0.3}, [0.678260, 0.744397, 0.678260, 0.649159]),
    ("bpo", {"link": "hinge"}, 0.9875),
    ("bpo", {"balance_factor": 1}, 0.675412),
    ("dpop", {"beta": 0.1, "dpop_lambda": 50}, 1.721973),
    ("cal_dpo", {"beta": 0.1}, 19.824476),
    ("amapo", {"beta": 2}, [0.644397, 0.287335, 2.319328, 2.910268]),
    ("amapo", {"beta": 2, "variant": "paper"}, 1.557123),
    ("gamma_po", {"beta": 10, "gamma": 0.4, "tau": 10}, 4.033382),
    ("gamma_po_dpo", {"beta": 0.1, "gamma": 0.4}, 0.625767),
    ("bco_pair", {"beta": 0.1}, 1.315814),
    ("bco", {"beta": 0.1}, 0.657733),
    ("npo", {"beta": 0.1, "retain_weight": 0}, 12.808041),
    ("osp", {"beta": 0.1}, 0.673892),
    ("smpo", {"beta": 0.1}, 0.668131),
    ("pessimistic_dpo", {"beta": 0.1}, 0.497867),
    ("tempered_dpo", {"beta": 0.1, "tau": 1}, 0.657789),
    ("sppo_hard", {"beta": 0.1}, 38.625),
    ("sppo", {"beta": 0.1}, 9.4375),
    ("inpo", {"eta": 0.1, "tau": 0.1 / 3}, [11.111111, 46.694444, 14.694444, 1.777778]),
    ("rpo", {"beta": 0.1, "rpo_alpha": 0.2}, 0.900277),
    ("lcpo", {"beta": 0.1}, 0.635854),
]


@pytest.mark.parametrize("name, hparams, wanted", NUMBERS)
def test_the_fixture_has_the_published_numbers(name, hparams, wanted):
    loss, hparams = make_loss(name, **hparams)
    state = None if loss.initial_state is None else loss.initial_state()
    values = values_of(loss, FIXTURE.pairs(), hparams, state=state)
    np.testing.assert_allclose(values if isinstance(wanted, list) else values.mean(), wanted, rtol=1e-6, atol=1e-6)


def test_kto_has_the_published_numbers():
    ratios = Given(np.array([[0.8, 0.8]]), np.ones((1, 2)), np.zeros((1, 2)))
    loss, hparams = make_loss("kto", beta=0.1)
    values = values_of(loss, FIXTURE._replace(groups={"kl": ratios}).pairs(), hparams)
    wanted = [[0.495, 0.544879, 0.507499, 0.495], [0.455121, 0.492501, 0.455121, 0.406127]]
    np.testing.assert_allclose(values.T, wanted, atol=1e-6)


def test_losses_of_tokens_have_the_published_numbers():
    decay = [0.98 ** np.arange(1, n + 1) for n in (3, 5)]
    tis = np.array([0.7, 1.3, 1]), np.array([1.3, 0.7, 1, 1, 1])
    for name, given, wanted in [
        ("dpo", token_pair(), 0.644397),
        ("poet", token_pair(keep=(3, 3)), 0.649159),
        ("ld_dpo", token_pair(1.0, np.array([1, 1, 1, 0.5, 0.5])), 0.646775),
        ("d2po", token_pair(*decay), 0.646274),
        ("dpo", token_pair(*tis), 0.650115),
        ("tdpo1", token_pair(terms={"kl_reference": np.array([[0.17, 0.18]])}), 0.644872),
        ("tdpo2", token_pair(terms={"kl_reference": np.array([[0.17, 0.18]])}), 0.644634),
    ]:
        loss, hparams = make_loss(name)
        np.testing.assert_allclose(values_of(loss, given.pairs(), hparams), wanted, rtol=1e-6, err_msg=name)
    poet, hparams = make_loss("simpo", beta=2, gamma=0.25)
    np.testing.assert_allclose(values_of(poet, token_pair(keep=(3, 3)).pairs(), hparams), 1.488998, rtol=1e-6)


def test_wpo_and_the_rationale_have_the_published_numbers():
    weights = np.array([0.8, 0.5, 1.0, 0.2])
    mean_B2 = FIXTURE.logps / FIXTURE.lengths
    # The chosen side alone makes the weight: its mean of log p - log sum p^2 is log weight.
    sums = np.stack([mean_B2[:, 0] - np.log(weights), mean_B2[:, 1]], axis=1) * FIXTURE.lengths
    loss, hparams = make_loss("wpo")
    values = values_of(loss, FIXTURE._replace(terms={"log_sum_p2": sums}).pairs(), hparams)
    np.testing.assert_allclose(values.mean(), 0.396887, atol=1e-6)
    why = Given(np.array([[-25.0, 0]] * 4), np.array([[9.0, 0]] * 4))
    loss, hparams = make_loss("rationale_dpo")
    values = values_of(loss, FIXTURE._replace(groups={"rationale": why}).pairs(), hparams)
    np.testing.assert_allclose(values.mean(), 3.204657, rtol=1e-6)


def test_lcpo_around_ipo_has_the_published_number_and_moves_its_confidence():
    loss, hparams = make_loss("ipo", beta=0.1, lcpo_alpha=0.1)
    out = loss(FIXTURE.pairs(), state=loss.initial_state(), **hparams)
    np.testing.assert_allclose(out.values.mean(), 0.325980, rtol=1e-5)
    loss, hparams = make_loss("lcpo")
    out = loss(FIXTURE.pairs(), state=loss.initial_state(), **hparams)
    np.testing.assert_allclose(out.state["eta"], 0.901142, rtol=1e-6)


# Slopes beside those of the pairs' own log-probs.


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_slopes_in_the_vocabulary_terms_equal_the_oracle(name):
    given, h = random_pairs(4), 1e-5
    loss, hparams = make_loss(name)
    with double():
        slopes_B2 = np.asarray(slopes_of(loss, given.pairs(jnp.float64), hparams).terms["kl_reference"])
    numbers, _ = expected(name, given, hparams)

    def moved(index, by):
        other = copy.copy(given.for_oracle)
        term = given.terms["kl_reference"].copy()
        term[index] += by
        other.terms = {"kl_reference": term}
        return oracle.total(numbers(other))

    wanted = [[(moved((i, k), h) - moved((i, k), -h)) / (2 * h) for k in (0, 1)] for i in range(len(given.logps))]
    np.testing.assert_allclose(slopes_B2, wanted, rtol=1e-5, atol=1e-9)
    assert (slopes_B2[:, 0] == 0).all() == (name == "tdpo2")  # the chosen answer's is held constant


def test_the_rationale_has_slopes_and_mismatched_rows_have_none():
    given = random_pairs(5)
    loss, hparams = make_loss("rationale_dpo")
    slopes_B2 = np.asarray(slopes_of(loss, given.pairs(), hparams).groups["rationale"].logps_B2)
    sums, gamma = given.groups["rationale"].logps[:, 0], hparams["rationale_gamma"]
    np.testing.assert_allclose(slopes_B2[:, 0], [-gamma * oracle.sigmoid(-gamma * s) for s in sums], rtol=1e-5)
    np.testing.assert_array_equal(slopes_B2[:, 1], 0)
    loss, hparams = make_loss("kto")
    assert not np.asarray(slopes_of(loss, given.pairs(), hparams).groups["kl"].logps_B2).any()


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].terms])
def test_terms_that_weigh_are_constant(name):
    loss, hparams = make_loss(name)
    slopes = slopes_of(loss, random_pairs(6).pairs(), hparams)
    assert ("log_sum_p2" in loss.terms) == (not np.asarray(slopes.terms[loss.terms[0]]).any())


# Running states


@pytest.mark.parametrize("name", ["alpha_dpo", "bco"])
def test_in_evaluation_a_running_state_is_used_as_it_is(name):
    given = batch_for(name, 7)
    with double():
        loss, hparams = make_loss(name)
        pairs = given.pairs(jnp.float64)
        values = np.asarray(values_of(loss, pairs, hparams, state=state_of(name), training=False))
        counted = np.asarray(there(values, pairs))
    numbers, _ = expected(name, given, hparams, training=False)
    np.testing.assert_allclose(np.where(counted, values, 0), as_rows(numbers(given.for_oracle)), rtol=1e-9)


def test_beta_dpo_keeps_its_share_likelier_near_the_mean_and_draws_anew_each_time():
    loss, hparams = make_loss("beta_dpo")
    pairs, state, counts, draws = (
        random_pairs(8, n=10).with_absent((4,)).pairs(),
        state_of("beta_dpo"),
        np.zeros(11),
        set(),
    )
    for _ in range(60):
        out = loss(pairs, state=state, **hparams)
        kept = np.asarray(out.values) != 0
        assert kept.sum() == 8
        counts, state = counts + kept, state | {"key": out.state["key"]}
        draws.add(kept.tobytes())
    assert len(draws) > 10 and counts[4] == 0
    far = np.abs(np.asarray(pairs.ratio_margin_B) - float(loss(pairs, state=state, **hparams).state["mean"]))
    far[4] = np.nan
    assert counts[np.nanargmax(far)] < counts[np.nanargmin(far)]
    everything = loss(pairs, state=state, training=False, **hparams).values
    assert (np.asarray(everything) != 0).sum() == 10


def test_the_queue_remembers_the_gaps_of_the_last_pairs():
    loss, hparams = make_loss("gamma_po_queue", beta=2.0)
    state, seen = loss.initial_state(), list(loss.initial_state()["gaps_Q"][:8])
    step = jax.jit(lambda pairs, state: loss(pairs, state=state, **hparams).state)
    for seed in range(3):
        given = random_pairs(seed, n=700)
        state = step(given.with_absent((3, 5)).pairs(), state)
        seen += [2.0 * given.for_oracle.margin(i) for i in range(700)]
    assert state["seen"] == len(seen) == 2108
    np.testing.assert_allclose(np.sort(state["gaps_Q"]), np.sort(seen[-2048:]), rtol=1e-5, atol=1e-6)


def test_another_sample_of_the_queue_is_drawn_each_time():
    loss, hparams = make_loss("gamma_po_queue")
    pairs, state = random_pairs(0, n=250).pairs(), loss.initial_state()
    first = loss(pairs, state=state, **hparams)  # six of the eight are drawn
    again = loss(pairs, state=state, **hparams)
    other = loss(pairs, state=state | {"key": first.state["key"]}, **hparams)
    np.testing.assert_array_equal(first.values, again.values)
    assert (np.asarray(first.values) != np.asarray(other.values)).any()


def test_margins_shared_out_meet_the_condition_of_their_optimum():
    given, (beta, gamma, tau) = random_pairs(9, n=20), (2.0, 0.4, 5.0)
    gaps = beta * np.array([given.for_oracle.margin(i) for i in range(20)])
    from repo_jax.losses.batch import tailored

    gammas = np.asarray(tailored(jnp.asarray(gaps), jnp.ones(20, bool), mean=beta * gamma, tau=tau), np.float64)
    np.testing.assert_allclose(gammas.mean(), beta * gamma, rtol=1e-5)
    slope = tau * np.log(gammas / (beta * gamma)) + beta * gamma * np.array([oracle.sigmoid(g) for g in gammas - gaps])
    np.testing.assert_allclose(slope, slope.mean(), rtol=1e-3)
    assert (np.diff(gammas[np.argsort(gaps)]) > 0).all()  # a clearer pair has a larger margin


def test_aliases_name_the_same_functions():
    for alias, name in ALIASES.items():
        assert make_loss(alias)[0].fn is LOSSES[name].fn
