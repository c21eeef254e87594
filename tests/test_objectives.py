"""The step carries whatever a loss declares: reference, columns, terms, groups, state, progress, answers by themselves.

For every loss of the table, and for some that use a declaration each: direct = two passes, 1 = 4 micro-batches, 1 = 8 devices, state included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import TINY, one_device, pair_of, random_pairs, random_params

from repo_jax.data.rows import RowShape, known_of, row_batches
from repo_jax.logps import pair_logps
from repo_jax.losses import LOSSES, Loss, LossOut, PairLogps, hyperparameters, make_loss
from repo_jax.models.decoder import Decoder, output_head, param_shapes
from repo_jax.sharding import make_mesh, param_shardings
from repo_jax.state import initial_loss_state, initial_state, state_shapes, state_shardings
from repo_jax.step import Scorer, TrainStep, join, mean_of, quiet, sequences, takes_two_passes, weigh

B = 12


def dpo(pairs, *, beta=0.1):
    return jax.nn.softplus(-beta * pairs.ratio_margin_B)


def centred(pairs, *, beta=1.0):
    """Couples pairs: each margin against their mean."""
    return jax.nn.softplus(-beta * (pairs.mean_margin_B - pairs.mean_margin_B.mean()))


def shifted(pairs, *, beta=0.1, state, training):
    """Keeps a running mean of all ratios, to which a batch is added before it is used; in evaluation it is not."""
    there_B2 = pairs.there_B2
    total = state["sum"] + jnp.sum(pairs.ratios_B2, where=there_B2)
    count = state["count"] + there_B2.sum()
    new = {"sum": total, "count": count} if training else state
    shift = jax.lax.stop_gradient(new["sum"] / jnp.maximum(new["count"], 1))
    signs_B2 = jnp.array([[1.0, -1.0]]) * beta * (pairs.ratios_B2 - shift)
    return LossOut(jax.nn.softplus(-signs_B2), new, {"shift": shift})


def start_of_shifted():
    return {"sum": np.float32(0), "count": np.float32(0)}


def by_answer(pairs, *, beta=0.1):
    return 1 - jax.nn.sigmoid(beta * jnp.array([[1.0, -1.0]]) * pairs.ratios_B2)


def margin_of_data(pairs, *, beta=1.0):
    return jax.nn.softplus(-beta * (pairs.mean_margin_B - pairs.columns["margin"]))


def token_mean_sft(pairs):
    """Divides by the tokens of the whole batch, which both forms know."""
    return -pairs.logps_B2[:, 0] * len(pairs.lengths_B2) / pairs.lengths_B2[:, 0].sum()


def odds(pairs, *, beta=0.5):
    """ORPO's form, which has no value at a log-prob of 0."""
    log_odds_B2 = pairs.mean_B2 - jnp.log(-jnp.expm1(pairs.mean_B2))
    return jax.nn.softplus(-beta * (log_odds_B2[:, 0] - log_odds_B2[:, 1]))


def of_two_forms(pairs, *, gamma=0.5, form="hinge"):
    margin_B = pairs.mean_margin_B
    return jax.nn.relu(gamma - margin_B) if form == "hinge" else jax.nn.softplus(gamma - margin_B)


def scheduled(pairs, *, gamma=1.0, gamma_end=0.2, progress):
    return jax.nn.relu(gamma + (gamma_end - gamma) * progress - pairs.mean_margin_B)


def peaked(pairs, *, scale=0.5):
    """Pushes on a term as well as on log-probs."""
    return jax.nn.softplus(-pairs.mean_margin_B) + scale * (pairs.terms["log_sum_p2"] / pairs.lengths_B2).sum(axis=1)


def token_level(pairs, *, beta=0.1, alpha=0.5):
    """TDPO2's form: token-level divergences from the whole distributions of a reference model that runs along."""
    kl_B2 = pairs.terms["kl_reference"]
    margin_B = pairs.ratio_margin_B - alpha * (kl_B2[:, 1] - jax.lax.stop_gradient(kl_B2[:, 0]))
    return jax.nn.softplus(-beta * margin_B)


def from_mismatched(pairs, *, beta=0.1):
    kl = pairs.groups["kl"]
    shift = jnp.sum(kl.ratios_B2, where=kl.there_B2) / jnp.maximum(kl.there_B2.sum(), 1)
    shift = jnp.maximum(jax.lax.stop_gradient(shift), 0)
    return 1 - jax.nn.sigmoid(beta * jnp.array([[1.0, -1.0]]) * (pairs.ratios_B2 - shift))


def with_rationale(pairs, *, gamma=0.1):
    return jax.nn.softplus(-pairs.mean_margin_B) - jax.nn.log_sigmoid(gamma * pairs.groups["rationale"].logps_B2[:, 0])


OWN = {
    "plain_dpo": Loss(dpo, reference=True),
    "centred": Loss(centred, coupled=True),
    "shifted": Loss(shifted, reference=True, coupled=True, initial_state=start_of_shifted, layout="answers"),
    "by_answer": Loss(by_answer, reference=True, layout="answers"),
    "margin_of_data": Loss(margin_of_data, columns=("margin",)),
    "token_mean_sft": Loss(token_mean_sft),
    "odds": Loss(odds),
    "of_two_forms": Loss(of_two_forms),
    "scheduled": Loss(scheduled),
    "peaked": Loss(peaked, terms=("log_sum_p2",)),
    "token_level": Loss(token_level, reference=True, terms=("kl_reference",)),
    "from_mismatched": Loss(from_mismatched, reference=True, groups=("kl",), layout="answers"),
    "with_rationale": Loss(with_rationale, groups=("rationale",)),
}


def made(name):
    """The loss of that name and its hyperparameters, of those here or of the table."""
    if name in OWN:
        own = {k: v for k, v in hyperparameters(OWN[name]).items() if k not in ("state", "progress", "training")}
        return OWN[name], own
    return make_loss(name)


NAMES = [*OWN, *LOSSES]
COLUMNS = {"margin": 0.1, "label_prob": 0.9, "weight": 0.5, "score_chosen": 2.0, "score_rejected": 1.0}


@functools.cache
def pairs_for(name, unpaired=False):
    """Pairs with whatever the loss asks for; unpaired ones have every other answer only."""
    loss, _ = made(name)
    rng, found = np.random.default_rng(5), []
    for i in range(B // (1 + len(loss.groups))):  # so that all losses score as many sequences
        lengths = rng.integers(2, 16, 3)
        if unpaired:
            lengths[1 + i % 2] = 0
        pair = pair_of(rng, tuple(lengths), V=TINY.V, name=f"pair {i}")
        groups = {}
        for group in loss.groups:
            sides = (lengths[1], lengths[2]) if group == "kl" else (7, 0)
            other = pair_of(rng, (int(lengths[0]), *map(int, sides)), V=TINY.V)
            groups[group] = other._replace(reference_2=np.float32(rng.normal(-20, 3, 2)))
        noise = rng.normal(0, 0.2)
        columns = {column: float(COLUMNS.get(column, 0.5) + abs(noise) * 0.1) for column in loss.columns}
        columns |= {column: (0.6 + 0.1 * noise, 0.4 - 0.1 * noise) for column in loss.answer_columns}
        reference = np.float32(rng.normal(-3.9 * np.array(lengths[1:]), 1)) if loss.reference else None
        found.append(pair._replace(columns=columns, groups=groups, reference_2=reference))
    return found


@functools.cache
def base(axes, rows, keeps=False):
    """A step whose programs all losses share."""
    mesh = one_device() if axes == (1, 1, 1) else make_mesh(*axes)
    model, optimizer, params = Decoder(TINY, jnp.float32), optax.sgd(0.05), random_params(TINY)
    shardings = state_shardings(state_shapes(param_shapes(TINY), optimizer), optimizer, mesh)
    scorer = Scorer(model, *make_loss("repo"), mesh, [RowShape(rows, 64, 48)])
    # A reference model that is near, but another.
    other = jax.tree.map(lambda leaf, noise: leaf + 0.1 * noise, params, random_params(TINY, seed=1))
    live = {"params": jax.device_put(other, param_shardings(other, mesh))}
    options = {"mode": "auto", "total_steps": 10, "live": live, "keeps": keeps}
    step = TrainStep(scorer, model, scorer.loss, optimizer, shardings, **options)
    return scorer, step, jax.device_put(params, param_shardings(params, mesh)), optimizer, shardings


@functools.cache
def step_for(name, axes=(1, 1, 1), rows=12, keeps=False):
    scorer, step, params, *_ = base(axes, rows, keeps)
    return step.of(scorer.of(*made(name)), "auto"), params


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def gradient(name, unpaired=False, form=None, update=3, **options):
    step, params = step_for(name, **options)
    return step.mean_grads(params, pairs_for(name, unpaired), form=form, update=update)


def assert_same(one, other, what):
    (grads, metrics), (wanted_grads, wanted) = one, other
    norm = np.linalg.norm(flat(wanted_grads))
    assert norm > 0 and np.isfinite(flat(grads)).all(), what
    assert np.linalg.norm(flat(grads) - flat(wanted_grads)) <= 1e-5 * norm, what
    for key in set(wanted) - {"padding_fraction", "two_pass"}:
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=2e-5, atol=1e-5, err_msg=f"{what}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_each_micro_batch_weighs_its_part_of_the_whole_batch(name):
    """The slopes of the direct form, whose losses see one micro-batch, are those of the whole batch."""
    loss, hparams = made(name)
    scored = scored_by(name)
    whole = weigh(scored, hparams, initial_loss_state(loss), 0.3, loss=loss, training=True).slopes
    assert np.isfinite(flat(whole)).all() and np.any(flat(whole) != 0)
    if takes_two_passes(loss):
        return

    def part(pairs, here_B):
        here_B2 = pairs.there_B2 & here_B[:, None]
        scored = jax.tree.map(lambda x: x * here_B2, (pairs.logps_B2, pairs.terms))  # 0 where it is not scored yet
        pairs = quiet(pairs._replace(logps_B2=scored[0], terms=scored[1]), here_B2)
        return mean_of(
            loss(pairs, progress=0.3, **hparams).values,
            pairs.lengths_B2,
            here_B2,
            layout=loss.layout,
        )

    parts = [jax.grad(part)(scored, jnp.arange(len(scored.lengths_B2)) % 3 == k) for k in range(3)]
    total = jax.tree.map(lambda *xs: sum(xs), *[(one.logps_B2, dict(one.terms)) for one in parts])
    np.testing.assert_allclose(flat(total), flat(whole), rtol=1e-5, atol=1e-7)


def scored_by(name):
    """What a model like any other might have scored."""
    pairs = sequences(pairs_for(name), made(name)[0].groups)
    known, rng = jax.tree.map(jnp.asarray, known_of(pairs, len(pairs))), np.random.default_rng(7)
    logps_B2 = jnp.float32(-rng.uniform(1, 4, known.lengths_B2.shape)) * known.lengths_B2
    terms = {name: jnp.float32(-rng.uniform(0.5, 2, logps_B2.shape)) * known.lengths_B2 for name in made(name)[0].terms}
    return join(PairLogps(logps_B2, known.lengths_B2, terms=terms), known, groups=made(name)[0].groups)


# One of each kind that the step knows; of the others, and of all in the table: pytest -m slow.
KINDS = ("plain_dpo", "shifted", "scheduled", "token_level", "from_mismatched", "with_rationale")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in KINDS]


@pytest.mark.parametrize("name", [*KINDS, *SLOW])
def test_form_and_micro_batches_change_nothing(name):
    wanted = gradient(name, form="two_pass")
    if not takes_two_passes(made(name)[0]):
        assert_same(gradient(name, form="direct", rows=3), wanted, "direct, 4 micro-batches")
    assert_same(gradient(name, form="two_pass", rows=3), wanted, "4 micro-batches")
    assert_same(gradient(name, form="two_pass", rows=3, keeps=True), wanted, "4 micro-batches, layer inputs kept")


@pytest.mark.parametrize("name", [*KINDS, *SLOW])
def test_eight_devices_equal_one(name):
    ours = gradient(name, form="two_pass", axes=(2, 2, 2), rows=12, keeps=True)
    assert_same(ours, gradient(name, form="two_pass"), "two_pass, layer inputs kept")


@pytest.mark.parametrize(
    "name", ["plain_dpo", *(pytest.param(x, marks=pytest.mark.slow) for x in NAMES if x != "plain_dpo")]
)
def test_eight_devices_equal_one_in_direct_form_too(name):
    if not takes_two_passes(made(name)[0]):
        assert_same(gradient(name, form="direct", axes=(1, 8, 1), rows=8), gradient(name, form="two_pass"), "direct")


def run(name, n=3, unpaired=False, start=None, **options):
    """The state, the losses and what a loss logs, over n updates."""
    step, params = step_for(name, **options)
    loss, (_, _, _, optimizer, shardings) = made(name)[0], base(**{"axes": (1, 1, 1), "rows": 12} | options)
    shardings = shardings._replace(loss_state=jax.tree.map(lambda _: shardings.step, initial_loss_state(loss)))
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, shardings, loss) if start is None else start
    logged = []
    for _ in range(n):
        state, metrics = step(state, pairs_for(name, unpaired))
        logged.append({key: float(value) for key, value in metrics.items()})
    return jax.device_get(state), logged


@pytest.mark.parametrize("options", [{"rows": 3}, {"axes": (2, 2, 2), "rows": 12}], ids=str)
def test_a_running_state_is_one_function_of_the_updates_too(options):
    (state, logged), (wanted, wanted_logged) = run("shifted", **options), run("shifted")
    np.testing.assert_allclose(flat(state.loss_state), flat(wanted.loss_state), rtol=1e-5)
    assert wanted.loss_state["count"] == 3 * 2 * B and wanted_logged[0]["shift"] != wanted_logged[1]["shift"]
    np.testing.assert_allclose([x["loss"] for x in logged], [x["loss"] for x in wanted_logged], rtol=1e-5)


def test_evaluation_leaves_the_state_as_it_is_and_uses_it_as_it_is():
    scorer, _, params, *_ = base((1, 1, 1), 12)
    scorer = scorer.of(*made("shifted"))
    scored = scorer({"params": params}, scorer.rows(pairs_for("shifted")))
    state = {"sum": np.float32(30), "count": np.float32(10)}
    weighed = scorer.weigh(scored, state)
    assert weighed.metrics["shift"] == 3 and weighed.state == state
    assert scorer.weigh(scored, state, training=True).metrics["shift"] != 3


def test_progress_is_the_share_of_updates_done():
    at = [float(gradient("scheduled", update=k)[1]["loss"]) for k in (0, 5, 10)]
    margins = scored_margins("scheduled")
    for loss, gamma in zip(at, (1.0, 0.6, 0.2), strict=True):
        np.testing.assert_allclose(loss, np.maximum(gamma - margins, 0).mean(), rtol=1e-5)


def test_a_text_among_the_hyperparameters_chooses_a_form():
    scorer, step, params, *_ = base((1, 1, 1), 12)
    losses, margins = {}, scored_margins("of_two_forms")
    for form in ("hinge", "logistic"):
        scorer = scorer.of(OWN["of_two_forms"], {"gamma": 0.5, "form": form})
        losses[form] = [
            float(step.of(scorer, mode).mean_grads(params, pairs_for("of_two_forms"))[1]["loss"])
            for mode in ("direct", "two_pass")
        ]
    np.testing.assert_allclose(losses["hinge"], np.maximum(0.5 - margins, 0).mean(), rtol=1e-5)
    np.testing.assert_allclose(losses["logistic"], np.log1p(np.exp(0.5 - margins)).mean(), rtol=1e-5)


def scored_margins(name):
    scorer, _, params, *_ = base((1, 1, 1), 12)
    scorer = scorer.of(*made(name))
    return np.asarray(scorer({"params": params}, scorer.rows(pairs_for(name))).mean_margin_B)


@pytest.mark.parametrize("name", ["by_answer", "shifted", "from_mismatched"])
def test_rows_with_one_answer_are_averaged_over_the_answers_that_are_there(name):
    wanted = gradient(name, unpaired=True, form="two_pass")
    if name == "by_answer":
        assert_same(gradient(name, unpaired=True, form="direct", rows=3), wanted, "direct")
        scorer, _, params, *_ = base((1, 1, 1), 12)
        scorer = scorer.of(*made(name))
        scored = jax.device_get(scorer({"params": params}, scorer.rows(pairs_for(name, True))))
        signs = np.where(scored.lengths_B2 > 0, [[1, -1]], 0)
        values = 1 / (1 + np.exp(0.1 * signs * (scored.logps_B2 - scored.reference_B2)))
        np.testing.assert_allclose(wanted[1]["loss"], values[signs != 0].mean(), rtol=1e-5)
    assert_same(gradient(name, unpaired=True, form="two_pass", rows=3), wanted, "4 micro-batches")


def test_sft_is_averaged_over_the_tokens_of_the_good_answers_and_rows_without_one_count_for_nothing():
    wanted = gradient("sft", unpaired=True, form="two_pass")
    assert_same(gradient("sft", unpaired=True, form="direct", rows=3), wanted, "direct")
    scorer, _, params, *_ = base((1, 1, 1), 12)
    scorer = scorer.of(*made("sft"))
    scored = jax.device_get(scorer({"params": params}, scorer.rows(pairs_for("sft", True))))
    assert (scored.lengths_B2[:, 0] == 0).any()
    loss = -scored.logps_B2[:, 0].sum() / scored.lengths_B2[:, 0].sum()
    np.testing.assert_allclose(wanted[1]["loss"], loss, rtol=1e-5)


def test_a_group_is_pushed_back_where_the_loss_has_a_slope_on_it_and_only_there(monkeypatch):
    for name, pushed in (("with_rationale", True), ("from_mismatched", False)):
        step, params = step_for(name)
        seen, original = [], step._add_weighted
        monkeypatch.setattr(
            step, "_add_weighted", lambda *args, f=original, s=seen: s.append(args[4].filled_B) or f(*args)
        )
        step.mean_grads(params, pairs_for(name))
        filled = np.any([np.asarray(one) for one in seen], axis=0).reshape(-1, 2)
        assert filled[:, 0].all() and filled[:, 1].all() == filled[:, 1].any() == pushed


def test_a_rationale_counts_in_value_and_gradient():
    """Against one plain jax.grad, in which pairs and rationales are scored apart."""
    pairs, model = pairs_for("with_rationale"), Decoder(TINY, jnp.float32)
    [main], [more] = (
        row_batches(some, RowShape(12, 64, 48)) for some in (pairs, [pair.groups["rationale"] for pair in pairs])
    )

    @jax.jit
    def objective(params):
        means_B2 = (scored := pair_logps(model, {"params": params}, main)).logps_B2 / scored.lengths_B2
        rationale_B = pair_logps(model, {"params": params}, more).logps_B2[:, 0]
        return (jax.nn.softplus(means_B2[:, 1] - means_B2[:, 0]) + jax.nn.softplus(-0.1 * rationale_B)).mean()

    step, params = step_for("with_rationale")
    value, grads = jax.value_and_grad(objective)(params)
    ours, metrics = step.mean_grads(params, pairs)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert np.linalg.norm(flat(ours) - flat(grads)) <= 1e-5 * np.linalg.norm(flat(grads))


def test_a_divergence_from_a_reference_that_runs_along_counts_in_value_and_gradient():
    """Against one plain jax.grad with all logits of one padded row per pair."""
    _, step, params, *_ = base((1, 1, 1), 12)
    pairs, model, live = pairs_for("token_level"), Decoder(TINY, jnp.float32), step._live
    [batch] = row_batches(pairs, RowShape(12, 64, 48))

    def logps(variables):
        places = batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT
        hidden_RTD = model.apply(variables, *places)
        head_VD = output_head(variables["params"])[: TINY.V]
        source_RSD = jnp.take_along_axis(hidden_RTD, batch.sources_RS[..., None], axis=1)
        return jax.nn.log_softmax(source_RSD @ head_VD.T)

    @jax.jit
    def objective(params):
        ours, theirs = logps({"params": params}), logps(live)
        kl_RS = (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1)
        picked_RS = jnp.take_along_axis(ours, batch.targets_RS[..., None], axis=-1)[..., 0]
        summed = [
            jax.ops.segment_sum(x.ravel(), batch.answers_RS.ravel(), 2 * B).reshape(B, 2) for x in (picked_RS, kl_RS)
        ]
        scored = PairLogps(
            summed[0], batch.known.lengths_B2, batch.known.reference_B2, terms={"kl_reference": summed[1]}
        )
        return token_level(scored).mean()

    value, grads = jax.value_and_grad(objective)(params)
    ours, metrics = step_for("token_level")[0].mean_grads(params, pairs, form="two_pass")
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert np.linalg.norm(flat(ours) - flat(grads)) <= 1e-5 * np.linalg.norm(flat(grads))


def test_losses_that_mix_pairs_are_refused_in_direct_form():
    scorer, step, *_ = base((1, 1, 1), 12)
    for name in ("centred", "shifted", "from_mismatched"):
        with pytest.raises(ValueError, match="only two passes are exact; set mode to auto"):
            step.of(scorer.of(*made(name)), "direct")
        assert gradient(name)[1]["two_pass"] == 1


def test_a_loss_with_a_reference_wants_pairs_that_have_one():
    step, params = step_for("plain_dpo")
    with pytest.raises(ValueError, match="the pairs have no log-probs under one"):
        step.mean_grads(params, random_pairs(4, V=TINY.V))


def test_rewards_are_beta_times_log_ratios_where_there_is_a_reference():
    (_, metrics), loss = gradient("plain_dpo"), 0.1
    scorer, _, params, *_ = base((1, 1, 1), 12)
    scorer = scorer.of(*made("plain_dpo"))
    scored = jax.device_get(scorer({"params": params}, scorer.rows(pairs_for("plain_dpo"))))
    ratios = scored.logps_B2 - scored.reference_B2
    np.testing.assert_allclose(metrics["rewards/chosen"], loss * ratios[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], loss * (ratios[:, 0] - ratios[:, 1]).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/accuracies"], (ratios[:, 0] > ratios[:, 1]).mean())
    np.testing.assert_allclose(metrics["logps/chosen"], (scored.logps_B2 / scored.lengths_B2)[:, 0].mean(), rtol=1e-5)
