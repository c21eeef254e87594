"""Attention in memory linear in the row's length, in plain jax: blocks of queries meet blocks of keys (arXiv:2205.14135).

For GPUs. It runs on the views of a row (views.py) and leaves out the blocks in which nothing is seen. Of what is faster there,
cuDNN by way of jax.nn knows no segments and Pallas's Triton kernels are on their way out.

Axis letters: B packed rows, T token slots, S keys of a block (or slots as keys), Y entries of a view, V views (2 B), I blocks of
a view, Q queries of a block, N query heads, K key/value heads, G = N // K, H head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from repo_jax.models.attention import MASKED, RESIDUALS, Kernel, Places, soften
from repo_jax.models.views import Views, attend_in_views, block_size, per_shard, views_of
from repo_jax.sharding import BATCH

BLOCKS = (512, 384, 256)


class Sight(NamedTuple):
    views: Views
    first_B2Y: jax.Array  # an entry sees from this one up to itself; where there is no token, only itself


def sight(places: Places, window: int | None) -> Sight:
    views = views_of(places, BLOCKS)

    def first(segments_B2Y):
        y_11Y = jnp.arange(segments_B2Y.shape[2])[None, None]
        starts_B2Y = segments_B2Y != jnp.roll(segments_B2Y, 1, axis=2)
        first_B2Y = jax.lax.cummax(jnp.where(starts_B2Y, y_11Y, 0), axis=2)
        # A window counts positions, and in a segment of a view these are consecutive.
        first_B2Y = first_B2Y if window is None else jnp.maximum(first_B2Y, y_11Y - (window - 1))
        return jnp.where(segments_B2Y > 0, first_B2Y, y_11Y)

    return Sight(views, per_shard(first, (BATCH,), BATCH)(views.segments_B2Y))


def attend(q_BTNH, k_BSKH, v_BSKH, sight: Sight, *, window: int | None, scale: float, cap: float | None = None):
    kernel = functools.partial(_attend, cap)
    return attend_in_views(kernel, q_BTNH * scale, k_BSKH, v_BSKH, sight.views, sight.first_B2Y)


def _attend(cap: float | None, q_VNYH, k_VKYH, v_VKYH, first_VY):
    (V, N, Y, H), K = q_VNYH.shape, k_VKYH.shape[1]
    block = block_size(Y, BLOCKS)
    q_IVKGQH = jnp.moveaxis(q_VNYH.reshape(V, K, N // K, Y // block, block, H), 3, 0)
    first_IVQ = jnp.moveaxis(first_VY.reshape(V, Y // block, block), 1, 0)
    out_IVKGQH = _blockwise(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ)
    return jnp.moveaxis(out_IVKGQH, 0, 3).reshape(V, N, Y, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ):
    return _forward(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ)[0]


def _forward(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ):
    """out_IVKGQH, and the logarithm of the softmax's normaliser, from which backward has its probabilities."""

    def queries(_, inputs):
        i, q_VKGQH, first_VQ = inputs

        def meet(j, carry):
            out_VKGQH, total_VKGQ, most_VKGQ = carry
            logits_VKGQS = _masked(soften(_logits(q_VKGQH, k_VKYH, j), cap), first_VQ, i, j)
            new_VKGQ = jnp.maximum(most_VKGQ, logits_VKGQS.max(axis=-1))
            kept_VKGQ, probs_VKGQS = jnp.exp(most_VKGQ - new_VKGQ), jnp.exp(logits_VKGQS - new_VKGQ[..., None])
            v_VKSH = _block(v_VKYH, j, probs_VKGQS.shape[-1])
            share_VKGQH = _product("VKGQS,VKSH->VKGQH", probs_VKGQS.astype(v_VKSH.dtype), v_VKSH)
            return (
                kept_VKGQ[..., None] * out_VKGQH + share_VKGQH,
                kept_VKGQ * total_VKGQ + probs_VKGQS.sum(axis=-1),
                new_VKGQ,
            )

        zeros_VKGQH = jnp.zeros(q_VKGQH.shape, jnp.float32)
        zeros_VKGQ = zeros_VKGQH[..., 0]
        carry = (zeros_VKGQH, zeros_VKGQ, jnp.full_like(zeros_VKGQ, MASKED))
        out_VKGQH, total_VKGQ, most_VKGQ = jax.lax.fori_loop(_first_block(first_VQ), i + 1, meet, carry)
        return None, ((out_VKGQH / total_VKGQ[..., None]).astype(q_VKGQH.dtype), most_VKGQ + jnp.log(total_VKGQ))

    blocks = (jnp.arange(len(q_IVKGQH)), q_IVKGQH, first_IVQ)
    return checkpoint_name(jax.lax.scan(queries, None, blocks)[1], RESIDUALS)


def _fwd(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ):
    out_IVKGQH, norm_IVKGQ = _forward(cap, q_IVKGQH, k_VKYH, v_VKYH, first_IVQ)
    return out_IVKGQH, (q_IVKGQH, k_VKYH, v_VKYH, first_IVQ, out_IVKGQH, norm_IVKGQ)


def _bwd(cap, residuals, g_IVKGQH):
    q_IVKGQH, k_VKYH, v_VKYH, first_IVQ, out_IVKGQH, norm_IVKGQ = residuals

    def queries(carry, inputs):
        i, q_VKGQH, first_VQ, g_VKGQH, out_VKGQH, norm_VKGQ = inputs
        mean_VKGQ1 = (out_VKGQH.astype(jnp.float32) * g_VKGQH.astype(jnp.float32)).sum(axis=-1, keepdims=True)

        def meet(j, carry):
            dq_VKGQH, dk_VKYH, dv_VKYH = carry
            softened_VKGQS, pullback = jax.vjp(functools.partial(soften, cap=cap), _logits(q_VKGQH, k_VKYH, j))
            probs_VKGQS = jnp.exp(_masked(softened_VKGQS, first_VQ, i, j) - norm_VKGQ[..., None])
            k_VKSH, v_VKSH = (_block(x_VKYH, j, probs_VKGQS.shape[-1]) for x_VKYH in (k_VKYH, v_VKYH))
            slopes_VKGQS = probs_VKGQS * (_product("VKGQH,VKSH->VKGQS", g_VKGQH, v_VKSH) - mean_VKGQ1)
            slopes_VKGQS = pullback(slopes_VKGQS)[0].astype(k_VKSH.dtype)
            probs_VKGQS = probs_VKGQS.astype(v_VKSH.dtype)
            return (
                dq_VKGQH + _product("VKGQS,VKSH->VKGQH", slopes_VKGQS, k_VKSH),
                _add_block(dk_VKYH, j, _product("VKGQS,VKGQH->VKSH", slopes_VKGQS, q_VKGQH)),
                _add_block(dv_VKYH, j, _product("VKGQS,VKGQH->VKSH", probs_VKGQS, g_VKGQH)),
            )

        carry = (jnp.zeros(q_VKGQH.shape, jnp.float32), *carry)
        dq_VKGQH, *carry = jax.lax.fori_loop(_first_block(first_VQ), i + 1, meet, carry)
        return tuple(carry), dq_VKGQH.astype(q_VKGQH.dtype)

    blocks = (jnp.arange(len(q_IVKGQH)), q_IVKGQH, first_IVQ, g_IVKGQH, out_IVKGQH, norm_IVKGQ)
    zeros = tuple(jnp.zeros(x_VKYH.shape, jnp.float32) for x_VKYH in (k_VKYH, v_VKYH))
    (dk_VKYH, dv_VKYH), dq_IVKGQH = jax.lax.scan(queries, zeros, blocks)
    return dq_IVKGQH, dk_VKYH.astype(k_VKYH.dtype), dv_VKYH.astype(v_VKYH.dtype), None


_blockwise.defvjp(_fwd, _bwd)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _block(x_VKYH, j, Q: int):
    return jax.lax.dynamic_slice_in_dim(x_VKYH, j * Q, Q, axis=2)


def _add_block(x_VKYH, j, block_VKSH):
    Q = block_VKSH.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x_VKYH, _block(x_VKYH, j, Q) + block_VKSH, j * Q, axis=2)


def _logits(q_VKGQH, k_VKYH, j):
    return _product("VKGQH,VKSH->VKGQS", q_VKGQH, _block(k_VKYH, j, q_VKGQH.shape[3]))


def _masked(logits_VKGQS, first_VQ, i, j):
    """Queries of block i, keys of block j."""
    Q = first_VQ.shape[1]
    s_11S, q_1Q1 = (j * Q + jnp.arange(Q))[None, None], (i * Q + jnp.arange(Q))[None, :, None]
    mask_VQS = (first_VQ[:, :, None] <= s_11S) & (s_11S <= q_1Q1)
    return jnp.where(mask_VQS[:, None, None], logits_VKGQS, MASKED)


def _first_block(first_VQ):
    """The first block of keys in which a query of this block sees anything, in any view."""
    return first_VQ.min() // first_VQ.shape[1]


FLASH = Kernel(sight, attend)
