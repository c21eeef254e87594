"""Rotary positions, who sees whom in a packed row, and attention.

Axis letters: B sequences (packed rows), T queries, S keys, N query heads, K key/value heads, G = N // K, H head size.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # queries that attend_blocked takes at a time
MASKED = -1e30  # finite, so that a padding slot, which sees nothing, yields numbers instead of NaN


def rope(x_BTNH, positions_BT, *, theta: float):
    """Rotates the two halves of each head by its position (arXiv:2104.09864, in Hugging Face's rotate-half layout)."""
    H = x_BTNH.shape[-1]
    frequencies_h = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)  # h = H // 2
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies_h[None, None]
    cos_BT1h, sin_BT1h = jnp.cos(angles_BTh)[:, :, None], jnp.sin(angles_BTh)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def visible(segments_BT, prompts_BT):
    """mask_BTS: a token sees what stands before it in its own segment and in its prompt's."""
    T = segments_BT.shape[1]
    own_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    prompt_BTS = prompts_BT[:, :, None] == segments_BT[:, None, :]
    return jnp.tri(T, dtype=bool)[None] & (own_BTS | prompt_BTS)


def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Grouped-query attention, as plain as it gets: the oracle of every faster form. The softmax runs in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def attend_blocked(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """attend for one CPU: one head of one row at a time, and of its keys only those up to the end of a block of queries.

    What is worked on stays in the cache, and the blocks above the diagonal are never computed; backward computes the
    probabilities again.
    """
    B, T, N, H = q_BTNH.shape
    shared = N // k_BSKH.shape[2]  # query heads per key/value head

    def heads_first(x_BTNH):
        return jnp.moveaxis(x_BTNH, 2, 1).reshape(B * N, T, H)

    @jax.checkpoint
    def one_head(inputs):
        q_TH, k_TH, v_TH, row = inputs
        mask_TS, out = mask_BTS[row], []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            logits_TS = jnp.einsum("TH,SH->TS", q_TH[start:end], k_TH[:end], preferred_element_type=jnp.float32)
            logits_TS = jnp.where(mask_TS[start:end, :end], logits_TS, MASKED)
            out.append(jax.nn.softmax(logits_TS, axis=-1).astype(v_TH.dtype) @ v_TH[:end])
        return jnp.concatenate(out)

    keys, values = (heads_first(jnp.repeat(x_BSKH, shared, axis=2)) for x_BSKH in (k_BSKH, v_BSKH))
    rows = jnp.repeat(jnp.arange(B), N)
    out = jax.lax.map(one_head, (heads_first(q_BTNH * H**-0.5), keys, values, rows))
    return jnp.moveaxis(out.reshape(B, N, T, H), 1, 2)


ATTENTION = {
    # name      function          fastest on
    "dense":    attend,           # any mesh
    "blocked":  attend_blocked,   # one CPU device: `benchmarks/attention.py` measures both
}  # fmt: skip
