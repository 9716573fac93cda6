"""What is read from compiled programs: text written by hand, and programs whose cost is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magnet_jax.hlo_text import cost, operation_names, readers

TEXT = """HloModule jit_step, entry_computation_layout={}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition.1 (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body.1 (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state.1), index=1
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %gather.1 = f32[4]{0} gather(%fusion.1, %x), offset_dims={}
  %all-gather.1 = f32[32]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%i.1, %fusion.1)
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %copy.1 = bf16[16]{0} copy(%p), backend_config={"window_config":{"estimated_cycles":"11"}}
  %while.1 = (s32[], f32[8]{0}) while(%init), condition=%condition.1, body=%body.1
  %all-reduce.1 = f32[16]{0} all-reduce(%p), replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}, to_apply=%add
  %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %free.1 = f32[16]{0} custom-call(), custom_call_target="AllocateBuffer"
  %call.1 = f32[16]{0} custom-call(%p), custom_call_target="GatherScatterIndicesBitpacked"
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%q), replica_groups=[4,2]<=[8]
  %done = f32[8]{0} all-gather-done(%start)
  %some = ((f32[4]{0:T(8)(2,1)}, f32[2,3]), (f32[8]{0:T(8)(2,1)}, f32[4,3])) all-gather-start(%q), replica_groups=[4,2]<=[8]
  %sums = (f32[4]{0}, f32[8]{0}) all-reduce-start(%q, %r), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %out = f32[16]{0} add(%all-reduce.1, %p)
}
"""


def test_text_written_by_hand():
    found = cost(TEXT)
    assert found.cycles == {"copy.1": 11, "fusion.1": 7 * 100}
    assert found.silent_bytes == {"gather.1": 7 * (16 + 32 + 32), "call.1": 128}
    assert dict(found.counts) == {"all-gather": 7 + 2, "all-reduce": 2, "reduce-scatter": 1}
    assert dict(found.sizes) == {"all-gather": 7 * 128 + 32 + 80, "all-reduce": 64 + 48, "reduce-scatter": 8}
    assert found.wire == 7 * 128 * 3 / 4 + (32 + 80) / 2 + 2 * (64 + 48) / 2 + 8 * 7


def test_an_all_reduce_of_known_size():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(lambda x, w: x.T @ jnp.sin(x @ w), in_shardings=(split, whole), out_shardings=whole)
    text = run.lower(np.ones((8, 32), np.float32), np.ones((32, 48), np.float32)).compile().as_text()
    found = cost(text)
    assert dict(found.counts) == {"all-reduce": 1}
    assert found.sizes["all-reduce"] == found.wire == 32 * 48 * 4


@pytest.mark.parametrize("length", [3, 11])
def test_collectives_in_loops_count_as_often_as_they_run(length):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def run(x, w):
        def body(w, _):
            return jnp.tanh(x.T @ jnp.sin(x @ w)), None

        return jax.lax.scan(body, w, None, length=length)[0]

    jitted = jax.jit(run, in_shardings=(split, whole), out_shardings=whole)
    text = jitted.lower(np.ones((8, 16), np.float32), np.ones((16, 16), np.float32)).compile().as_text()
    found = cost(text)
    assert found.counts["all-reduce"] == length
    assert found.sizes["all-reduce"] == length * 16 * 16 * 4


FUSED = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: f32[4096,1024]) -> f32[512,1024] {
  %input = f32[4096,1024]{1,0} parameter(0)
  %all-reduce.14 = f32[4096,1024]{1,0} all-reduce(%input), channel_id=47, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[512,1024]{1,0} dynamic-slice(%all-reduce.14), dynamic_slice_sizes={512,1024}
}

%fused_computation.1 (param: bf16[2,512]) -> bf16[16,512] {
  %param = bf16[2,512]{1,0} parameter(0)
  ROOT %all-gather.62 = bf16[16,512]{1,0} all-gather(%param), channel_id=64, replica_groups={{0,1,2,3,4,5,6,7}}
}

%async_collective_fusion.2 (param.1: bf16[2,512]) -> bf16[16,512] {
  %param.1 = bf16[2,512]{1,0} parameter(0)
  ROOT %all-gather.64 = bf16[16,512]{1,0} all-gather(%param.1), channel_id=64, replica_groups={{0,1,2,3,4,5,6,7}}
}

ENTRY %main (x: f32[4096,1024], y: bf16[2,512]) -> f32[512,1024] {
  %x = f32[4096,1024]{1,0} parameter(0)
  %y = bf16[2,512]{1,0} parameter(1)
  %fusion.1 = bf16[16,512]{1,0} fusion(%y), calls=%fused_computation.1, backend_config={"estimated_cycles":"70"}
  %fusion.2 = bf16[16,512]{1,0} fusion(%y), calls=%async_collective_fusion.2, backend_config={"estimated_cycles":"30"}
  ROOT %fusion.3 = f32[512,1024]{1,0} fusion(%x), calls=%all-reduce-scatter, backend_config={"estimated_cycles":"5"}
}
"""


def test_collectives_within_the_fusions_of_a_tpu():
    """A gather in two pieces is one, and a sum of which each device keeps an eighth is a reduce-scatter."""
    found = cost(FUSED)
    assert dict(found.counts) == {"all-gather": 1, "reduce-scatter": 1}
    assert dict(found.sizes) == {"all-gather": 16 * 512 * 2, "reduce-scatter": 512 * 1024 * 4}
    assert found.wire == 16 * 512 * 2 * 7 / 8 + 512 * 1024 * 4 * 7
    assert found.cycles.total() == 105


BRANCHES = """HloModule jit_step

%usual (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %fusion.1 = f32[4]{0} fusion(%x), calls=%f, backend_config={"estimated_cycles":"70"}
}

%exception (y: f32[4]) -> f32[4] {
  %y = f32[4]{0} parameter(0)
  %gather.1 = f32[4]{0} gather(%y, %y), offset_dims={}
  ROOT %fusion.2 = f32[4]{0} fusion(%gather.1), calls=%f, backend_config={"estimated_cycles":"300"}
}

ENTRY %main (p: pred[], z: f32[4]) -> f32[4] {
  %p = pred[] parameter(0)
  %z = f32[4]{0} parameter(1)
  ROOT %conditional.1 = f32[4]{0} conditional(%p, %z, %z), BRANCHES, metadata={op_name="jit(step)/cond"}
}
"""


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%exception, %usual}", "true_computation=%usual, false_computation=%exception"],
)
def test_of_branches_the_cheapest_counts(branches):
    found = cost(BRANCHES.replace("BRANCHES", branches))
    assert (found.cycles, found.silent_bytes) == ({"fusion.1": 70}, {})


NAMED = """HloModule jit_step

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp(MagNet)/stage_0/mul"}
  %n = f32[4]{0} multiply(%m, %p), metadata={op_name="jit(step)/jvp(MagNet)/stage_1/mul"}
  ROOT %a = f32[4]{0} add(%n, %m), metadata={op_name="jit(step)/jvp(MagNet)/stage_1/mul"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %while.1 = f32[4]{0} while(%fusion.1), condition=%c, body=%b, metadata={op_name="jit(step)/while"}
  %copy.1 = f32[4]{0} copy(%while.1)
  ROOT %dot.1 = f32[4]{0} dot(%copy.1, %x), metadata={op_name="jit(step)/transpose(jvp(MagNet))/decoder/layer_0/attn/dot"}
}
"""


def test_names_of_operations():
    names = operation_names(NAMED)
    assert names["fusion.1"] == [
        "",
        "jit(step)/jvp(MagNet)/stage_1/mul",  # Twice in it.
        "",
        "jit(step)/jvp(MagNet)/stage_0/mul",
    ]
    assert [name.split("/")[-2:] for name in names["dot.1"]] == [["attn", "dot"]]
    assert names["copy.1"] == [""]
    assert "while.1" not in names  # What it runs has events of its own.


def test_who_reads_a_result():
    text = """
%body (arguments: (f32[2], f32[2])) -> (f32[2], f32[2]) {
  %arguments = (f32[2], f32[2]) parameter(0)
  %a = f32[2] get-tuple-element(%arguments), index=0
  %sum = f32[2] fusion(%a, %a), kind=kLoop, calls=%fused
  %flat = f32[1,2] bitcast(%sum), metadata={op_name="x(%a), y"}
  %product = f32[2] dot(%flat, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %result = (f32[2], f32[2]) tuple(%sum, %product)
}

ENTRY %main (b: f32[2]) -> f32[2] {
  %b = f32[2] parameter(0)
  %start = f32[2] copy(%b)
  %both = (f32[2], f32[2]) tuple(%start, %b)
  %loop = (f32[2], f32[2]) while(%both), condition=%condition, body=%body
  ROOT %end = f32[2] get-tuple-element(%loop), index=0
}
"""
    expected = {"arguments": {"sum"}, "sum": {"product"}, "product": set()}
    assert readers(text) == expected | {"b": {"start", "loop"}, "start": {"loop"}, "loop": set()}
