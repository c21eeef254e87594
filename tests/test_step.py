"""The update is one function of the pairs: not of rows, micro-batches, form or mesh. Gradients within 1e-5 of their norm."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import TINY, equations_of, one_device, pair_of, random_pairs, random_params, stories

from repo_jax.data.rows import RowShape, row_batches
from repo_jax.data.weights import ld, temporal_decay
from repo_jax.flops import Lengths, flops_of
from repo_jax.hlo import work_of
from repo_jax.losses import make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.lora import adapter_shapes
from repo_jax.sharding import make_mesh
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings
from repo_jax.step import (
    Gathered,
    Scorer,
    Slopes,
    TrainStep,
    add_direct,
    add_weighted,
    break_even,
    no_pairs,
    recomputed,
    rooms,
    score_and_keep,
)

LOSSES = {"repo": {"gamma": 0.5}, "simpo": {"beta": 2.0, "gamma": 0.25}}


@functools.cache
def real_model():
    return stories()


def sixteen_pairs():
    """Unequal lengths, so that micro-batches hold different numbers of pairs."""
    rng = np.random.default_rng(3)
    lengths = [(int(rng.integers(2, 20)), int(rng.integers(1, 30)), int(rng.integers(1, 30))) for _ in range(16)]
    return [pair_of(rng, n, V=512, name=f"pair {i}") for i, n in enumerate(lengths)]


def make_step(
    loss_type="repo", *, mesh=None, shape=None, mode="direct", below=None, optimizer=None, keeps=False, **hparams
):
    cfg, params = real_model() if mesh is None else stories(mesh)
    mesh = mesh or one_device()
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    loss, hparams = make_loss(loss_type, **(LOSSES[loss_type] | hparams))
    model = Decoder(cfg, jnp.float32)
    optimizer = optimizer or optax.sgd(1.0)
    shapes = state_shapes(param_shapes(cfg), optimizer)
    shardings = state_shardings(shapes, optimizer, mesh)
    scorer = Scorer(model, loss, hparams, mesh, [shape or RowShape(rows, 128, 96)])
    options = {"mode": mode, "two_pass_below": below, "keeps": keeps}
    step = TrainStep(scorer, model, loss, optimizer, shardings, **options)
    return step, params, optimizer, shardings


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@functools.cache
def reference(loss_type):
    """Loss and gradient of all pairs in one padded row each, by one plain jax.grad."""
    step, params, _, _ = make_step(loss_type, shape=RowShape(16, 80, 60))
    return step.mean_grads(params, sixteen_pairs())


def assert_equals_reference(loss_type, grads, metrics):
    wanted_grads, wanted = reference(loss_type)
    for name, value in wanted.items():
        if name not in ("padding_fraction", "two_pass"):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    difference = np.linalg.norm(flat(grads) - flat(wanted_grads)) / np.linalg.norm(flat(wanted_grads))
    assert difference <= 1e-5, f"gradients differ by {difference:.2g} of their norm"


def test_the_fixture_keeps_clear_of_gamma_and_has_pairs_on_both_sides():
    step, params, _, _ = make_step()
    pairs = step._scorer({"params": params}, row_batches(sixteen_pairs(), RowShape(1, 128, 96)))
    margins = np.asarray(pairs.mean_margin_B)
    assert (np.abs(margins - 0.5) > 1e-3).all()
    assert 2 <= (margins < 0.5).sum() <= 14


def test_the_loss_and_gradient_are_those_of_a_plain_mean():
    """The oracle pads every answer after its own copy of the prompt and makes all logits."""
    cfg, params = real_model()
    pairs = sixteen_pairs()
    texts = [np.concatenate([pair.prompt, branch]) for pair in pairs for branch in pair.branches]
    tokens = jnp.asarray(np.stack([np.pad(text, (0, 64 - len(text))) for text in texts]))
    starts = jnp.repeat(jnp.array([len(pair.prompt) for pair in pairs]), 2)[:, None]
    ends = jnp.array([len(text) for text in texts])[:, None]
    slots = jnp.arange(64)[None]
    answer = (slots[:, 1:] >= starts) & (slots[:, 1:] < ends)

    def objective(params):
        ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(slots, tokens.shape)
        hidden = Decoder(cfg, jnp.float32).apply({"params": params}, tokens, positions, ones, ones)
        logps = jax.nn.log_softmax(hidden[:, :-1] @ params["embed_VD"][: cfg.V].T)
        picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
        means = ((picked * answer).sum(axis=1) / answer.sum(axis=1)).reshape(16, 2)
        return jax.nn.relu(0.5 - (means[:, 0] - means[:, 1])).mean()

    value, grads = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(reference("repo")[1]["loss"], value, rtol=1e-5)
    assert np.linalg.norm(flat(grads) - flat(reference("repo")[0])) <= 1e-5 * np.linalg.norm(flat(grads))


FORMS = pytest.mark.parametrize(
    "form",
    [{"mode": "direct"}, {"mode": "two_pass"}, {"mode": "two_pass", "keeps": True}],
    ids=["direct", "two_pass", "two_pass-keeps"],
)


@pytest.mark.parametrize("loss_type", LOSSES)
@FORMS
@pytest.mark.parametrize("shape", [RowShape(4, 128, 96), RowShape(1, 80, 60), RowShape(2, 256, 256)], ids=str)
def test_rows_micro_batches_and_form_change_nothing(loss_type, form, shape):
    step, params, _, _ = make_step(loss_type, shape=shape, **form)
    assert_equals_reference(loss_type, *step.mean_grads(params, sixteen_pairs()))


@FORMS
@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4)], ids=str)
def test_many_devices_equal_one(axes, form):
    mesh = make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    step, params, _, _ = make_step(mesh=mesh, **form)
    assert_equals_reference("repo", *step.mean_grads(params, sixteen_pairs()))


def test_the_order_of_devices_changes_nothing():
    step, params, _, _ = make_step(mesh=make_mesh(2, 4, 1, devices=jax.devices()[::-1]))
    assert_equals_reference("repo", *step.mean_grads(params, sixteen_pairs()))


def test_two_pass_pushes_back_only_the_answers_whose_slope_is_not_zero(monkeypatch):
    step, params, _, _ = make_step(mode="two_pass")
    pushed = []
    original = step._add_weighted
    monkeypatch.setattr(
        step, "_add_weighted", lambda *args: pushed.append(np.asarray(args[4].filled_B)) or original(*args)
    )
    _, metrics = step.mean_grads(params, sixteen_pairs())
    assert sum(filled.sum() for filled in pushed) == round(float(metrics["active_fraction"]) * 16) < 16


def test_the_two_forms_are_one_function_of_weighted_pairs_too():
    pairs = [
        ld(pair, alpha=0.25) if i % 2 else temporal_decay(pair, gamma=0.9) for i, pair in enumerate(sixteen_pairs())
    ]
    (grads, metrics), (two_pass_grads, two_pass) = (
        make_step(mode=mode)[0].mean_grads(real_model()[1], pairs) for mode in ("direct", "two_pass")
    )
    assert abs(metrics["loss"] - reference("repo")[1]["loss"]) > 1e-3  # the weights do something
    np.testing.assert_allclose(two_pass["loss"], metrics["loss"], rtol=1e-5)
    assert np.linalg.norm(flat(two_pass_grads) - flat(grads)) <= 1e-5 * np.linalg.norm(flat(grads))


@pytest.mark.parametrize("mode", ["direct", "two_pass"])
def test_once_all_margins_pass_gamma_the_gradient_is_zero_and_the_update_still_runs(mode):
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    step, params, optimizer, shardings = make_step(mode=mode, gamma=-100.0, optimizer=optimizer)
    grads, metrics = step.mean_grads(params, sixteen_pairs())
    assert metrics["loss"] == metrics["active_fraction"] == metrics["active_token_fraction"] == 0
    assert not flat(grads).any()
    before = flat(params)
    state, metrics = step(initial_state(jax.tree.map(jnp.copy, params), optimizer, shardings), sixteen_pairs())
    assert state.step == 1 and metrics["grad_norm"] == 0
    np.testing.assert_allclose(flat(state.params), before * (1 - 1e-3), rtol=1e-5)  # decay alone moved them


# The choice between the two forms


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_forms_cost_the_same_where_they_break_even(trained):
    """By the operations of an 8B Llama on pairs as UltraFeedback has them, whatever else the break-even was worked out from."""
    cfg = DecoderConfig(D=4096, F=14336, N=32, K=8, H=128, L=32, V=128_256, max_positions=8192)
    lengths = Lengths(np.array([220]), np.array([[330, 310]]), np.array([[330, 310]]))
    forward, backward = flops_of(cfg, lengths, trained=trained)
    for remat, again in {"none": 0, "full": 1, "offload": 1}.items():
        once = forward + backward + again * forward
        p = break_even(remat, adapters=trained == "adapters")
        assert forward + p * once == pytest.approx(once, rel=0.03)


def test_remat_says_how_much_of_a_forward_pass_is_done_again():
    assert [recomputed(name) for name in ("none", "dots", "attention", "full", "offload")] == [0, 0.1, 0.9, 1, 1]


def test_kept_inputs_save_second_passes_a_forward_pass():
    """A forward pass is 1, a backward pass 2, under frozen weights 1, and remat attention computes 0.9 again."""
    assert 1 + 1.1 * 3 * break_even("full", keeps=True) == pytest.approx(4)
    assert 1 + 1.1 * 3 * break_even("attention", keeps=True) == pytest.approx(3.9)
    assert 1 + 1.1 * 2 * break_even("full", adapters=True, keeps=True) == pytest.approx(3)
    for remat in ("full", "offload", "attention"):
        assert break_even(remat) < 0.76 < 0.87 < break_even(remat, keeps=True) < 1


def test_second_passes_compute_layers_forward_once_where_inputs_were_kept():
    def products(remat, kept):
        model, params = Decoder(TINY, jnp.float32, remat), random_params(TINY)
        [batch] = row_batches(random_pairs(4, V=TINY.V), RowShape(2, 128, 128, 128))
        zeros, slopes = jax.tree.map(jnp.zeros_like, params), Slopes(jnp.ones((4, 2)), {})
        variables = {"params": params}
        _, inputs = jax.eval_shape(lambda: score_and_keep(no_pairs(4), variables, batch, model=model))
        args = (zeros, params, None, None, batch, slopes, inputs if kept else None)
        program = jax.jit(functools.partial(add_weighted, model=model)).lower(*args).compile()
        return work_of(program.as_text(), {}).matmul_flops

    weights = TINY.D * TINY.H * (2 * TINY.N + 2 * TINY.K) + 3 * TINY.D * TINY.F
    attention = 2 * 128 * TINY.N * TINY.H
    forward = 2 * 2 * 128 * (weights + attention) * TINY.L
    assert products("full", False) - products("full", True) == pytest.approx(forward)


def test_in_bfloat16_layer_inputs_are_kept_in_bfloat16_and_change_the_gradient_by_roundings():
    model = Decoder(TINY, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: 3 * leaf, random_params(TINY))
    [batch] = row_batches(random_pairs(4, V=TINY.V), RowShape(2, 128, 128, 128))
    slopes = Slopes(jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32), {})
    zeros, variables = jax.tree.map(jnp.zeros_like, params), {"params": params}
    _, kept = jax.jit(functools.partial(score_and_keep, model=model))(no_pairs(4), variables, batch)
    assert {leaf.dtype.name for leaf in kept.values()} == {"bfloat16"}
    plain, ours = (
        jax.jit(functools.partial(add_weighted, model=model))(zeros, params, None, None, batch, slopes, one)
        for one in (None, kept)
    )
    assert np.linalg.norm(flat(ours) - flat(plain)) <= 2e-2 * np.linalg.norm(flat(plain))


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 4)], ids=str)
def test_what_is_held_of_row_batches_comes_back_where_their_tokens_go(axes):
    mesh = make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    R = mesh.shape["data"] * mesh.shape["fsdp"]
    step, _, _, _ = make_step(mesh=mesh, shape=RowShape(R, 128, 96), keeps=True)
    scorer, rng, L, D = step._scorer, np.random.default_rng(0), step._scorer.model.cfg.L, step._scorer.model.cfg.D
    kept = [
        {name: rng.normal(size=(n, R, 128, D)).astype(np.float32) for name, n in {"layers_L": L, "output": 1}.items()}
        for _ in range(3)
    ]
    slots = rng.integers(0, 3 * R * 128, size=(R, 64)).astype(np.int32)
    with jax.set_mesh(mesh):
        held = scorer._no_kept(4 * R * 128)
        for n, one in enumerate(kept):
            held = scorer._hold(held, one, n)
        found = step._take(held, slots)
    for name, leaf in found.items():
        flat_LXD = np.concatenate([one[name].reshape(len(one[name]), -1, D) for one in kept], axis=1)
        np.testing.assert_array_equal(leaf, flat_LXD[:, slots])


def test_there_is_room_for_at_least_the_row_batches_that_are_wanted_and_few_different_rooms():
    assert [rooms(n) for n in (1, 2, 7, 8, 9, 17, 21, 33)] == [1, 2, 7, 8, 10, 20, 24, 40]
    assert all(n <= rooms(n) <= 1.25 * n for n in range(1, 500))
    assert len({rooms(n) for n in range(64, 128)}) <= 5


@pytest.mark.parametrize("attention", ["dense", "blocked", "flash"])
@pytest.mark.parametrize("form", ["direct", "weighted", "kept"])
def test_float32_is_exact_in_every_product_forward_and_backward(attention, form):
    """On TPU and GPU a product is otherwise rounded to bfloat16 or TF32, which no CPU shows."""
    model, params = Decoder(TINY, jnp.float32, attention=attention), random_params(TINY)
    [batch] = row_batches(random_pairs(4, V=TINY.V), RowShape(2, 128, 128, 128))
    zeros, (loss, hparams) = jax.tree.map(jnp.zeros_like, params), make_loss("repo")
    if form == "direct":
        args = (Gathered(zeros, no_pairs(4)), params, None, None, batch, batch.known, hparams, 0.0, None)
        program = jax.make_jaxpr(functools.partial(add_direct, model=model, loss=loss))(*args)
    else:
        _, kept = jax.eval_shape(lambda: score_and_keep(no_pairs(4), {"params": params}, batch, model=model))
        kept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), kept) if form == "kept" else None
        program = jax.make_jaxpr(functools.partial(add_weighted, model=model))(
            zeros, params, None, None, batch, Slopes(jnp.ones((4, 2)), {}), kept
        )
    products = [one for one in equations_of(program.jaxpr) if one.primitive.name == "dot_general"]
    assert len(products) > 20
    assert {str(one.params["precision"]) for one in products} == {str((jax.lax.Precision.HIGHEST,) * 2)}


def updates(step, state, n):
    """The states before and after each of n updates, on the host, and their metrics."""
    states, logged = [jax.device_get(state)], []
    for k in range(len(states) - 1, n):
        start = int(states[0].step) + k
        state, metrics = step(state, sixteen_pairs()[start % 5 :] + sixteen_pairs()[: start % 5])
        states.append(jax.device_get(state))
        logged.append({name: float(value) for name, value in metrics.items()})
    return states, logged


def begin(**options):
    step, params, optimizer, shardings = make_step(**options)
    return step, initial_state(jax.tree.map(jnp.copy, params), optimizer, shardings)


@pytest.mark.parametrize(
    "below, forms",
    [
        # The running share is 1, 0.9, 0.81, 0.729, 0.656 after 0, 1, ... updates; that of the update before last counts.
        (None, [0, 0, 0, 0, 1, 1]),  # full remat breaks even at 0.75
        (0.85, [0, 0, 0, 1, 1, 1]),
        (1.0, [0, 0, 1, 1, 1, 1]),
        (0.0, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_auto_begins_direct_and_takes_two_passes_once_the_share_of_the_update_before_last_is_low(below, forms):
    states, logged = updates(*begin(mode="auto", below=below, gamma=-100.0), 6)  # no pair is ever active
    assert [line["two_pass"] for line in logged] == forms
    np.testing.assert_allclose([state.active_2[1] for state in states], 0.9 ** np.arange(7), rtol=1e-6)


def test_auto_follows_the_share_of_tokens_that_is_active_and_trains_as_direct_does():
    options = {"gamma": 0.1, "optimizer": optax.adam(1e-3, eps=1e-4)}
    states, logged = updates(*begin(mode="auto", below=0.9, **options), 6)
    running = [1.0, 1.0]
    assert 0 < logged[0]["active_token_fraction"] < 0.9
    for line in logged:
        assert line["two_pass"] == (running[-2] < 0.9)
        running.append(0.9 * running[-1] + 0.1 * line["active_token_fraction"])
    assert [line["two_pass"] for line in logged][::5] == [0, 1]
    direct_states, direct = updates(*begin(mode="direct", **options), 6)
    assert not any(line["two_pass"] for line in direct)
    np.testing.assert_allclose([x["loss"] for x in logged], [x["loss"] for x in direct], rtol=1e-4)
    moved = np.linalg.norm(flat(direct_states[-1].params) - flat(direct_states[0].params))
    assert np.linalg.norm(flat(states[-1].params) - flat(direct_states[-1].params)) <= 1e-4 * moved


def test_an_update_that_is_not_finite_changes_nothing_but_the_counts():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(optax.linear_schedule(1e-3, 0.0, 10)))
    for poison in ("gradient", "loss"):
        step, params, _, shardings = make_step(optimizer=optimizer)
        state = initial_state(jax.tree.map(jnp.copy, params), optimizer, shardings)
        state, _ = step(state, sixteen_pairs())
        before = jax.device_get(state)
        grads, metrics = step.mean_grads(state.params, sixteen_pairs())
        if poison == "gradient":
            leaves, treedef = jax.tree.flatten(grads)
            grads = jax.tree.unflatten(treedef, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.inf), *leaves[1:]])
        else:
            metrics["loss"] = jnp.float32(jnp.nan)
        state, metrics = step.apply(state, grads, metrics)
        after = jax.device_get(state)
        assert (after.step, before.step) == (2, 1)
        np.testing.assert_array_equal(flat(after.params), flat(before.params))
        np.testing.assert_array_equal(flat(after.opt_state[0]), flat(before.opt_state[0]))
        assert after.opt_state[1].count == before.opt_state[1].count + 1 == 2  # of the schedule
        assert after.active_2[1] == before.active_2[1]
        sound, metrics = step(state, sixteen_pairs())
        assert np.isfinite(flat(sound.params)).all() and not np.array_equal(flat(sound.params), flat(after.params))


def test_a_run_that_goes_on_from_any_update_takes_the_same_forms_to_the_same_weights():
    options = {"mode": "auto", "below": 0.9, "gamma": 0.1, "optimizer": optax.adam(1e-3)}
    states, logged = updates(*begin(**options), 6)
    assert {line["two_pass"] for line in logged} == {0, 1}
    for start in (1, 2, 3, 5):
        step, _, _, shardings = make_step(**options)
        resumed_states, resumed = updates(step, jax.device_put(states[start], shardings), 6 - start)
        assert resumed == logged[start:]
        np.testing.assert_array_equal(flat(resumed_states[-1]), flat(states[-1]))


def test_an_objective_whose_gradient_is_nowhere_zero_stays_direct():
    states, logged = updates(*begin(loss_type="simpo", mode="auto"), 6)
    assert [line["two_pass"] for line in logged] == [0] * 6
    np.testing.assert_allclose(states[-1].active_2, 1)


def test_the_form_of_a_gradient_can_be_named_whatever_the_mode():
    step, params, _, _ = make_step(mode="auto")
    for form in ("direct", "two_pass"):
        grads, metrics = step.mean_grads(params, sixteen_pairs(), form=form)
        assert metrics["two_pass"] == (form == "two_pass")
        assert_equals_reference("repo", grads, metrics)
    assert step.mean_grads(params, sixteen_pairs())[1]["two_pass"] == 0


def test_a_scored_token_is_active_if_its_answers_log_prob_has_a_slope():
    step, params, _, _ = make_step()
    pairs = sixteen_pairs()
    scored = step._scorer({"params": params}, row_batches(pairs, RowShape(1, 128, 96)))
    active_B = np.asarray(scored.mean_margin_B) < 0.5
    tokens_B = np.array([pair.scored for pair in pairs])
    metrics = step.mean_grads(params, pairs)[1]
    np.testing.assert_allclose(metrics["active_token_fraction"], tokens_B[active_B].sum() / tokens_B.sum(), rtol=1e-6)
    assert metrics["active_token_fraction"] != metrics["active_fraction"]


def test_three_updates_on_eight_devices_end_where_three_on_one_do():
    ends = []
    for mesh, mode in ((one_device(), "direct"), (make_mesh(2, 2, 2), "direct"), (make_mesh(1, 8, 1), "two_pass")):
        step, params, optimizer, shardings = make_step(mesh=mesh, mode=mode, optimizer=optax.adam(1e-3, eps=1e-4))
        start = flat(params)
        state = initial_state(params, optimizer, shardings)
        for k in range(3):
            state, _ = step(state, sixteen_pairs()[k:] + sixteen_pairs()[:k])
        ends.append(flat(state.params))
    moved = np.linalg.norm(ends[0] - start)
    assert all(np.linalg.norm(end - ends[0]) <= 1e-4 * moved for end in ends[1:])


def test_moments_lie_where_their_parameters_lie():
    _, params, optimizer, shardings = make_step(mesh=make_mesh(1, 4, 2), optimizer=optax.adamw(1e-3))
    state = initial_state(params, optimizer, shardings)
    assert isinstance(state, TrainState)
    mu = state.opt_state[0].mu
    for param, moment in zip(jax.tree.leaves(params), jax.tree.leaves(mu), strict=True):
        assert param.sharding == moment.sharding
    assert mu["layers_L"]["attn"]["q_DNH"].sharding.shard_shape((5, 64, 8, 8)) == (5, 16, 4, 8)


def test_the_state_that_comes_in_is_donated():
    step, params, optimizer, shardings = make_step(optimizer=optax.adam(1e-3))
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, shardings)
    step(state, sixteen_pairs())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state[0].mu)))


# Adapters over frozen parameters


def adapted_step(*, mesh=None, mode="direct", shape=None, dropout=0.0, seed=0, keeps=False):
    """A step that trains adapters whose effect is not zero."""
    mesh = mesh or one_device()
    cfg, frozen = stories(mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    shapes = adapter_shapes(cfg, 4, "all-linear")
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda leaf: np.float32(rng.normal(scale=0.05, size=leaf.shape)), shapes)
    loss, hparams = make_loss("repo", gamma=0.5)
    model, optimizer = Decoder(cfg, jnp.float32, lora_scale=2.0, lora_dropout=dropout), optax.sgd(1.0)
    shardings = state_shardings(state_shapes(shapes, optimizer), optimizer, mesh)
    scorer = Scorer(model, loss, hparams, mesh, [shape or RowShape(rows, 128, 96)])
    step = TrainStep(scorer, model, loss, optimizer, shardings, mode=mode, frozen=frozen, seed=seed, keeps=keeps)
    return step, jax.device_put(adapters, shardings.params)


def distance(one, other):
    return np.linalg.norm(flat(one) - flat(other)) / np.linalg.norm(flat(other))


def test_the_gradient_of_adapters_is_one_function_of_the_pairs_too():
    step, adapters = adapted_step(shape=RowShape(16, 80, 60))
    wanted, wanted_metrics = step.mean_grads(adapters, sixteen_pairs())
    for options in (
        {"mode": "two_pass"},
        {"mode": "two_pass", "keeps": True},
        {"mesh": make_mesh(1, 4, 2)},
        {"mesh": make_mesh(2, 2, 2), "mode": "two_pass"},
        {"mesh": make_mesh(2, 2, 2), "mode": "two_pass", "keeps": True},
    ):
        step, adapters = adapted_step(**options)
        grads, metrics = step.mean_grads(adapters, sixteen_pairs())
        assert distance(grads, wanted) <= 1e-5
        np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)


@pytest.mark.slow
def test_what_dropout_drops_depends_on_seed_and_update_alone():
    step, adapters = adapted_step(dropout=0.3)
    first, other = (step.mean_grads(adapters, sixteen_pairs(), update=k)[0] for k in (0, 1))
    again, _ = adapted_step(dropout=0.3)
    np.testing.assert_array_equal(flat(again.mean_grads(adapters, sixteen_pairs(), update=0)[0]), flat(first))
    reseeded, _ = adapted_step(dropout=0.3, seed=1)
    plain, _ = adapted_step()
    for grads in (other, *(one.mean_grads(adapters, sixteen_pairs(), update=0)[0] for one in (reseeded, plain))):
        assert distance(grads, first) > 0.01
