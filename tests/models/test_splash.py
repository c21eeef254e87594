import functools

import jax
import pytest
from packed import LONG, ROWS, assert_equals_dense, places_of, random_inputs

from repo_jax.models import splash
from repo_jax.models.attention import Kernel
from repo_jax.sharding import make_mesh

INTERPRETED = Kernel(splash.sight, functools.partial(splash.attend, interpret=True))


@pytest.mark.parametrize(
    "rows, T, Y, N, K, window, cap", [(ROWS, 192, 144, 2, 2, 7, None), (LONG, 330, 240, 4, 1, None, 1.5)]
)
def test_splash_equals_dense_in_value_and_gradient(rows, T, Y, N, K, window, cap, monkeypatch):
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    assert_equals_dense(INTERPRETED, places_of(rows, T, Y), random_inputs(len(rows), T, N, K, 8), window, cap)


def test_splash_on_a_mesh_with_keys_whole_on_every_shard_equals_dense():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_equals_dense(INTERPRETED, places_of(ROWS, 192, 144), random_inputs(len(ROWS), 192, 6, 3, 8))


def test_wide_heads_in_float32_take_smaller_blocks():
    assert splash.fitting(768, 128, 4) == splash.fitting(768, 256, 2) == 768
    assert splash.fitting(768, 256, 4) == 384 and splash.fitting(640, 256, 4) == 640
