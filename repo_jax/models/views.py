"""Rows as two views, prompts + chosen answers and prompts + rejected answers: in a view, `visible` is causal within segments.

Kernels that know a causal mask and segment ids run on views (splash.py, flash.py). A prompt stands in both views, with the same
output; it is taken from one.

Axis letters: B packed rows, T token slots, S slots as keys, Y entries of a view, V views (2 B), N query heads, K key/value
heads, G = N // K, H head size.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from repo_jax.models.attention import Places
from repo_jax.sharding import BATCH


class Views(NamedTuple):
    """Which slot an entry of a view holds, and the other way round; -1 is none."""

    slots_B2Y: jax.Array
    segments_B2Y: jax.Array  # the segment of the entry's prompt: the same for all of a pair; 0 where there is no token
    entries_B2T: jax.Array


def block_size(Y: int, blocks: Sequence[int]) -> int:
    """Of the block sizes, largest first, the one that fills up Y least; what is shorter than all is one block."""
    if blocks[0] >= Y:
        return 128 * math.ceil(Y / 128)
    return min(blocks, key=lambda block: math.ceil(Y / block) * block)


def views_of(places: Places, blocks: Sequence[int]) -> Views:
    """The views of rows, filled up to whole blocks."""
    if places.views_B2Y is None:
        raise ValueError("this kernel of attention needs the views of the rows; build the rows with RowShape.Y above 0")

    def local(prompts_BT, views_B2Y):
        T, Y = prompts_BT.shape[1], views_B2Y.shape[2]
        views_B2Y = jnp.pad(views_B2Y, ((0, 0), (0, 0), (0, -Y % block_size(Y, blocks))), constant_values=T)
        slots_B2Y = jnp.where(views_B2Y < T, views_B2Y, -1)
        segments_B2Y = jnp.take_along_axis(prompts_BT[:, None], slots_B2Y, axis=2, mode="clip")
        # A view lists its slots in ascending order, and what is unused comes last.
        find = jax.vmap(jax.vmap(jnp.searchsorted, (0, None)), (0, None))
        entries_B2T = find(views_B2Y, jnp.arange(T))
        found_B2T = jnp.take_along_axis(views_B2Y, entries_B2T, axis=2, mode="clip") == jnp.arange(T)[None, None]
        return Views(slots_B2Y, jnp.where(slots_B2Y < 0, 0, segments_B2Y), jnp.where(found_B2T, entries_B2T, -1))

    return per_shard(local, (BATCH, BATCH), BATCH)(places.prompts_BT, places.views_B2Y)


def attend_in_views(kernel: Callable, q_BTNH, k_BSKH, v_BSKH, views: Views, mask_B2Y):
    """out_BTNH by kernel(q_VNYH, k_VKYH, v_VKYH, mask_VY) -> out_VNYH, on each shard of rows and heads by itself.

    mask_B2Y is what the kernel has to know of an entry to tell which ones it sees.
    """
    mesh, N, K = jax.sharding.get_abstract_mesh(), q_BTNH.shape[2], k_BSKH.shape[2]
    heads = P(*BATCH, None, "tensor")
    split = K % mesh.shape.get("tensor", 1) == 0

    def local(q_BTNH, k_BSKH, v_BSKH, views, mask_B2Y):
        if not split:
            k_BSKH, v_BSKH = (_keys_of_shard(x_BSKH, q_BTNH.shape[2], N // K) for x_BSKH in (k_BSKH, v_BSKH))
        B, _, Y = views.slots_B2Y.shape
        inputs = (
            jnp.moveaxis(spread(x, views).reshape(2 * B, Y, *x.shape[2:]), 2, 1) for x in (q_BTNH, k_BSKH, v_BSKH)
        )
        out_VNYH = kernel(*inputs, mask_B2Y.reshape(2 * B, *mask_B2Y.shape[2:]))
        return gather(jnp.moveaxis(out_VNYH, 1, 2).reshape(B, 2, Y, *q_BTNH.shape[2:]), views)

    keys = heads if split else BATCH
    return per_shard(local, (heads, keys, keys, BATCH, BATCH), heads)(q_BTNH, k_BSKH, v_BSKH, views, mask_B2Y)


def per_shard(fn: Callable, in_specs, out_specs) -> Callable:
    """fn on each shard of the mesh in context by itself; without a mesh, fn."""
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    # check_vma=False: a Pallas call does not say over which axes its results vary.
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _keys_of_shard(x_BSKH, n: int, G: int):
    """Of all key/value heads, those that this shard's n query heads use: the one they share, or one for each."""
    used_n = (jax.lax.axis_index("tensor") * n + jnp.arange(n)) // G
    return jnp.take(x_BSKH, used_n[:1] if G % n == 0 else used_n, axis=2)


# Both ways between slots and views are gathers; so are their transposes, which would be scatters if left to jax.


def _pick(x_BX, index_BY):
    """x_BX[b, index_BY[b, y]], and 0 where the index is -1."""
    picked = jax.vmap(lambda x_X, index_Y: x_X.at[index_Y].get(mode="clip"))(x_BX, index_BY)
    return jnp.where(jnp.expand_dims(index_BY >= 0, range(2, picked.ndim)), picked, 0)


@jax.custom_vjp
def spread(x_BTNH, views: Views):
    """x_B2YNH: what stands at slots, put where they stand in the views."""
    B, _, Y = views.slots_B2Y.shape
    return _pick(x_BTNH, views.slots_B2Y.reshape(B, 2 * Y)).reshape(B, 2, Y, *x_BTNH.shape[2:])


@jax.custom_vjp
def gather(x_B2YNH, views: Views):
    """x_BTNH: what stands in the views, one entry for each slot; 0 for slots in neither."""
    B, _, Y = views.slots_B2Y.shape
    chosen_BT, rejected_BT = jnp.moveaxis(views.entries_B2T, 1, 0)
    index_BT = jnp.where(chosen_BT >= 0, chosen_BT, jnp.where(rejected_BT >= 0, Y + rejected_BT, -1))
    return _pick(x_B2YNH.reshape(B, 2 * Y, *x_B2YNH.shape[3:]), index_BT)


def _spread_bwd(views, g_B2YNH):
    return sum(_pick(g_B2YNH[:, side], views.entries_B2T[:, side]) for side in (0, 1)), None


def _gather_bwd(views, g_BTNH):
    in_chosen_B2Y = jnp.take_along_axis(views.entries_B2T[:, :1], views.slots_B2Y, axis=2, mode="clip") >= 0
    from_chosen_12 = jnp.array([True, False])[None, :, None]
    return spread(
        g_BTNH, views._replace(slots_B2Y=jnp.where(in_chosen_B2Y == from_chosen_12, views.slots_B2Y, -1))
    ), None


spread.defvjp(lambda x_BTNH, views: (spread(x_BTNH, views), views), _spread_bwd)
gather.defvjp(lambda x_B2YNH, views: (gather(x_B2YNH, views), views), _gather_bwd)
