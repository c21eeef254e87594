import jax
import pytest
from examples import TINY
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from repo_jax.models.decoder import param_shapes
from repo_jax.sharding import make_mesh, param_shardings, param_spec


def test_the_table_of_placements():
    specs = {
        name: s.spec
        for name, s in flatten_dict(param_shardings(param_shapes(TINY), make_mesh(2, 2, 2)), sep="/").items()
    }
    assert specs == {
        "embed_VD": P("tensor", "fsdp"),
        "head_VD": P("tensor", "fsdp"),
        "final_norm_D": P("fsdp"),
        "layers_L/attn_norm_D": P(None, "fsdp"),
        "layers_L/mlp_norm_D": P(None, "fsdp"),
        "layers_L/attn/q_DNH": P(None, "fsdp", "tensor", None),
        "layers_L/attn/k_DKH": P(None, "fsdp", "tensor", None),
        "layers_L/attn/v_DKH": P(None, "fsdp", "tensor", None),
        "layers_L/attn/o_NHD": P(None, "tensor", None, "fsdp"),
        "layers_L/mlp/gate_DF": P(None, "fsdp", "tensor"),
        "layers_L/mlp/up_DF": P(None, "fsdp", "tensor"),
        "layers_L/mlp/down_FD": P(None, "tensor", "fsdp"),
    }


def test_key_value_heads_fewer_than_tensor_stay_whole():
    mesh = make_mesh(1, 2, 4)
    assert param_spec("layers_L/attn/k_DKH", (3, 16, 2, 4), mesh) == P(None, "fsdp", None, None)


def test_an_axis_that_does_not_divide_names_weight_number_and_knob():
    with pytest.raises(ValueError) as error:
        param_spec("layers_L/mlp/up_DF", (2, 64, 172), make_mesh(1, 1, 8))
    assert str(error.value) == (
        "axis F of 'layers_L/mlp/up_DF' has size 172, which mesh.tensor=8 does not divide; lower mesh.tensor to a divisor of 172"
    )


def test_a_name_whose_axes_do_not_match_the_shape_is_refused():
    with pytest.raises(ValueError, match="parameter 'up_DF' names axes DF but has shape"):
        param_spec("up_DF", (2, 3, 4), make_mesh())


@pytest.mark.parametrize("axes, sizes", [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, 2, -1), (2, 2, 2))])
def test_the_axis_that_is_minus_one_takes_the_devices_that_are_left(axes, sizes):
    assert tuple(make_mesh(*axes).shape.values()) == sizes


@pytest.mark.parametrize(
    "axes, message",
    [
        ((4, 4, 1), "mesh data=4 fsdp=4 tensor=1 needs 16 devices but 8 are present; make the axes multiply to 8, or set one of them to -1"),
        ((3, -1, 1), "mesh data=3 fsdp=-1 tensor=1 leaves 8 / 3 devices for the axis that is -1; make the other axes multiply to a divisor of 8"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_devices_says_both_numbers(axes, message):
    with pytest.raises(ValueError) as error:
        make_mesh(*axes)
    assert str(error.value) == message


def test_scoring_rows_with_whole_weights_communicates_sums_only():
    """The pairs' sums and lengths cross devices, and how full the fullest row is; nothing per token or per parameter."""
    import jax.numpy as jnp
    from examples import random_pairs, random_params

    from repo_jax.data.rows import RowShape, row_batches
    from repo_jax.logps import pair_logps
    from repo_jax.models.decoder import Decoder
    from repo_jax.step import place

    mesh, model = make_mesh(8, 1, 1), Decoder(TINY, jnp.float32)
    params = jax.device_put(random_params(TINY), param_shardings(param_shapes(TINY), mesh))
    batch = place(row_batches(random_pairs(16, V=TINY.V), RowShape(8, 64, 64))[0], mesh)
    with jax.set_mesh(mesh):
        text = jax.jit(lambda p, b: pair_logps(model, {"params": p}, b)).lower(params, batch).compile().as_text()
    collectives = [line for line in text.splitlines() if any(f" {op}(" in line for op in COLLECTIVES)]
    assert any("f32[32]" in line for line in collectives)
    assert all("all-reduce" in line and ("[32]" in line or "= s32[]" in line) for line in collectives), collectives


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce-start")


class SliceDevice:
    """A device of a multi-slice TPU, as far as a mesh asks."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v6 lite", 0, 0

    def __init__(self, id, slice_index):
        self.id, self.slice_index, self.coords = id, slice_index, (id % 2, id // 2 % 2, 0)


def test_slices_lie_side_by_side_along_data():
    devices = [SliceDevice(i, i // 4) for i in range(8)]
    mesh = make_mesh(2, 2, -1, devices[::-1])
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_data_that_is_no_multiple_of_the_slices_is_refused():
    devices = [SliceDevice(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=r"make data a multiple of 2, as in --mesh.data 2"):
        make_mesh(-1, 8, 1, [*devices, *(SliceDevice(i, i // 4) for i in range(8, 24))][:8])
    assert make_mesh(1, -1, 1, devices).shape == {
        "data": 2,
        "fsdp": 4,
        "tensor": 1,
    }  # every recipe runs on several slices
