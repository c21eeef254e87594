"""Attention on NVIDIA GPUs: Triton kernels, written in Pallas, on the two views of a row (views.py).

FlashAttention-2 (arXiv:2307.08691) in which a block of queries meets only the blocks of keys of which it sees something: whoever packs short
pairs into long rows pays for the pairs, not for the rows. Keys and values are not repeated for the query heads that share them;
windows and soft caps cost no mask in memory. (jax warns since 0.11 that Pallas's Triton backend will go; flash.py is plain jax.)

Axis letters: B packed rows, T token slots, S slots as keys, Y entries of a view, V views (2 B), Q queries of a block, S also keys of
a block, N query heads, K key/value heads, G = N // K, H head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from repo_jax.models.attention import MASKED, RESIDUALS, Kernel, Places
from repo_jax.models.views import Views, attend_in_views, per_shard, views_of
from repo_jax.sharding import BATCH

FILL = (128,)  # views are filled up to whole multiples of this


class Sight(NamedTuple):
    """Of each entry of a view: the first that it sees (it sees all from there to itself), and the last that sees it. Padding sees itself."""

    views: Views
    first_B2Y: jax.Array
    last_B2Y: jax.Array


class Tiles(NamedTuple):
    """How many queries and keys a program takes at a time, and its warps and pipeline stages."""

    Q: int
    S: int
    warps: int
    stages: int


class How(NamedTuple):
    """What does not depend on arrays."""

    cap: float | None
    interpret: bool


def tiles(H: int, itemsize: int) -> tuple[Tiles, Tiles, Tiles]:
    """Of the forward pass, of the keys' and values' gradients, and of the queries'; what fits into a Hopper's shared memory."""
    if itemsize > 2:
        small = Tiles(32, 32, 4, 1)
        return small, small, small
    if H > 128:
        return Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
    if H > 64:
        return Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)


def sight(places: Places, window: int | None) -> Sight:
    views = views_of(places, FILL)

    def ends(segments_B2Y):
        Y = segments_B2Y.shape[2]
        y_11Y = jnp.arange(Y)[None, None]
        starts_B2Y = segments_B2Y != jnp.roll(segments_B2Y, 1, axis=2)
        stops_B2Y = segments_B2Y != jnp.roll(segments_B2Y, -1, axis=2)
        first_B2Y = jax.lax.cummax(jnp.where(starts_B2Y, y_11Y, 0), axis=2)
        last_B2Y = jax.lax.cummin(jnp.where(stops_B2Y, y_11Y, Y - 1), axis=2, reverse=True)
        if window is not None:  # it counts positions, and in a segment of a view these are consecutive
            first_B2Y = jnp.maximum(first_B2Y, y_11Y - (window - 1))
            last_B2Y = jnp.minimum(last_B2Y, y_11Y + (window - 1))
        there_B2Y = segments_B2Y > 0
        return jnp.where(there_B2Y, first_B2Y, y_11Y), jnp.where(there_B2Y, last_B2Y, y_11Y)

    return Sight(views, *per_shard(ends, (BATCH,), (BATCH, BATCH))(views.segments_B2Y))


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    sight: Sight,
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
):
    """out_BTNH; interpret runs the kernels as plain jax, on any device."""

    def kernel(q_VNYH, k_VKYH, v_VKYH, ends_V2Y):
        H = q_VNYH.shape[-1]
        wide = ((0, 0),) * 3 + ((0, max(16, 1 << (H - 1).bit_length()) - H),)  # Triton's blocks are powers of two
        padded = (jnp.pad(x, wide) for x in (q_VNYH, k_VKYH, v_VKYH)) if wide[3][1] else (q_VNYH, k_VKYH, v_VKYH)
        return _flash(How(cap, interpret), *padded, ends_V2Y[:, 0], ends_V2Y[:, 1])[..., :H]

    ends_B22Y = jnp.stack([sight.first_B2Y, sight.last_B2Y], axis=2)
    return attend_in_views(kernel, q_BTNH * scale, k_BSKH, v_BSKH, sight.views, ends_B22Y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(how: How, q_VNYH, k_VKYH, v_VKYH, first_VY, last_VY):
    return _forward(how, q_VNYH, k_VKYH, v_VKYH, first_VY)[0]


def _fwd(how: How, q_VNYH, k_VKYH, v_VKYH, first_VY, last_VY):
    out_VNYH, norm_VNY = checkpoint_name(_forward(how, q_VNYH, k_VKYH, v_VKYH, first_VY), RESIDUALS)
    return out_VNYH, (q_VNYH, k_VKYH, v_VKYH, first_VY, last_VY, out_VNYH, norm_VNY)


def _bwd(how: How, residuals, g_VNYH):
    q_VNYH, k_VKYH, v_VKYH, first_VY, last_VY, out_VNYH, norm_VNY = residuals
    mean_VNY = jnp.sum(out_VNYH.astype(jnp.float32) * g_VNYH.astype(jnp.float32), axis=-1)
    same = q_VNYH, k_VKYH, v_VKYH, g_VNYH, norm_VNY, mean_VNY, first_VY
    dk_VKYH, dv_VKYH = _backward_keys(how, *same, last_VY)
    return _backward_queries(how, *same), dk_VKYH, dv_VKYH, None, None


_flash.defvjp(_fwd, _bwd)


# One program makes one block of an output. Arrays that a program reads in pieces are handed to it whole.


def _call(how: How, kernel, grid, tile: Tiles, ins, outs):
    """The kernel over the grid; ins are (array, block, index), outs (shape, dtype, block, index)."""
    import jax.experimental.pallas as pl  # imported here: it takes a second, and only GPUs have a use for it
    import jax.experimental.pallas.triton as triton

    return pl.pallas_call(
        functools.partial(kernel, cap=how.cap, tile=tile),
        grid=grid,
        in_specs=[pl.BlockSpec(block, index) for _, block, index in ins],
        out_specs=[pl.BlockSpec(block, index) for *_, block, index in outs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, *_ in outs],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=how.interpret,
    )(*(array for array, *_ in ins))


def _forward(how: How, q_VNYH, k_VKYH, v_VKYH, first_VY):
    """out_VNYH, and norm_VNY: the logarithm of the softmax's normaliser, from which backward has its probabilities."""
    (V, N, Y, H), G = q_VNYH.shape, q_VNYH.shape[1] // k_VKYH.shape[1]
    tile = tiles(H, q_VNYH.dtype.itemsize)[0]
    queries = (None, None, tile.Q, H), lambda i, n, v: (v, n, i, 0)
    keys = (None, None, Y, H), lambda i, n, v: (v, n // G, 0, 0)
    ins = [(q_VNYH, *queries), (k_VKYH, *keys), (v_VKYH, *keys), (first_VY, (None, tile.Q), lambda i, n, v: (v, i))]
    outs = [
        (q_VNYH.shape, q_VNYH.dtype, *queries),
        ((V, N, Y), jnp.float32, (None, None, tile.Q), lambda i, n, v: (v, n, i)),
    ]
    return _call(how, _forward_kernel, (Y // tile.Q, N, V), tile, ins, outs)


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, out_ref, norm_ref, *, cap, tile: Tiles):
    import jax.experimental.pallas as pl

    Q, S = tile.Q, tile.S
    i = pl.program_id(0)
    q_QH, first_Q = q_ref[...], first_ref[...]

    def meet(j, carry):
        out_QH, total_Q, most_Q = carry
        here = pl.dslice(j * S, S)
        logits_QS = jnp.where(_sees(first_Q, i, j, tile), _soften(_dot(q_QH, k_ref[here, :].T), cap)[0], MASKED)
        new_Q = jnp.maximum(most_Q, logits_QS.max(axis=1))
        kept_Q, probs_QS = jnp.exp(most_Q - new_Q), jnp.exp(logits_QS - new_Q[:, None])
        v_SH = v_ref[here, :]
        out_QH = kept_Q[:, None] * out_QH + _dot(probs_QS.astype(v_SH.dtype), v_SH)
        return out_QH, kept_Q * total_Q + probs_QS.sum(axis=1), new_Q

    zeros_Q = jnp.zeros(Q, jnp.float32)
    start = jnp.zeros(q_QH.shape, jnp.float32), zeros_Q, jnp.full(Q, MASKED, jnp.float32)
    out_QH, total_Q, most_Q = jax.lax.fori_loop(*_seen_by(first_Q, i, tile), meet, start)
    out_ref[...] = (out_QH / total_Q[:, None]).astype(out_ref.dtype)
    norm_ref[...] = most_Q + jnp.log(total_Q)


def _backward_queries(how: How, q_VNYH, k_VKYH, v_VKYH, g_VNYH, norm_VNY, mean_VNY, first_VY):
    (V, N, Y, H), G = q_VNYH.shape, q_VNYH.shape[1] // k_VKYH.shape[1]
    tile = tiles(H, q_VNYH.dtype.itemsize)[2]
    queries = (None, None, tile.Q, H), lambda i, n, v: (v, n, i, 0)
    numbers = (None, None, tile.Q), lambda i, n, v: (v, n, i)
    keys = (None, None, Y, H), lambda i, n, v: (v, n // G, 0, 0)
    ins = [(q_VNYH, *queries), (k_VKYH, *keys), (v_VKYH, *keys), (g_VNYH, *queries), (norm_VNY, *numbers)]
    ins += [(mean_VNY, *numbers), (first_VY, (None, tile.Q), lambda i, n, v: (v, i))]
    outs = [(q_VNYH.shape, q_VNYH.dtype, *queries)]
    return _call(how, _backward_queries_kernel, (Y // tile.Q, N, V), tile, ins, outs)[0]


def _backward_queries_kernel(q_ref, k_ref, v_ref, g_ref, norm_ref, mean_ref, first_ref, dq_ref, *, cap, tile: Tiles):
    import jax.experimental.pallas as pl

    i = pl.program_id(0)
    q_QH, g_QH, norm_Q, mean_Q, first_Q = (ref[...] for ref in (q_ref, g_ref, norm_ref, mean_ref, first_ref))

    def meet(j, dq_QH):
        here = pl.dslice(j * tile.S, tile.S)
        k_SH, v_SH = k_ref[here, :], v_ref[here, :]
        logits_QS, slopes_QS = _soften(_dot(q_QH, k_SH.T), cap)
        probs_QS = jnp.where(_sees(first_Q, i, j, tile), jnp.exp(logits_QS - norm_Q[:, None]), 0.0)
        dlogits_QS = probs_QS * (_dot(g_QH, v_SH.T) - mean_Q[:, None]) * slopes_QS
        return dq_QH + _dot(dlogits_QS.astype(k_SH.dtype), k_SH)

    zeros_QH = jnp.zeros(q_QH.shape, jnp.float32)
    dq_ref[...] = jax.lax.fori_loop(*_seen_by(first_Q, i, tile), meet, zeros_QH).astype(dq_ref.dtype)


def _backward_keys(how: How, q_VNYH, k_VKYH, v_VKYH, g_VNYH, norm_VNY, mean_VNY, first_VY, last_VY):
    (V, N, Y, H), K = q_VNYH.shape, k_VKYH.shape[1]
    tile = tiles(H, q_VNYH.dtype.itemsize)[1]
    grouped = [x.reshape(V, K, N // K, *x.shape[2:]) for x in (q_VNYH, g_VNYH, norm_VNY, mean_VNY)]
    keys = (None, None, tile.S, H), lambda j, k, v: (v, k, j, 0)
    queries = (None, None, N // K, Y, H), lambda j, k, v: (v, k, 0, 0, 0)
    numbers = (None, None, N // K, Y), lambda j, k, v: (v, k, 0, 0)
    ins = [(k_VKYH, *keys), (v_VKYH, *keys), (last_VY, (None, tile.S), lambda j, k, v: (v, j))]
    ins += [(grouped[0], *queries), (grouped[1], *queries), (grouped[2], *numbers), (grouped[3], *numbers)]
    ins += [(first_VY, (None, Y), lambda j, k, v: (v, 0))]
    outs = [(x.shape, x.dtype, *keys) for x in (k_VKYH, v_VKYH)]
    return _call(how, _backward_keys_kernel, (Y // tile.S, K, V), tile, ins, outs)


def _backward_keys_kernel(
    k_ref, v_ref, last_ref, q_ref, g_ref, norm_ref, mean_ref, first_ref, dk_ref, dv_ref, *, cap, tile: Tiles
):
    import jax.experimental.pallas as pl

    Q, S, G = tile.Q, tile.S, q_ref.shape[0]
    j = pl.program_id(0)
    k_SH, v_SH = k_ref[...], v_ref[...]
    start, stop = (j * S) // Q, last_ref[...].max() // Q + 1  # of the blocks of queries that see any of these keys

    def meet(n, carry):
        dk_SH, dv_SH = carry
        g, i = n // (stop - start), start + n % (stop - start)
        here = pl.dslice(i * Q, Q)
        q_QH, g_QH = q_ref[g, here, :], g_ref[g, here, :]
        logits_SQ, slopes_SQ = _soften(_dot(k_SH, q_QH.T), cap)
        probs_SQ = jnp.exp(logits_SQ - norm_ref[g, here][None])
        probs_SQ = jnp.where(_sees(first_ref[here], i, j, tile).T, probs_SQ, 0.0)
        dlogits_SQ = probs_SQ * (_dot(v_SH, g_QH.T) - mean_ref[g, here][None]) * slopes_SQ
        dv_SH += _dot(probs_SQ.astype(g_QH.dtype), g_QH)
        return dk_SH + _dot(dlogits_SQ.astype(q_QH.dtype), q_QH), dv_SH

    zeros_SH = jnp.zeros(k_SH.shape, jnp.float32)
    dk_SH, dv_SH = jax.lax.fori_loop(0, G * (stop - start), meet, (zeros_SH, zeros_SH))
    dk_ref[...], dv_ref[...] = dk_SH.astype(dk_ref.dtype), dv_SH.astype(dv_ref.dtype)


def _dot(x, y):
    import jax.experimental.pallas.triton as triton

    return triton.dot(x, y, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


def _soften(logits, cap: float | None):
    """attention.soften, and its slopes."""
    if cap is None:
        return logits, 1.0
    tanh = 2 / (1 + jnp.exp(-2 / cap * logits)) - 1
    return cap * tanh, 1 - tanh**2


def _sees(first_Q, i, j, tile: Tiles):
    """mask_QS of the queries of block i and the keys of block j."""
    q_Q, s_S = i * tile.Q + jnp.arange(tile.Q), j * tile.S + jnp.arange(tile.S)
    return (first_Q[:, None] <= s_S[None]) & (s_S[None] <= q_Q[:, None])


def _seen_by(first_Q, i, tile: Tiles):
    """The blocks of keys of which the queries of block i see something: the first, and the one behind the last."""
    return first_Q.min() // tile.S, ((i + 1) * tile.Q - 1) // tile.S + 1


TRITON = Kernel(sight, attend)
