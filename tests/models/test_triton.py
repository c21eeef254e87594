import functools

import jax
import pytest
from packed import LONG, assert_equals_dense, places_of, quickly, random_inputs

from repo_jax.models import triton
from repo_jax.models.attention import Kernel
from repo_jax.sharding import make_mesh

PLAIN = Kernel(triton.sight, functools.partial(triton.attend, interpret=True))


@pytest.mark.parametrize(
    "N, K, H, window, cap",
    [(4, 2, 16, None, None), (4, 2, 8, 100, None), (4, 1, 16, None, 1.5), (2, 2, 24, None, None)],
)
def test_triton_equals_dense_in_value_and_gradient(N, K, H, window, cap):
    assert_equals_dense(PLAIN, places_of(LONG, 330, 240), random_inputs(4, 330, N, K, H), window, cap)


def test_triton_on_a_mesh_of_rows_and_heads_equals_dense():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_equals_dense(PLAIN, places_of(LONG, 330, 240), random_inputs(4, 330, 4, 2, 8))


def test_an_entry_is_seen_by_those_that_see_it_and_by_no_other_pair():
    places = places_of([[(100, 28, 28)] * 4], 624, 512)
    sight = quickly(functools.partial(triton.sight, window=None))(places)
    assert sight.first_B2Y[0, 0, ::128].tolist() == [0, 128, 256, 384]
    assert sight.last_B2Y[0, 0, ::128].tolist() == [127, 255, 383, 511]
    windowed = quickly(functools.partial(triton.sight, window=10))(places)
    assert windowed.first_B2Y[0, 0, 120:130].tolist() == [*range(111, 119), 128, 128]
    assert windowed.last_B2Y[0, 0, 115:121].tolist() == [124, 125, 126, 127, 127, 127]
