"""Packed rows made by hand, and what a kernel of attention makes of them beside the plain form."""

import functools

import jax
import numpy as np

from repo_jax.models.attention import DENSE, Kernel, Places

# (prompt, chosen, rejected) of the pairs in each row. The rows leave some slots free, and one all of them.
ROWS = [[(17, 30, 21), (5, 0, 40), (33, 1, 9)], [(50, 60, 70)], [(3, 20, 0), (8, 2, 2)], []]
LONG = [[(30, 50, 40), (20, 61, 120)], [(150, 90, 80)], *ROWS[:2]]  # with pairs longer than 128

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def places_of(rows, T: int, Y: int) -> Places:
    """Rows of pairs of these lengths, slot by slot."""
    fields = Places(*(np.zeros((len(rows), T), np.int32) for _ in range(3)), np.full((len(rows), 2, Y), T, np.int32))
    for row, pairs in enumerate(rows):
        slot, segment, entries = 0, 0, [0, 0]
        for prompt, *answers in pairs:
            prompt_segment = segment + 1
            sides = [side for side in (0, 1) if answers[side]]
            parts = [(prompt, 0, sides)] + [(answers[side], prompt, [side]) for side in sides]
            for length, first, views in parts:
                segment += 1
                for i in range(length):
                    fields.positions_BT[row, slot] = first + i
                    fields.segments_BT[row, slot] = segment
                    fields.prompts_BT[row, slot] = prompt_segment
                    for view in views:
                        fields.views_B2Y[row, view, entries[view]] = slot
                        entries[view] += 1
                    slot += 1
    return fields


def random_inputs(B: int, T: int, N: int, K: int, H: int, seed: int = 0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    return tuple(np.float32(rng.normal(size=(B, T, heads, H))) for heads in (N, K, K, N))


def run(kernel: Kernel, places: Places, inputs, window=None, cap=None):
    """The output and the gradients of q, k and v. Nothing comes from padding or goes there."""

    @quickly
    def value_and_grads(places, q_BTNH, k_BSKH, v_BSKH, g_BTNH):
        sight = kernel.sight(places, window)
        real_BT11 = (places.segments_BT > 0)[..., None, None]
        attend = functools.partial(kernel.attend, window=window, scale=0.4, cap=cap)
        out_BTNH, pullback = jax.vjp(lambda *qkv: attend(*qkv, sight) * real_BT11, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, *pullback(g_BTNH)

    return value_and_grads(places, *inputs)


def assert_equals_dense(kernel: Kernel, places: Places, inputs, window=None, cap=None):
    ours, dense = (run(each, places, inputs, window, cap) for each in (kernel, DENSE))
    for name, mine, plain in zip(("out", "q", "k", "v"), ours, dense, strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5, rtol=2e-5, err_msg=name)
