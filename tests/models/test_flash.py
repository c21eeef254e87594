import functools

import jax
import jax.numpy as jnp
import pytest
from packed import LONG, assert_equals_dense, places_of, quickly, random_inputs

from repo_jax.models import flash
from repo_jax.models.attention import DENSE
from repo_jax.models.flash import FLASH
from repo_jax.sharding import make_mesh


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "BLOCKS", (128,))


@pytest.mark.parametrize("N, K, window, cap", [(4, 2, 100, None), (4, 1, None, 1.5)])
def test_flash_equals_dense_in_value_and_gradient(N, K, window, cap):
    assert_equals_dense(FLASH, places_of(LONG, 330, 240), random_inputs(4, 330, N, K, 8), window, cap)


@pytest.mark.parametrize(
    "N, K, mesh", [(4, 2, (2, 2, 2)), (8, 2, (1, 2, 4))], ids=["keys split", "keys whole on every shard"]
)
def test_flash_on_a_mesh_of_rows_and_heads_equals_dense(N, K, mesh):
    with jax.set_mesh(make_mesh(*mesh)):
        assert_equals_dense(FLASH, places_of(LONG, 330, 240), random_inputs(4, 330, N, K, 8))


def test_flash_leaves_out_blocks_in_which_nothing_is_seen():
    places = places_of([[(100, 28, 28)] * 4], 624, 512)
    sight = quickly(functools.partial(FLASH.sight, window=None))(places)
    firsts_I = [int(flash._first_block(first_Q[None])) for first_Q in sight.first_B2Y[0, 0].reshape(4, 128)]
    assert firsts_I == [0, 1, 2, 3]


def test_memory_of_flash_grows_with_the_length_that_of_dense_with_its_square():
    def memory(kernel, length: int) -> int:
        places = places_of([[(length // 2, length // 4, length // 4)]], length, length)
        x_BTNH = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

        def objective(q_BTNH, k_BSKH, v_BSKH, places):
            return kernel.attend(
                q_BTNH, k_BSKH, v_BSKH, kernel.sight(places, None), window=None, scale=1.0, cap=None
            ).sum()

        compiled = quickly(jax.grad(objective, argnums=(0, 1, 2))).lower(x_BTNH, x_BTNH, x_BTNH, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(FLASH, 1536) < 4 * memory(FLASH, 512) and memory(DENSE, 1536) > 6 * memory(DENSE, 512)
