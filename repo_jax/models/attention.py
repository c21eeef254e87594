"""Rotary positions, who sees whom, and attention.

Axis letters: B sequences (packed rows), T queries, S keys, N query heads, K key/value heads, G = N // K, H head size,
h = H // 2.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.models.config import Rope

RESIDUALS = "attention"  # the name under which kernels keep what their backward needs, for remat policies
MASKED = -1e30  # finite, so that a padding slot, which sees nothing, yields numbers instead of NaN


class Places(NamedTuple):
    """Where the tokens of packed rows stand (data/rows.py builds these)."""

    positions_BT: Any
    segments_BT: Any
    prompts_BT: Any
    views_B2Y: Any = None  # the slots of prompts + chosen answers, and of prompts + rejected ones


class Kernel(NamedTuple):
    """A form of attention over packed rows. All equal `visible`; what padding slots get is any finite number."""

    # (places, window) -> what the kernel needs to know of them, worked out once for all layers of that window
    sight: Callable[[Places, int | None], Any]
    attend: Callable  # (q_BTNH, k_BSKH, v_BSKH, sight, *, window, scale, cap) -> out_BTNH


def frequencies(rope: Rope, H: int) -> np.ndarray:
    """frequencies_h: radians per position of each pair of a head's numbers."""
    plain_h = rope.theta ** (-np.arange(0, H, 2) / H)
    if rope.kind == "default":
        return plain_h
    if rope.kind == "linear":  # arXiv:2306.15595
        return plain_h / rope.factor
    # llama3 (arXiv:2407.21783, section 3.4.3 and the released code): what turns often within original_length stays, what
    # turns seldom is stretched, and between the two bounds one fades into the other.
    turns_h = rope.original_length * plain_h / (2 * math.pi)
    kept_h = (turns_h - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_h = np.clip(kept_h, 0, 1)
    return kept_h * plain_h + (1 - kept_h) * plain_h / rope.factor


def rotations(positions_BT, rope: Rope, H: int):
    """cos_BT1h and sin_BT1h, in float32."""
    frequencies_h = jnp.asarray(frequencies(rope, H), jnp.float32)
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
    return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)


def rotate(x_BTNH, cos_BT1h, sin_BT1h):
    """Rotates the two halves of each head by its position (arXiv:2104.09864, in Hugging Face's rotate-half layout)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def visible(segments_BT, prompts_BT, positions_BT=None, window: int | None = None):
    """mask_BTS: a token sees what stands before it in its own segment and in its prompt's, at most window - 1 positions back."""
    T = segments_BT.shape[1]
    own_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    prompt_BTS = prompts_BT[:, :, None] == segments_BT[:, None, :]
    mask_BTS = jnp.tri(T, dtype=bool)[None] & (own_BTS | prompt_BTS)
    return mask_BTS & _within(window, positions_BT, positions_BT)


def visible_cached(positions_BT, positions_BS, window: int | None = None):
    """mask_BTS for one sequence per row, wherever its tokens stand: one sees positions from 0 up to its own; -1 is no token."""
    q_BT1, k_B1S = positions_BT[:, :, None], positions_BS[:, None, :]
    return (k_B1S >= 0) & (k_B1S <= q_BT1) & _within(window, positions_BT, positions_BS)


def _within(window: int | None, positions_BT, positions_BS):
    # Distance in positions, not in slots: the rejected answer of a row follows its prompt as closely as the chosen one.
    return True if window is None else positions_BT[:, :, None] - positions_BS[:, None, :] < window


def soften(logits, cap: float | None):
    """Keeps logits within +-cap smoothly; None leaves them alone (arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale: float, cap: float | None = None):
    """Grouped-query attention, as plain as it gets: the oracle of every faster form. The softmax runs in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], soften(logits_BKGTS, cap), MASKED)
    probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def _mask(places: Places, window: int | None):
    return visible(places.segments_BT, places.prompts_BT, places.positions_BT, window)


def _attend_mask(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, window: int | None, scale: float, cap: float | None):
    return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, cap=cap)


DENSE = Kernel(_mask, _attend_mask)
