"""What is read off a program's text, against texts with known answers and programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.hlo import Array, arrays_in, axes_of, by_kind_and_axes, groups_in, work_of
from repo_jax.sharding import make_mesh

MESH = {"data": 2, "fsdp": 4, "tensor": 2}
FSDP = [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}, use_global_device_ids=true", FSDP),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1), use_global_device_ids=true", FSDP),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={0}", FSDP),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1':(1)4}", FSDP),
        ("replica_groups=[2,8]<=[16]", [tuple(range(8)), tuple(range(8, 16))]),
        ("replica_groups={}", [tuple(range(16))]),
        ("source_target_pairs={{0,2},{2,0}}", [(0, 2), (2, 0)]),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(text, groups):
    assert sorted(map(tuple, groups_in(text, 16))) == sorted(groups)


@pytest.mark.parametrize(
    "text, axes",
    [
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp", 4)),
        ("replica_groups=[2,8]<=[16]", ("fsdp+tensor", 8)),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", ("data", 2)),
        ("replica_groups={{0},{1}}", ("", 1)),
        ("source_target_pairs={{0,1},{1,0}}", ("tensor", 2)),
    ],
)
def test_a_group_is_named_by_the_axes_along_which_its_devices_differ(text, axes):
    assert axes_of(text, MESH) == axes


LOOP = """HloModule m

%body (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %p = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %w = bf16[8,32]{1,0} constant({...})
  %whole = bf16[32,32]{1,0} all-gather(%w), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}, use_global_device_ids=true
  %copied = bf16[32,32]{1,0} all-gather(%w), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}, use_global_device_ids=true
  %y = bf16[64,32]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[64,32]{1,0}) tuple(%next, %y)
}

%condition (p: (s32[], bf16[64,32])) -> pred[] {
  %p = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[64,32]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[64,32]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}NOTED
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""
ONCE = 2 * 64 * 32 * 32


@pytest.mark.parametrize(
    "step, noted, turns",
    [
        ("1", "", 6),  # a TPU's text: the counter says it
        ("2", "", 3),
        ("1", ', backend_config={"known_trip_count":{"n":"5"}}', 5),  # a GPU's
    ],
)
def test_what_stands_in_a_loop_counts_as_often_as_it_turns(step, noted, turns):
    work = work_of(LOOP.replace("STEP", step).replace("NOTED", noted), MESH)
    assert work.matmul_flops == turns * ONCE
    [gather] = work.collectives  # its copy goes over the same channel
    assert (gather.kind, gather.axes, gather.ways, gather.times) == ("all-gather", "fsdp", 4, turns)
    assert gather.sent == turns * 32 * 32 * 2 * 3 / 4
    assert work.assumed == {}


def test_a_loop_of_which_only_the_data_knows_the_end_turns_as_often_as_it_is_said_to():
    text = LOOP.replace("STEP", "1").replace("NOTED", "").replace("constant(6)", "parameter(1)")
    work = work_of(text, MESH, {"head": 4})
    assert work.matmul_flops == 4 * ONCE and work.assumed == {"head": 4}


@pytest.mark.parametrize(
    "kind, shape, sent",
    [
        ("all-reduce", "f32[32]", 2 * 128 * 3 / 4),
        ("reduce-scatter", "f32[8]", 128 * 3 / 4),  # its text has the result alone
        ("reduce-scatter-start", "(f32[32], f32[8])", 128 * 3 / 4),
        ("all-gather-start", "(f32[8], f32[32])", 128 * 3 / 4),
        ("all-to-all", "f32[32]", 128 * 3 / 4),
    ],
)
def test_bytes_are_those_of_a_ring(kind, shape, sent):
    text = f"HloModule m\n\nENTRY %main (a: f32[32]) -> f32[32] {{\n  %x = {shape} {kind}(%a), channel_id=3, replica_groups=[4,4]<=[2,4,2]T(0,2,1)\n}}\n"
    work = work_of(text, MESH)
    assert by_kind_and_axes(work.collectives, lambda one: one.sent) == {(kind.removesuffix("-start"), "fsdp"): sent}


SLICES = """HloModule m

%all-reduce-scatter (input: bf16[512,1024]) -> bf16[512,256] {
  %input = bf16[512,1024]{1,0} parameter(0)
  %sum = bf16[512,1024]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, use_global_device_ids=true
  ROOT %part = bf16[512,256]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={512,256}
}

ENTRY %main (a: bf16[512,1024]) -> bf16[512,256] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %mine = bf16[512,256]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %send = (bf16[512,256]{1,0}, u32[], token[]) send(%mine), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_what_leaves_a_slice_and_a_sum_that_is_scattered_are_told_by_a_tpus_words():
    work = work_of(SLICES, {"data": 2, "fsdp": 4, "tensor": 1})
    assert by_kind_and_axes(work.collectives, lambda one: one.sent) == {
        ("reduce-scatter", "fsdp"): 512 * 1024 * 2 * 3 / 4,
        ("all-reduce", "data"): 512 * 256 * 2,
    }


def test_a_matmul_that_a_tpu_writes_as_a_convolution_counts_without_its_padding():
    # A product [2, 4352, 1024] x [1024, 32, 128] with the contracted axis in two parts and heads as a reversed window.
    text = """HloModule m

ENTRY %main (a: bf16[2,4352,2,512,1], b: bf16[2,512,32,128,1]) -> bf16[2,4352,32,128,1] {
  %a = bf16[2,4352,2,512,1]{3,1,4,2,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,512,32,128,1]{3,1,4,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[2,4352,32,128,1]{3,1,4,2,0:T(8,128)(2,1)} convolution(%a, %b), window={size=1x32x2 pad=0_0x31_31x0_0 rhs_reversal=0x1x0}, dim_labels=0b2f1_2i1o0->0b1f2
}
"""
    assert work_of(text, MESH).matmul_flops == 2 * (2 * 4352) * 1024 * (32 * 128)


def test_a_splash_kernel_counts_the_causal_half_of_its_products():
    text = """HloModule m

ENTRY %main (a: f32[]) -> f32[] {
  %splash_mha_fwd_segmented_residuals.3 = (bf16[4,32,512,128]{3,2,1,0}) custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,7,7]{2,1,0}, bf16[4,32,512,128]{3,2,1,0}}
}
"""
    assert work_of(text, MESH).kernel_flops == 2 * 2 * 4 * 32 * 128 * (512 * 513 / 2)


def test_sizes_in_bytes_know_their_types():
    arrays = arrays_in("(bf16[2,3]{1,0}, pred[4], f32[], s32[5])")
    assert [array.bytes for array in arrays] == [12, 4, 4, 20]
    assert str(Array("bf16", (2, 3))) == "bf16[2,3]"


def test_a_compiled_program_says_the_work_that_it_was_written_to_do():
    mesh = make_mesh(2, 2, 2)
    L, B, D = 5, 16, 64

    def loss(w_LDD, x_BD):
        def layer(x_BD, w_DD):
            w_DD = jax.lax.with_sharding_constraint(w_DD, NamedSharding(mesh, P()))
            return jnp.tanh(x_BD @ w_DD), None

        return jax.lax.scan(layer, x_BD, w_LDD)[0].sum()

    w_LDD = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x_BD = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    text = jax.jit(loss).lower(w_LDD, x_BD).compile().as_text()
    work = work_of(text, mesh.shape)
    assert work.matmul_flops == 2 * L * (B // 4) * D * D
    gathered = [one for one in work.collectives if one.kind == "all-gather" and one.axes == "fsdp"]
    assert sum(one.sent for one in gathered) == L * D * D * 4 / 2
