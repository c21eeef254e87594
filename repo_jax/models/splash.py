"""Attention on TPUs: jax's splash kernel on the two views of a row (views.py).

Axis letters: B packed rows, T token slots, S slots as keys, Y entries of a view, V views (2 B), N query heads, K key/value
heads, H head size.
"""

import jax

from repo_jax.models.attention import RESIDUALS, Kernel, Places
from repo_jax.models.views import Views, attend_in_views, block_size, views_of

BLOCKS = (768, 640, 512)  # entries that the kernel takes at a time


def fitting(block: int, H: int, itemsize: int) -> int:
    """The block, or half of it where heads are so wide that the backward kernels would not fit a v5e's vector memory."""
    return block // 2 if block % 256 == 0 and block * H * itemsize > 2**20 * 5 // 8 else block


def sight(places: Places, window: int | None) -> Views:
    return views_of(places, BLOCKS)


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
    # Imported here: it takes a second, and only TPUs have a use for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def kernel(q_VNYH, k_VKYH, v_VKYH, segments_VY):
        _, N, Y, H = q_VNYH.shape
        # A window counts positions, and in a segment of a view these are consecutive.
        causal = splash.LocalMask((Y, Y), (None if window is None else window - 1, 0), 0)
        block = fitting(block_size(Y, BLOCKS), H, q_VNYH.dtype.itemsize)
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

    return attend_in_views(kernel, q_BTNH * scale, k_BSKH, v_BSKH, sight, sight.segments_B2Y)


SPLASH = Kernel(sight, attend)
