"""The optimizers that preference recipes name, with their schedules, as optax chains.

A parameter's name decides what it is: q_DNH is a matrix from D to N and H, q_bias_NH and k_norm_KH are vectors.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from repo_jax.config import OptimSection


def learning_rate(optim: OptimSection, total_steps: int) -> optax.Schedule:
    """The learning rate of update k (from 0): Hugging Face's schedules, so that update 0 of a warm-up has rate 0."""
    peak, warmup = optim.learning_rate, math.ceil(total_steps * optim.warmup_ratio)
    after = max(total_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, after),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "constant": optax.constant_schedule(peak),
    }[optim.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(optim: OptimSection, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer, all in float32 whatever the parameters' dtype."""
    b1, b2 = optim.adam_beta1, optim.adam_beta2
    direction = {
        # The second moment stays float32: bfloat16 would lose every change by 1 - beta2 of its value.
        "adamw": stored(optax.scale_by_adam(b1, b2, optim.adam_epsilon), optim.moment_dtype),
        "lion": stored(optax.scale_by_lion(b1, b2), optim.moment_dtype),
        "adafactor": scale_by_adafactor(),
    }[optim.optim]
    chain = optax.chain(
        direction,
        optax.add_decayed_weights(optim.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate(optim, total_steps)),
    )
    if optim.max_grad_norm is not None:
        chain = optax.chain(optax.clip_by_global_norm(optim.max_grad_norm), chain)
    return in_float32(chain)


def is_matrix(path) -> bool:
    """Whether the parameter at a tree path is neither a norm nor a bias, however many axes it has."""
    return not {"norm", "bias"} & set(path[-1].key.split("_"))


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay touches: matrices, adapters' too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, seeing every parameter and gradient as float32: so are then its moments and updates."""
    return optax.GradientTransformation(
        lambda params: inner.init(cast(params, jnp.float32)),
        lambda grads, state, params: inner.update(cast(grads, jnp.float32), state, cast(params, jnp.float32)),
    )


def stored(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner`, its first moment rounded to `dtype` between updates; within one it is float32, unlike optax's mu_dtype."""

    def rounded(state):
        return state._replace(mu=cast(state.mu, dtype))

    def update(grads, state, params):
        updates, state = inner.update(grads, state._replace(mu=cast(state.mu, jnp.float32)), params)
        return updates, rounded(state)

    return optax.GradientTransformation(lambda params: rounded(inner.init(params)), update)


class AdafactorState(NamedTuple):
    """Mean squares of the gradients, each with the axes of its parameter, those that it is a mean over of size 1."""

    count: jax.Array  # updates done, int32
    rows: dict  # mean over the columns: [D, 1, 1] of q_DNH
    columns: dict  # mean over the rows: [1, N, H] of q_DNH


def matrix_axes(path, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes are the rows and which the columns of the matrix that a Hugging Face checkpoint has here.

    q_DNH: D and NH; o_NHD: NH and D. A vector is a single column. An axis of layers is neither: each has its own matrix.
    """
    name = path[-1].key.rsplit("_", 1)[-1]
    axes = tuple(range(ndim - len(name), ndim))
    rows = len(re.match("NH|KH|.", name)[0])
    return axes[:rows], axes[rows:]


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) as Hugging Face's trainers run it: no first moment, no step size of its own.

    Not optax's, which factors over the two longest axes and clips all layers of a stack as one.
    """

    def mean(values, over: str):
        def one(path, leaf):
            rows, columns = matrix_axes(path, leaf.ndim)
            return jnp.mean(leaf, axis={"rows": rows, "columns": columns, "both": rows + columns}[over], keepdims=True)

        return jax.tree_util.tree_map_with_path(one, values)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdafactorState(jnp.zeros((), jnp.int32), mean(zeros, "columns"), mean(zeros, "rows"))

    def update(grads, state, params=None):
        keep = 1.0 - (state.count + 1.0) ** -0.8
        squares = jax.tree.map(lambda g: g * g + 1e-30, grads)
        rows, columns = (
            jax.tree.map(lambda old, new: keep * old + (1.0 - keep) * new, old, mean(squares, over))
            for old, over in ((state.rows, "columns"), (state.columns, "rows"))
        )
        # The square is taken to be row * column / their mean. Roots are taken first: none of them leaves float32's range.
        scaled = jax.tree.map(
            lambda g, row, column, both: g * jax.lax.rsqrt(row) * (jax.lax.rsqrt(column) * jnp.sqrt(both)),
            *(grads, rows, columns, mean(rows, "rows")),
        )
        sizes = mean(jax.tree.map(jnp.square, scaled), "both")
        updates = jax.tree.map(lambda u, size: u / jnp.maximum(1.0, jnp.sqrt(size)), scaled, sizes)
        return updates, AdafactorState(state.count + 1, rows, columns)

    return optax.GradientTransformation(init, update)


def apply_updates(params: dict, updates: dict, *, step: jax.Array) -> dict:
    """params + updates, added in float32 and rounded once to the parameters' dtype.

    To bfloat16 it is rounded up or down at random, by chances that make the mean exact: an update by 1e-6 is far below
    half the spacing of most weights, so that rounding to the nearest would leave them where they are for ever.
    """
    key = jax.random.fold_in(jax.random.key(0), step)
    leaves, treedef = jax.tree.flatten(params)
    sums = [
        (leaf + update).astype(leaf.dtype)
        if leaf.dtype != jnp.bfloat16
        else round_at_random(leaf.astype(jnp.float32) + update, jax.random.fold_in(key, i))
        for i, (leaf, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(treedef, sums)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 around it, the nearer one the likelier; what bfloat16 can hold stays as it is."""
    # bfloat16 is float32 without its last 16 bits: a random number added to those carries over as often as it should.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
