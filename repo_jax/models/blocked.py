"""Attention for one CPU: blocks that fit its caches, and only those in which something may be visible.

Axis letters: B packed rows, T token slots of a row, X slots of all rows end to end, I blocks of them, Q queries of a block,
S keys of a block, N query heads, K key/value heads, H head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from repo_jax.models.attention import MASKED, RESIDUALS, Kernel, Places, soften

BLOCK = 128  # slots; 128 x 128 logits and the rows of q, k and v that make them stay in a core's own cache


class Sight(NamedTuple):
    """All rows end to end, and which blocks of keys a block of queries has to look at: first_I[i] .. i, whatever the window."""

    positions_X: jax.Array
    segments_X: jax.Array  # numbered over all rows; 0 is padding
    prompts_X: jax.Array
    first_I: jax.Array  # i + 1 or more where a block is all padding
    last_I: jax.Array  # the last block of queries that looks at a block of keys; below j where none does


def _sight(places: Places, window: int | None) -> Sight:
    B, T = places.segments_BT.shape
    rows_B1 = (T + 1) * jnp.arange(B)[:, None]

    def end_to_end(x_BT):
        return jnp.pad(x_BT.reshape(-1), (0, -B * T % BLOCK))

    def over_all_rows(x_BT):
        return end_to_end(jnp.where(x_BT > 0, x_BT + rows_B1, 0))

    prompts_X = over_all_rows(places.prompts_BT)
    slots_X = jnp.arange(len(prompts_X))
    new_X = prompts_X != jnp.roll(prompts_X, 1)
    # What a token sees begins with its prompt, and that is where its pair's slots begin.
    begins_X = jax.lax.cummax(jnp.where(new_X, slots_X, 0))
    first_I = jnp.where(prompts_X > 0, begins_X, len(prompts_X)).reshape(-1, BLOCK).min(axis=1) // BLOCK
    blocks_I = jnp.arange(len(first_I))
    looks_II = (first_I[:, None] <= blocks_I[None]) & (blocks_I[None] <= blocks_I[:, None])
    last_I = jnp.max(jnp.where(looks_II, blocks_I[:, None], -1), axis=0)
    return Sight(end_to_end(places.positions_BT), over_all_rows(places.segments_BT), prompts_X, first_I, last_I)


def _attend(q_BTNH, k_BSKH, v_BSKH, sight: Sight, *, window: int | None, scale: float, cap: float | None):
    B, T, N, H = q_BTNH.shape

    def heads_first(x_BTNH):
        x_XNH = x_BTNH.reshape(B * T, -1, H)
        return jnp.pad(jnp.moveaxis(x_XNH, 1, 0), ((0, 0), (0, -B * T % BLOCK), (0, 0)))

    out_NXH = _heads(window, cap, *(heads_first(x) for x in (q_BTNH * scale, k_BSKH, v_BSKH)), sight)
    return jnp.moveaxis(out_NXH[:, : B * T], 0, 1).reshape(B, T, N, H)


BLOCKED = Kernel(_sight, _attend)


def _block(x, i):
    """Block i of slots."""
    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK)


def _put(x, block, i):
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * BLOCK, axis=0)


def _logits(window: int | None, cap: float | None, q_QH, k_SH, sight: Sight, i, j):
    """The logits of a block of queries and one of keys, MASKED where a key is not visible, and their slopes under the cap."""
    slots_Q = jnp.arange(BLOCK)
    segments_Q, segments_S = _block(sight.segments_X, i)[:, None], _block(sight.segments_X, j)[None]
    seen_QS = i * BLOCK + slots_Q[:, None] >= j * BLOCK + slots_Q[None]
    seen_QS &= (segments_Q == segments_S) | (_block(sight.prompts_X, i)[:, None] == segments_S)
    if window is not None:
        seen_QS &= _block(sight.positions_X, i)[:, None] - _block(sight.positions_X, j)[None] < window
    capped_QS = soften(jnp.einsum("QH,SH->QS", q_QH, k_SH, preferred_element_type=jnp.float32), cap)
    slopes_QS = 1.0 if cap is None else 1 - (capped_QS / cap) ** 2
    return jnp.where(seen_QS, capped_QS, MASKED), slopes_QS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _heads(window, cap, q_NXH, k_KXH, v_KXH, sight):
    return _heads_fwd(window, cap, q_NXH, k_KXH, v_KXH, sight)[0]


def _heads_fwd(window, cap, q_NXH, k_KXH, v_KXH, sight):
    shared = len(q_NXH) // len(k_KXH)  # query heads per key/value head

    def one(inputs):
        q_XH, n = inputs
        return _one_head(window, cap, q_XH, k_KXH[n // shared], v_KXH[n // shared], sight)

    out_NXH, lse_NX = jax.lax.map(one, (q_NXH, jnp.arange(len(q_NXH))))
    out_NXH, lse_NX = checkpoint_name(out_NXH, RESIDUALS), checkpoint_name(lse_NX, RESIDUALS)
    return out_NXH, (q_NXH, k_KXH, v_KXH, sight, out_NXH, lse_NX)


def _heads_bwd(window, cap, residuals, g_NXH):
    q_NXH, k_KXH, v_KXH, sight, out_NXH, lse_NX = residuals
    K, shared = len(k_KXH), len(q_NXH) // len(k_KXH)

    def one(inputs):
        n, *of_head = inputs
        return _one_head_bwd(window, cap, k_KXH[n // shared], v_KXH[n // shared], sight, *of_head)

    grads = jax.lax.map(one, (jnp.arange(len(q_NXH)), q_NXH, out_NXH, lse_NX, g_NXH))
    dq_NXH, dk_NXH, dv_NXH = (grad.astype(q_NXH.dtype) for grad in grads)
    dk_KXH, dv_KXH = (x_NXH.reshape(K, shared, *x_NXH.shape[1:]).sum(axis=1) for x_NXH in (dk_NXH, dv_NXH))
    return dq_NXH, dk_KXH, dv_KXH, None


_heads.defvjp(_heads_fwd, _heads_bwd)


def _one_head(window, cap, q_XH, k_XH, v_XH, sight: Sight):
    """Softmax over blocks of keys as they come, with a running maximum (arXiv:2205.14135)."""

    def queries(i, done):
        q_QH = _block(q_XH, i)

        def keys(j, so_far):
            top_Q, sum_Q, out_QH = so_far
            logits_QS, _ = _logits(window, cap, q_QH, _block(k_XH, j), sight, i, j)
            new_Q = jnp.maximum(top_Q, logits_QS.max(axis=1))
            weights_QS, kept_Q = jnp.exp(logits_QS - new_Q[:, None]), jnp.exp(top_Q - new_Q)
            part_QH = weights_QS.astype(v_XH.dtype) @ _block(v_XH, j)
            return new_Q, sum_Q * kept_Q + weights_QS.sum(axis=1), out_QH * kept_Q[:, None] + part_QH

        start = jnp.full(BLOCK, MASKED), jnp.zeros(BLOCK), jnp.zeros(q_QH.shape)
        top_Q, sum_Q, out_QH = jax.lax.fori_loop(sight.first_I[i], i + 1, keys, start)
        sum_Q = jnp.where(sum_Q > 0, sum_Q, 1)  # of a block that is all padding
        out_XH, lse_X = done
        return _put(out_XH, (out_QH / sum_Q[:, None]).astype(out_XH.dtype), i), _put(lse_X, top_Q + jnp.log(sum_Q), i)

    empty = jnp.zeros(q_XH.shape, v_XH.dtype), jnp.zeros(len(q_XH))
    return jax.lax.fori_loop(0, len(sight.first_I), queries, empty)


def _one_head_bwd(window, cap, k_XH, v_XH, sight: Sight, q_XH, out_XH, lse_X, g_XH):
    dtype = q_XH.dtype
    drift_X = jnp.sum(out_XH.astype(jnp.float32) * g_XH, axis=1)

    # Keys outside, queries inside: each turn then changes one block of dq, and one of dk and dv when the inner loop ends.
    def keys(j, grads):
        k_SH, v_SH = _block(k_XH, j), _block(v_XH, j)

        def queries(i, so_far):
            dq_XH, dk_SH, dv_SH = so_far
            q_QH, g_QH = _block(q_XH, i), _block(g_XH, i)
            logits_QS, slopes_QS = _logits(window, cap, q_QH, k_SH, sight, i, j)
            probs_QS = jnp.exp(logits_QS - _block(lse_X, i)[:, None])
            dprobs_QS = jnp.einsum("QH,SH->QS", g_QH, v_SH, preferred_element_type=jnp.float32)
            dlogits_QS = (probs_QS * (dprobs_QS - _block(drift_X, i)[:, None]) * slopes_QS).astype(dtype)
            dv_SH += probs_QS.astype(dtype).T @ g_QH
            return _put(dq_XH, _block(dq_XH, i) + dlogits_QS @ k_SH, i), dk_SH + dlogits_QS.T @ q_QH, dv_SH

        dq_XH, dk_XH, dv_XH = grads
        zeros_SH = jnp.zeros(k_SH.shape)
        dq_XH, dk_SH, dv_SH = jax.lax.fori_loop(j, sight.last_I[j] + 1, queries, (dq_XH, zeros_SH, zeros_SH))
        return dq_XH, _put(dk_XH, dk_SH, j), _put(dv_XH, dv_SH, j)

    zeros_XH = jnp.zeros(q_XH.shape)
    return jax.lax.fori_loop(0, len(sight.first_I), keys, (zeros_XH, zeros_XH, zeros_XH))
