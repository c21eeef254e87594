"""Attention on TPUs: jax's splash kernel on the two views of a row (views.py).

Axis letters: B packed rows, T token slots, S slots as keys, Y entries of a view, V views (2 B), N query heads, K key/value
heads, H head size.
"""

import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from repo_jax.models.attention import Kernel, Places
from repo_jax.models.views import Views, attend_in_views, views_of

BLOCKS = (1024, 896, 768, 640, 512)  # entries that the kernel takes at a time; its tiles are 128 wide
RESIDUALS = "attention"  # what checkpoint policies call the output and the softmax's normaliser


def block_size(Y: int) -> int:
    """The block that fills up Y least; short views are one block."""
    if Y <= BLOCKS[0]:
        return 128 * math.ceil(Y / 128)
    return min(BLOCKS, key=lambda block: math.ceil(Y / block) * block)


def sight(places: Places, window: int | None) -> Views:
    return views_of(places, block_size(1 if places.views_B2Y is None else places.views_B2Y.shape[2]))


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    sight: Views,
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
):
    """out_BTNH; interpret runs the kernel as plain jax, on any device."""

    def kernel(q_VNYH, k_VKYH, v_VKYH, segments_VY):
        N, Y = q_VNYH.shape[1:3]
        # A window counts positions, and in a segment of a view these are consecutive.
        causal = splash.LocalMask((Y, Y), (None if window is None else window - 1, 0), 0)
        block = block_size(Y)
        mha = splash.make_splash_mha(
            splash.MultiHeadMask([causal] * N),
            block_sizes=splash.BlockSizes(
                **{f"block_{side}": block for side in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
            ),
            attn_logits_soft_cap=cap,
            residual_checkpoint_name=RESIDUALS,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(mha)(q_VNYH, k_VKYH, v_VKYH, splash.SegmentIds(segments_VY, segments_VY))

    return attend_in_views(kernel, q_BTNH * scale, k_BSKH, v_BSKH, sight)


SPLASH = Kernel(sight, attend)
