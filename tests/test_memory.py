import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import TINY, one_device, random_params

from repo_jax.config import StoppedError, to_recipe
from repo_jax.memory import (
    GIB,
    bytes_per_device,
    explain,
    explained,
    held_in_training,
    is_out_of_memory,
    keeps_layer_inputs,
    layer_inputs,
    what_helps,
)
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.optimizer import make_optimizer
from repo_jax.sharding import make_mesh, param_shardings
from repo_jax.state import initial_state, state_shapes, state_shardings
from repo_jax.step import HELD, no_kept

FULL = {"parameters": 30 * GIB, "gradients": 30 * GIB, "moments": 60 * GIB}
ADAPTERS = {"frozen parameters": 15 * GIB, "adapters": GIB, "gradients": GIB, "moments": 2 * GIB}


@pytest.fixture(scope="module")
def real_error():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jnp.zeros(2**44, jnp.float32).block_until_ready()  # 64 TiB
    return raised.value


def test_a_device_without_room_is_recognised(real_error):
    assert is_out_of_memory(real_error)


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7.00GiB.",  # a GPU
        "RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B) on device ordinal 0",
        "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 16.00G. That was not possible.",  # a TPU
        "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 9.40G. That was not possible.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm.",  # a TPU's compiler
    ],
)
def test_every_platforms_words_are_recognised(text):
    assert is_out_of_memory(jax.errors.JaxRuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: out of memory of what was asked"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: allocation of 24.00M"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 300000"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_other_errors_are_left_alone(error):
    assert not is_out_of_memory(error)


def on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_bytes_per_device_are_those_of_the_arrays_themselves(axes, optim):
    mesh = one_device() if axes == (1, 1, 1) else make_mesh(*axes)
    optimizer = make_optimizer(to_recipe({"model": {"model_name_or_path": "m"}, "optim": {"optim": optim}}).optim, 1)
    shapes = state_shapes(param_shapes(TINY, "bfloat16"), optimizer)
    shardings = state_shardings(shapes, optimizer, mesh)
    params = jax.device_put(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_params(TINY)), shardings.params
    )
    state = initial_state(params, optimizer, shardings)
    held = held_in_training(shapes, shardings, None)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert held == {
        "parameters": on_first_device(params),
        "gradients": on_first_device(wide),
        "moments": on_first_device(state.opt_state),
    }
    assert bytes_per_device(wide, shardings.params) == held["gradients"] == 2 * held["parameters"]


def test_frozen_parameters_are_counted_apart_from_adapters():
    mesh = make_mesh(1, 8, 1)
    frozen = jax.device_put(random_params(TINY), param_shardings(param_shapes(TINY), mesh))
    adapters = {"layers_L": {"attn": {"q_DNH": {
        "a_Dr": jax.ShapeDtypeStruct((3, 16, 2), np.float32), "b_rNH": jax.ShapeDtypeStruct((3, 2, 4, 4), np.float32)
    }}}}  # fmt: skip
    optimizer = make_optimizer(recipe().optim, 1)
    shapes = state_shapes(adapters, optimizer)
    held = held_in_training(shapes, state_shardings(shapes, optimizer, mesh), frozen)
    ours = 4 * (3 * 16 * 2 // 8 + 3 * 2 * 16)  # only D is split over fsdp
    counters = 2 * 4
    assert held == {
        "frozen parameters": on_first_device(frozen),
        "adapters": ours,
        "gradients": ours,
        "moments": 2 * ours + counters,
    }


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_layer_inputs_take_what_their_arrays_have_on_a_device(axes):
    mesh = make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
    held = jax.eval_shape(lambda: no_kept(Decoder(TINY, jnp.bfloat16), 3 * 4 * 128))
    shardings = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, HELD), held)
    assert layer_inputs(TINY, "bfloat16", mesh, 3 * 4 * 128) == bytes_per_device(held, shardings)


def test_a_tpu_fills_up_registers():
    mesh = types.SimpleNamespace(size=16, devices=np.array([types.SimpleNamespace(platform="tpu")]))
    assert layer_inputs(TINY, "bfloat16", mesh, 100) == (TINY.L + 1) * 100 * 128 * 2


@pytest.mark.parametrize(
    "fields, size, free, keeps",
    [
        ({"model__remat": "full"}, 25, 100, True),
        ({"model__remat": "full"}, 26, 100, False),
        ({"model__remat": "full"}, 1, -5, False),  # there is no room for anything
        ({"model__remat": "attention"}, 25, 100, True),
        ({"model__remat": "dots"}, 1, 100, False),  # it keeps more anyway
        ({"model__remat": "dots", "optim__keep_layer_inputs": True}, 99, 100, True),
        ({"model__remat": "full", "optim__keep_layer_inputs": False}, 1, 100, False),
        ({"model__remat": "full", "optim__mode": "direct"}, 1, 100, False),
    ],
)
def test_layer_inputs_are_kept_where_asked_for_or_where_they_help_and_are_few(fields, size, free, keeps):
    assert keeps_layer_inputs(recipe(**fields), TINY, one_device(), size, free) is keeps


def test_a_width_that_the_devices_do_not_divide_is_not_kept():
    assert not keeps_layer_inputs(recipe(model__remat="full"), TINY, devices("tpu", 0, 0, 0), 1, 100)


def devices(platform, *places):
    """A mesh of devices in these slices and processes."""
    found = [types.SimpleNamespace(platform=platform, slice_index=i, process_index=i) for i in places]
    return types.SimpleNamespace(size=len(found), devices=np.array(found))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_layer_inputs_are_not_kept_over_a_slow_network_unless_asked_for(platform):
    full, asked = recipe(model__remat="full"), recipe(model__remat="full", optim__keep_layer_inputs=True)
    assert keeps_layer_inputs(full, TINY, devices(platform, 0, 0), 1, 100)
    assert not keeps_layer_inputs(full, TINY, devices(platform, 0, 1), 1, 100)
    assert keeps_layer_inputs(asked, TINY, devices(platform, 0, 1), 1, 100)


def recipe(**fields):
    """A recipe with nothing turned yet."""
    model = {"model_name_or_path": "m", "param_dtype": "float32", "remat": "dots"}
    tree = {"model": model, "data": {"rows_per_device": 4}, "optim": {}}
    for name, value in fields.items():
        section, leaf = name.split("__")
        tree[section][leaf] = value
    return to_recipe(tree)


def mesh_of(limit=None, platform="tpu", **shape):
    stats = limit and {"bytes_limit": limit}
    device = types.SimpleNamespace(device_kind="Chip", platform=platform, memory_stats=lambda: stats)
    return types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | shape, local_devices=[device])


LAST = [
    "a lower max_length (longer pairs are dropped or cut, and rows are shorter)",
    "more devices, over which mesh.fsdp splits all of the above",
]


def test_everything_that_helps_is_named_cheapest_first():
    assert what_helps(recipe(), mesh_of(data=4, fsdp=2), FULL) == [
        "rows_per_device: 2 (now 4; the same result in more passes)",
        "remat: full (now dots; layers are computed twice instead of kept)",
        "mesh.data: 1 and mesh.fsdp: 8 (no longer the same on 4 devices; saves 90.00 GiB)",
        "moment_dtype: bfloat16 (saves 15.00 GiB)",
        "optim: adafactor (saves 60.00 GiB)",
        "param_dtype: bfloat16 (saves 15.00 GiB)",
        "use_peft: true, which trains adapters (saves 90.00 GiB)",
        *LAST,
    ]


def test_layer_inputs_that_are_kept_can_be_given_up():
    helps = what_helps(recipe(), mesh_of(), FULL | {"layer inputs": 3 * GIB})
    assert "keep_layer_inputs: false (saves 3.00 GiB; two passes compute more)" in helps
    assert not any("keep_layer_inputs" in line for line in what_helps(recipe(), mesh_of(), FULL))


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_a_gpu_that_jax_leaves_alone_is_named_first(monkeypatch, name):
    for known in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(known, raising=False)
    first, *others = what_helps(recipe(), mesh_of(limit=60 * GIB, platform="gpu"), FULL)
    assert first == "XLA_CLIENT_MEM_FRACTION=0.95 in the environment (JAX takes 0.75 of a GPU unless told otherwise)"
    assert others == what_helps(recipe(), mesh_of(limit=60 * GIB), FULL)
    monkeypatch.setenv(name, "0.9")
    assert what_helps(recipe(), mesh_of(limit=60 * GIB, platform="gpu"), FULL) == others


@pytest.mark.parametrize(
    ("done", "gone"),
    [
        ({"data__rows_per_device": 1}, "rows_per_device"),
        ({"model__remat": "full"}, "remat"),
        ({"model__remat": "offload"}, "remat"),
        ({"optim__moment_dtype": "bfloat16"}, "moment_dtype"),
        ({"model__param_dtype": "bfloat16"}, "param_dtype"),
    ],
    ids=str,
)
def test_what_is_done_is_not_named(done, gone):
    before, after = (
        [line.split(":")[0] for line in what_helps(recipe(**fields), mesh_of(), FULL)] for fields in ({}, done)
    )
    assert gone in before and after == [name for name in before if name != gone]


def test_nothing_is_saved_on_moments_that_are_not_there():
    assert [line.split(":")[0] for line in what_helps(recipe(optim__optim="adafactor"), mesh_of(), FULL)[2:4]] == [
        "param_dtype",
        "use_peft",
    ]


def test_a_run_with_adapters_is_not_told_to_change_the_optimizer():
    assert what_helps(recipe(data__rows_per_device=1), mesh_of(), ADAPTERS) == [
        "remat: full (now dots; layers are computed twice instead of kept)",
        "param_dtype: bfloat16 (saves 7.50 GiB)",
        *LAST,
    ]


def test_an_evaluation_is_not_told_how_to_train():
    assert what_helps(recipe(), mesh_of(), {"parameters": 30 * GIB}) == [
        "rows_per_device: 2 (now 4; the same result in more passes)",
        "param_dtype: bfloat16 (saves 15.00 GiB)",
        *LAST,
    ]


@pytest.mark.parametrize("platform, usual", [("tpu", 8192), ("cpu", 2048)])
def test_where_rows_are_suggested_fewer_slots_make_them_fewer(platform, usual):
    for given, now in ((None, usual), (3000, 3000)):
        suggested = recipe(data__rows_per_device=None, data__slots_per_device=given)
        assert what_helps(suggested, mesh_of(platform=platform), FULL)[0] == (
            f"slots_per_device: {now // 2} (now {now}; the same result in more passes)"
        )


def test_where_the_state_alone_has_no_room_fewer_rows_are_no_advice():
    assert what_helps(recipe(), mesh_of(limit=80 * GIB), FULL)[0] == "moment_dtype: bfloat16 (saves 15.00 GiB)"
    assert what_helps(recipe(), mesh_of(limit=121 * GIB), FULL)[0].startswith("rows_per_device")


def test_the_explanation_says_who_holds_the_memory(real_error):
    device = mesh_of(limit=80 * GIB).local_devices[0]
    assert explain(real_error, ADAPTERS, device, ["remat: full", "more devices"]).splitlines() == [
        "out of memory on Chip (80.00 GiB)",
        "     15.00 GiB  frozen parameters",
        "      1.00 GiB  adapters",
        "      1.00 GiB  gradients",
        "      2.00 GiB  moments",
        "     19.00 GiB  on each device before any row is computed, and then",
        f"  RESOURCE_EXHAUSTED: Out of memory allocating {2**46} bytes.",
        "what helps, cheapest first:",
        "  remat: full",
        "  more devices",
    ]


def test_a_device_that_does_not_say_how_much_it_has_is_explained_too(real_error):
    assert explain(real_error, FULL, jax.devices()[0], []).startswith("out of memory on cpu\n")


def test_work_that_runs_out_of_memory_ends_with_the_explanation(real_error):
    with (
        pytest.raises(StoppedError) as stopped,
        explained(one_device(), FULL, lambda: what_helps(recipe(), one_device(), FULL)),
    ):
        raise real_error
    assert str(stopped.value) == explain(real_error, FULL, jax.devices()[0], what_helps(recipe(), one_device(), FULL))
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        explained(one_device(), FULL, lambda: what_helps(recipe(), one_device(), FULL)),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_lions_only_moment_can_be_halved_too():
    lines = what_helps(recipe(optim__optim="lion"), mesh_of(), FULL)
    half = FULL["moments"] // 2 / GIB
    assert f"moment_dtype: bfloat16, with adam_beta2: 0.99 (saves {half:.2f} GiB)" in lines
