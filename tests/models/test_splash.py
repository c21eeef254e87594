import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repo_jax.models import splash
from repo_jax.models.attention import DENSE, Kernel, Places
from repo_jax.models.views import gather, spread, views_of
from repo_jax.sharding import make_mesh

INTERPRETED = Kernel(splash.sight, functools.partial(splash.attend, interpret=True))

# (prompt, chosen, rejected) of the pairs in each row. The rows leave some slots free, and one all of them.
ROWS = [[(17, 30, 21), (5, 0, 40), (33, 1, 9)], [(50, 60, 70)], [(3, 20, 0), (8, 2, 2)], []]
T, Y = 192, 144


def places_of(rows, T: int, Y: int) -> Places:
    """Rows of pairs of these lengths, slot by slot."""
    fields = Places(*(np.zeros((len(rows), T), np.int32) for _ in range(3)), np.full((len(rows), 2, Y), T, np.int32), None)
    places_BT = np.zeros((len(rows), T), np.int32)
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
                    places_BT[row, slot] = views[0] * Y + entries[views[0]]
                    for view in views:
                        fields.views_B2Y[row, view, entries[view]] = slot
                        entries[view] += 1
                    slot += 1
    return fields._replace(places_BT=places_BT)


def random_inputs(B: int, T: int, N: int, K: int, H: int, seed: int = 0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    return tuple(np.float32(rng.normal(size=(B, T, heads, H))) for heads in (N, K, K, N))


def run(kernel: Kernel, places: Places, inputs, window=None, cap=None):
    """The output and the gradients of q, k and v. Nothing comes from padding or goes there."""
    real_BT11 = (places.segments_BT > 0)[..., None, None]

    @jax.jit
    def value_and_grads(q_BTNH, k_BSKH, v_BSKH, g_BTNH):
        sight = kernel.sight(Places(*map(jnp.asarray, places)), window)
        attend = functools.partial(kernel.attend, window=window, scale=0.4, cap=cap)
        out_BTNH, pullback = jax.vjp(lambda *qkv: attend(*qkv, sight) * real_BT11, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, *pullback(g_BTNH)

    return value_and_grads(*inputs)


def assert_equals_dense(kernel: Kernel, places: Places, inputs, window=None, cap=None):
    ours, dense = (run(each, places, inputs, window, cap) for each in (kernel, DENSE))
    for name, mine, plain in zip(("out", "q", "k", "v"), ours, dense, strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "N, K, window, cap",
    [(2, 2, None, None), (4, 2, 7, None), (4, 1, None, 1.5), (2, 1, 20, 2.0)],
    ids=["plain", "window", "cap", "window and cap"],
)
def test_splash_equals_dense_in_value_and_gradient(N, K, window, cap):
    assert_equals_dense(INTERPRETED, places_of(ROWS, T, Y), random_inputs(len(ROWS), T, N, K, 8), window, cap)


@pytest.mark.parametrize("K", [2, 1, 3], ids=["keys split", "keys whole", "keys whole, several a shard"])
def test_splash_on_a_mesh_of_rows_and_heads_equals_dense(K):
    N = 6 if K == 3 else 4
    inputs = random_inputs(len(ROWS), T, N, K, 8)
    places = places_of(ROWS, T, Y)
    dense = run(DENSE, places, inputs)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        meshed = run(INTERPRETED, places, inputs)
    for mine, plain in zip(meshed, dense, strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5, rtol=2e-5)


def test_views_of_several_blocks_equal_dense(monkeypatch):
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    rows = [[(60, 100, 80), (40, 51, 120)]]
    assert splash.block_size(260) == 128
    assert_equals_dense(INTERPRETED, places_of(rows, 460, 300), random_inputs(1, 460, 2, 1, 8), window=70)


def test_a_block_fills_up_views_as_little_as_it_can():
    assert [splash.block_size(Y) for Y in (1, 600, 1024, 2048, 2432, 2560)] == [128, 640, 1024, 1024, 640, 640]
    for Y in range(1, 9000, 97):
        filled = -(-Y // splash.block_size(Y)) * splash.block_size(Y)
        assert filled % splash.block_size(filled) == 0 and filled - Y < 512


def test_slots_and_views_are_each_others_transposes():
    views = views_of(Places(*map(jnp.asarray, places_of(ROWS, T, Y))), 128)
    rng = np.random.default_rng(0)
    x_BTNH, y_B2YNH = (jnp.asarray(rng.normal(size=(len(ROWS), *shape, 1, 2)), jnp.float32) for shape in ((T,), (2, 256)))
    for there, x, y in ((spread, x_BTNH, y_B2YNH), (gather, y_B2YNH, x_BTNH)):
        out, pullback = jax.vjp(lambda x, there=there: there(x, views), x)
        np.testing.assert_allclose(jnp.vdot(out, y), jnp.vdot(x, pullback(y)[0]), rtol=1e-5)
    np.testing.assert_array_equal(gather(spread(x_BTNH, views), views)[0, :156], x_BTNH[0, :156])


def test_rows_without_views_say_what_to_build():
    places = places_of(ROWS, T, Y)._replace(views_B2Y=None)
    with pytest.raises(ValueError, match="RowShape.Y"):
        splash.sight(places, None)
