import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from examples import TINY, one_device, random_params

from repo_jax.config import OptimSection
from repo_jax.models.decoder import param_shapes
from repo_jax.optimizer import apply_updates, decayed, learning_rate, make_optimizer, round_at_random
from repo_jax.sharding import make_mesh
from repo_jax.state import initial_state, state_shapes, state_shardings

OPTIMIZERS = ["adamw", "adafactor", "lion"]


def constant(**fields):
    return OptimSection(**{"lr_scheduler_type": "constant", "warmup_ratio": 0} | fields)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])
def test_schedules_are_those_of_transformers(kind, warmup_ratio):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' scheduler, which needs torch")
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(np.ceil(47 * warmup_ratio)), num_training_steps=47)
    ours = learning_rate(OptimSection(learning_rate=1e-3, lr_scheduler_type=kind, warmup_ratio=warmup_ratio), 47)
    for k in range(47):
        np.testing.assert_allclose(float(ours(k)), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-9)  # ours is float32
        optimizer.step(), theirs.step()


# The tensors that a Hugging Face model has in place of each parameter; those of a stack once for each of two layers.
TENSORS = {
    "embed_VD": (10, 6),
    "head_VD": (130, 131),
    "final_norm_D": (6,),
    "layers_L": {
        "attn": {
            "q_DNH": (6, 8),
            "o_NHD": (8, 6),
            "q_bias_NH": (8,),
            "k_norm_KH": (4,),
            "v_DKH": {"a_Dr": (6, 3), "b_rKH": (3, 4)},
        },
        "mlp": {"down_FD": {"a_Fr": (5, 3), "b_rD": (3, 6)}},
        "attn_post_norm_D": (6,),
        "o_bias_D": (6,),
    },
}  # fmt: skip
SIZES = {"D": 6, "V": 10, "N": 2, "H": 4, "K": 1, "F": 5, "r": 3}


def paths(tree, *above):
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from paths(node, *above, name)
        else:
            yield (*above, name), node


def like(tensors, make, *above):
    """A tree of ours whose leaf at a path is make(shape)."""
    if isinstance(tensors, dict):
        return {name: like(node, make, *above, name) for name, node in tensors.items()}
    shape = tensors if above[-1] == "head_VD" else tuple(SIZES[axis] for axis in above[-1].rsplit("_", 1)[-1])
    return make((2, *shape) if above[0] == "layers_L" else shape)


def as_tensors(tree):
    """The tensors of a Hugging Face model that a tree of ours amounts to, in one order."""
    found = []
    for path, shape in paths(TENSORS):
        leaf = tree
        for name in path:
            leaf = leaf[name]
        found += list(np.reshape(leaf, (2, *shape) if path[0] == "layers_L" else (1, *shape)))
    return found


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_updates_are_those_of_a_trainer_of_hugging_face(name, max_grad_norm):
    torch = pytest.importorskip("torch", reason="the oracles are torch's AdamW and transformers' Adafactor")
    from transformers import get_scheduler
    from transformers.optimization import Adafactor

    optim = OptimSection(
        optim=name, learning_rate=1e-2, lr_scheduler_type="linear", warmup_ratio=0.25, weight_decay=0.1,
        max_grad_norm=max_grad_norm, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = like(TENSORS, lambda shape: rng.normal(size=shape).astype(np.float32))
    theirs = [torch.tensor(tensor, dtype=torch.float64, requires_grad=True) for tensor in as_tensors(params)]
    groups = [
        {"params": [tensor for tensor in theirs if tensor.ndim == 2], "weight_decay": 0.1},
        {"params": [tensor for tensor in theirs if tensor.ndim == 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
    else:
        reference = Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    schedule = get_scheduler("linear", reference, num_warmup_steps=2, num_training_steps=6)
    optimizer = make_optimizer(optim, total_steps=6)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    start = as_tensors(params)
    for step in range(5):
        # Some tokens are in no pair, and gradients are of many sizes.
        grads = like(TENSORS, lambda shape: (rng.normal(size=shape) * np.exp(2 * rng.normal())).astype(np.float32))
        grads["embed_VD"][step:] = 0
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates, step=step)
        for tensor, grad in zip(theirs, as_tensors(grads), strict=True):
            tensor.grad = torch.tensor(grad, dtype=torch.float64)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        reference.step(), schedule.step()
    for ours, tensor, before in zip(as_tensors(params), theirs, start, strict=True):
        moved = tensor.detach().numpy() - before
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(ours - before, moved, rtol=1e-4, atol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
    flags = decayed(like(TENSORS, np.zeros))
    assert {path for path, flag in paths(flags) if not flag} == {
        ("final_norm_D",),
        ("layers_L", "attn_post_norm_D"),
        ("layers_L", "o_bias_D"),
        ("layers_L", "attn", "q_bias_NH"),
        ("layers_L", "attn", "k_norm_KH"),
    }


def test_updates_equal_adamw_written_out():
    optim = constant(
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3
    )
    optimizer = make_optimizer(optim, total_steps=3)
    params = {"w_DF": np.ones((2, 2), np.float32), "norm_D": np.ones(2, np.float32)}
    state = optimizer.init(params)
    want = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    m, v = ({name: 0.0 for name in params} for _ in range(2))
    for k in range(1, 4):
        grads = {"w_DF": np.full((2, 2), 0.3 * k, np.float32), "norm_D": np.array([1.0, -k], np.float32)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            step = m[name] / (1 - 0.8**k) / (np.sqrt(v[name] / (1 - 0.9**k)) + 1e-3)
            want[name] = want[name] - 1e-2 * (step + (0.1 * want[name] if name == "w_DF" else 0))
    for name in params:
        np.testing.assert_allclose(params[name], want[name], rtol=1e-5)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_moment_is_rounded_between_updates_and_nowhere_else(name, moment_dtype):
    optim = constant(
        optim=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=None,
        adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-3, moment_dtype=moment_dtype,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"w_DF": rng.normal(size=(8, 8)).astype(np.float32)}
    optimizer = make_optimizer(optim, total_steps=6)
    first, update = optimizer.init(params), jax.jit(optimizer.update)
    state, stored = first, ml_dtypes.bfloat16 if moment_dtype == "bfloat16" else np.float64
    want, m, v = params["w_DF"].astype(np.float64), 0.0, 0.0
    for k in range(1, 7):
        g = rng.normal(size=(8, 8)).astype(np.float32)
        updates, state = update({"w_DF": g}, state, params)
        params = optax.apply_updates(params, updates)
        g = g.astype(np.float64)
        if name == "lion":
            direction = np.sign(0.9 * m + 0.1 * g)
            m = 0.99 * m + 0.01 * g
        else:
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            direction = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.99**k)) + 1e-3)
        m = m.astype(stored).astype(np.float64)
        want = want - 1e-2 * (direction + 0.1 * want)
    np.testing.assert_allclose(params["w_DF"], want, rtol=1e-5, atol=1e-6)
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 8))
    assert moment.dtype == moment_dtype
    assert [leaf.dtype for leaf in jax.tree.leaves(first)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    np.testing.assert_allclose(moment.astype(np.float32), m, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_parameters_are_updated_as_float32_ones_are(name):
    optimizer = make_optimizer(constant(optim=name, weight_decay=0.1, learning_rate=1e-2), 2)
    rng = np.random.default_rng(0)
    narrow = {"w_DF": jnp.asarray(rng.normal(size=(4, 3)), jnp.bfloat16), "norm_D": jnp.ones(4, jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), wide)
    ends = []
    for params in (narrow, wide):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
        ends.append((updates, state))
    for ours, want in zip(*map(jax.tree.leaves, ends), strict=True):
        assert ours.dtype == want.dtype != jnp.bfloat16
        np.testing.assert_array_equal(ours, want)


def test_float32_parameters_are_added_to():
    params = {"a_DF": jnp.float32([[1.0, -2.0]])}
    after = apply_updates(params, {"a_DF": jnp.float32([[2.0**-23, 0.5]])}, step=0)
    np.testing.assert_array_equal(after["a_DF"], [[1 + 2.0**-23, -1.5]])
    assert after["a_DF"].dtype == jnp.float32


def test_a_bfloat16_is_one_of_the_two_around_and_right_on_average():
    x = jnp.float32([1.0, 1.0 + 2.0**-7, -0.0, -3.0, 1e-30, jnp.inf, -jnp.inf])  # what bfloat16 can hold, and 1e-30
    held = round_at_random(x, jax.random.key(0))
    assert held.dtype == jnp.bfloat16
    np.testing.assert_array_equal(held[:4].astype(jnp.float32), x[:4])
    np.testing.assert_array_equal(held[5:].astype(jnp.float32), x[5:])
    for share, sign in ((0.25, 1), (0.001, 1), (0.75, -1)):  # of the way from 1 to the next that is farther from 0
        spread = round_at_random(jnp.full(200_000, sign * (1 + share * 2.0**-7), jnp.float32), jax.random.key(1))
        values, counts = np.unique(np.asarray(spread, np.float32), return_counts=True)
        assert sorted(np.abs(values)) == [1, 1 + 2.0**-7] and (np.sign(values) == sign).all()
        up = counts[np.abs(values) > 1].sum() / 200_000
        assert abs(up - share) < 5 * np.sqrt(share * (1 - share) / 200_000)


def test_updates_far_below_a_bfloat16s_spacing_arrive_in_the_end():
    """0.02 has neighbours 1.2e-4 away: no update by 1e-6 would move it if it were rounded to the nearest."""
    params = {"w_DF": jnp.full((64, 64), 0.02, jnp.bfloat16)}
    start = float(params["w_DF"][0, 0])
    updates = {"w_DF": jnp.full((64, 64), -1e-6, jnp.float32)}
    add = jax.jit(apply_updates)
    for step in range(200):
        params = add(params, updates, step=step)
    moved = np.asarray(params["w_DF"], np.float64) - start
    assert abs(moved.mean() + 200e-6) < 2e-5
    assert moved.std() > 1e-5  # each by itself


def test_what_is_rounded_up_depends_on_step_parameter_and_element_alone():
    params = {name: jnp.ones((16, 8), jnp.bfloat16) for name in ("a_DF", "b_DF")}
    updates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0**-8, jnp.float32), params)
    add = jax.jit(apply_updates)
    first, again, other = add(params, updates, step=3), add(params, updates, step=3), add(params, updates, step=4)
    mesh = make_mesh(1, 4, 2)
    spread = jax.device_put((params, updates), jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    for name in params:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], add(*spread, step=3)[name])
        assert (first[name] != other[name]).any()
    assert (first["a_DF"] != first["b_DF"]).any()


def test_without_max_grad_norm_nothing_is_clipped():
    grads = {"w_DF": np.full((2, 2), 1e3, np.float32)}
    params = {"w_DF": np.ones((2, 2), np.float32)}
    sizes = []
    for norm in (None, 1.0):
        optimizer = make_optimizer(constant(max_grad_norm=norm, adam_epsilon=1.0), 1)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        sizes.append(float(np.abs(updates["w_DF"]).max()))
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_mesh_changes_no_update(name):
    optimizer = make_optimizer(constant(optim=name, weight_decay=0.1, learning_rate=1e-2, adam_epsilon=1e-3), 2)
    grads = [random_params(TINY, seed) for seed in (1, 2)]
    ends = []
    for mesh in (one_device(), make_mesh(2, 2, 2)):
        shapes = state_shapes(param_shapes(TINY), optimizer)
        shardings = state_shardings(shapes, optimizer, mesh)
        update = jax.jit(optimizer.update, out_shardings=(shardings.params, shardings.opt_state))
        params = jax.device_put(random_params(TINY), shardings.params)
        state = initial_state(params, optimizer, shardings).opt_state
        for k, grad in enumerate(grads):
            updates, state = update(jax.device_put(grad, shardings.params), state, params)
            params = apply_updates(params, updates, step=k)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings.opt_state), strict=True):
            assert leaf.sharding == sharding
        ends.append(jax.device_get((params, state)))
    for one, many in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_next_to_nothing():
    def numbers(name):
        state = jax.eval_shape(make_optimizer(OptimSection(optim=name), 1).init, param_shapes(TINY))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert numbers("adafactor") < 0.2 * numbers("lion") < 0.2 * numbers("adamw")
