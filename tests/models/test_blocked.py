import functools

import jax
import numpy as np
import pytest
from packed import LONG, ROWS, assert_equals_dense, places_of, random_inputs, run

from repo_jax.models.attention import visible
from repo_jax.models.blocked import BLOCK, BLOCKED
from repo_jax.models.blocked import _sight as sight_of


@pytest.mark.parametrize(
    "rows, T, N, K, window, cap",
    [
        (ROWS, 192, 2, 2, None, None),  # an empty row, pairs with one answer alone
        (ROWS, 200, 4, 2, 7, 1.5),
        (LONG, 330, 4, 1, None, 1.5),  # prompts, answers and pairs longer than a block
        (LONG, 384, 4, 2, 100, None),
        (ROWS[:1], 160, 1, 1, 1, None),
    ],
)
def test_blocked_equals_dense_in_value_and_gradient(rows, T, N, K, window, cap):
    assert_equals_dense(BLOCKED, places_of(rows, T, T), random_inputs(len(rows), T, N, K, 8), window, cap)


def test_what_padding_gets_is_finite():
    inputs = random_inputs(len(ROWS), 200, 2, 1, 8)
    attend = functools.partial(BLOCKED.attend, window=None, scale=0.4, cap=None)
    places = places_of(ROWS, 200, 200)

    @jax.jit
    def value_and_grads(places, q, k, v, g):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, BLOCKED.sight(places, None)), q, k, v)
        return out, pullback(g)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_grads(places, *inputs)))


def blocks_seen(places):
    """seen_II: whether something in a block of keys is visible from a block of queries, by brute force."""
    mask_BTS = np.array(visible(places.segments_BT, places.prompts_BT))
    mask_BTS &= (places.segments_BT > 0)[:, :, None]
    B, T, _ = mask_BTS.shape
    blocks = -(-B * T // BLOCK)
    mask_XX = np.zeros((blocks * BLOCK, blocks * BLOCK), bool)
    for b in range(B):
        mask_XX[b * T : (b + 1) * T, b * T : (b + 1) * T] = mask_BTS[b]
    return mask_XX.reshape(blocks, BLOCK, blocks, BLOCK).any(axis=(1, 3))


MANY = [[(40, 30, 20)] * 5, [(10, 300, 90)], [], [(5, 5, 5)], [(90, 0, 60), (200, 20, 20)]]


@pytest.mark.parametrize("rows, T", [(ROWS, 192), (LONG, 330), (MANY, 460), ([[], [(3, 2, 1)], [], []], 128)])
def test_a_block_of_queries_looks_from_its_first_visible_block_to_its_own(rows, T):
    places = places_of(rows, T, T)
    seen_II = blocks_seen(places)
    sight = jax.jit(functools.partial(sight_of, window=None))(places)
    first_I, last_I = np.asarray(sight.first_I), np.asarray(sight.last_I)
    for i, seen_I in enumerate(seen_II):
        assert first_I[i] == (np.flatnonzero(seen_I)[0] if seen_I.any() else len(seen_II))
    for j in range(len(seen_II)):
        looking = [i for i in range(j, len(seen_II)) if first_I[i] <= j]
        assert last_I[j] == max(looking, default=-1)
        assert not seen_II[last_I[j] + 1 :, j].any()


def test_what_is_in_blocks_that_nobody_sees_is_not_touched():
    """NaN in a row goes nowhere else, not even into a sum with weight 0."""
    places = places_of([[(60, 40, 28)], [(60, 40, 28)], []], BLOCK, BLOCK)
    inputs = random_inputs(3, BLOCK, 2, 1, 8)
    clean = run(BLOCKED, places, inputs)
    for x in inputs[:3]:
        x[1:] = np.nan
    for ours, wanted in zip(run(BLOCKED, places, inputs), clean, strict=True):
        np.testing.assert_array_equal(ours[0], wanted[0])
