import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import ROWS, places_of

from repo_jax.models.views import block_size, gather, spread, views_of


def test_the_block_is_the_one_that_fills_up_a_view_least():
    blocks = (768, 640, 512)
    assert [block_size(Y, blocks) for Y in (1, 600, 768, 1024, 2432, 2560)] == [128, 640, 768, 512, 640, 640]
    for length in range(1, 9000, 97):
        filled = -(-length // block_size(length, blocks)) * block_size(length, blocks)
        assert filled % block_size(filled, blocks) == 0


def test_what_slots_put_into_views_comes_back_and_each_way_is_the_others_transpose():
    places = places_of(ROWS, 192, 144)
    rng = np.random.default_rng(0)
    x_BTNH = jnp.asarray(rng.normal(size=(len(ROWS), 192, 1, 2)), jnp.float32)
    y_B2YNH = jnp.asarray(rng.normal(size=(len(ROWS), 2, 256, 1, 2)), jnp.float32)

    @jax.jit
    def there_and_back(places, x_BTNH, y_B2YNH):
        views = views_of(places, (128,))
        spread_B2YNH, spread_back = jax.vjp(lambda x: spread(x, views), x_BTNH)
        gathered_BTNH, gather_back = jax.vjp(lambda y: gather(y, views), y_B2YNH)
        pairs = ((spread_B2YNH, y_B2YNH, x_BTNH, spread_back(y_B2YNH)[0]),
                 (gathered_BTNH, x_BTNH, y_B2YNH, gather_back(x_BTNH)[0]))  # fmt: skip
        return gather(spread_B2YNH, views), [(jnp.vdot(out, g), jnp.vdot(x, dx)) for out, g, x, dx in pairs]

    back_BTNH, products = there_and_back(places, x_BTNH, y_B2YNH)
    np.testing.assert_array_equal(back_BTNH, x_BTNH * (places.segments_BT > 0)[..., None, None])
    for forward, backward in products:
        np.testing.assert_allclose(forward, backward, rtol=1e-5)


def test_the_two_views_of_a_row_are_what_the_row_batch_says():
    views = jax.jit(lambda places: views_of(places, (128,)))(places_of([[(2, 1, 2), (1, 0, 1)]], 8, 6))
    assert np.asarray(views.slots_B2Y)[0, :, :6].tolist() == [[0, 1, 2, -1, -1, -1], [0, 1, 3, 4, 5, 6]]
    assert np.asarray(views.segments_B2Y)[0, :, :6].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 4, 4]]
    assert np.asarray(views.entries_B2T)[0].tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [0, 1, -1, 2, 3, 4, 5, -1]]


def test_rows_without_views_say_what_to_build():
    places = places_of(ROWS, 192, 144)._replace(views_B2Y=None)
    with pytest.raises(ValueError, match="RowShape"):
        views_of(places, (128,))
