"""What a compiled program moves: texts read by hand, and programs that XLA compiled for eight devices."""

from __future__ import annotations

import json

import pytest
from eight_devices import on_eight_devices

from scfm_jax.scaling.hlo import Collective, ProgramText

LOOP = """HloModule step, entry_computation_layout={()->f32[]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%slice_and_double (p.0: f32[7,256], p.1: s32[]) -> f32[1,256] {
  %p.0 = f32[7,256]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,256}
  ROOT %twice = f32[1,256]{1,0} add(%row, %row)
}

%write (q.0: f32[7,256], q.1: f32[1,256], q.2: s32[]) -> f32[7,256] {
  %q.0 = f32[7,256]{1,0} parameter(0)
  %q.1 = f32[1,256]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[7,256]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %none)
}

%condition (c: (s32[], f32[7,256])) -> pred[] {
  %c = (s32[], f32[7,256]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  %end = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

%body (d: (s32[], f32[7,256])) -> (s32[], f32[7,256]) {
  %d = (s32[], f32[7,256]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%d), index=0
  %rows = f32[7,256]{1,0} get-tuple-element(%d), index=1
  %got = f32[1,256]{1,0:T(8,128)S(1)} fusion(%rows, %step), kind=kLoop, calls=%slice_and_double
  %all = f32[4,256]{1,0} all-gather(%got), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %one = f32[1,256]{1,0} slice(%all), slice={[0:1], [0:256]}
  %back = f32[7,256]{1,0} fusion(%rows, %one, %step), kind=kLoop, calls=%write
  ROOT %next = (s32[], f32[7,256]{1,0}) tuple(%step, %back)
}

%all-reduce-scatter.1 (e: bf16[8,64]) -> bf16[1,64] {
  %e = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%e), replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %part = bf16[1,64]{1,0} slice(%whole), slice={[0:1], [0:64]}
}

ENTRY %main (rows: f32[7,256], x: bf16[8,64]) -> f32[] {
  %rows.1 = f32[7,256]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %start = s32[] constant(0)
  %carry = (s32[], f32[7,256]{1,0}) tuple(%start, %rows.1)
  %loop = (s32[], f32[7,256]{1,0}) while(%carry), condition=%condition, body=%body
  %scattered = bf16[1,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = f32[] all-reduce(%start), channel_id=3, replica_groups=GROUPS, to_apply=%sum
}
"""


def program(groups: str = "{{0,1}}") -> ProgramText:
    return ProgramText(LOOP.replace("GROUPS", groups))


def test_collectives_count_as_often_as_they_run() -> None:
    gather, scatter, reduce = program().collectives()
    assert gather == Collective("all-gather", 4 * 256 * 4, (0, 1, 2, 3), times=7)
    assert gather.sent == 7 * 3 * 256 * 4
    assert scatter == Collective("reduce-scatter", 8 * 64 * 2, tuple(range(8)), times=1)
    assert scatter.sent == 7 * 64 * 2
    assert reduce == Collective("all-reduce", 4, (0, 1), times=1)
    assert reduce.sent == 4


def test_memory_traffic_by_hand() -> None:
    """A row is sliced into the cache (free), gathered into memory, one row of that sliced, written back."""
    row = 256 * 4
    body = row + 4 + (4 * row) + (4 * row + row) + (row + row + 4)
    assert program().memory_traffic() == 7 * body + (8 * 64 * 2 + 64 * 2) + (4 + 4)


NESTED = """HloModule step

%take (t.0: bf16[9,64], t.1: s32[]) -> bf16[1,64] {
  %t.0 = bf16[9,64]{1,0} parameter(0)
  %t.1 = s32[] parameter(1)
  %same = bf16[9,64]{1,0} bitcast(%t.0)
  %zero = s32[] constant(0)
  ROOT %row = bf16[1,64]{1,0} dynamic-slice(%same, %t.1, %zero), dynamic_slice_sizes={1,64}
}

%greatest (u.0: bf16[9,64], u.1: s32[]) -> (f32[1], s32[1]) {
  %u.1 = s32[] parameter(1)
  %u.0 = bf16[9,64]{1,0} parameter(0)
  %one = bf16[1,64]{1,0} fusion(%u.0, %u.1), kind=kLoop, calls=%take
  %at = s32[1,64]{1,0} iota(), iota_dimension=1
  ROOT %both = (f32[1]{0}, s32[1]{0}) reduce(%one, %at, %one, %at), dimensions={1}, to_apply=%larger
}

%keep (v.0: bf16[9,64], v.1: bf16[1,64], v.2: s32[]) -> (bf16[9,64], bf16[1,64]) {
  %v.0 = bf16[9,64]{1,0} parameter(0)
  %v.1 = bf16[1,64]{1,0} parameter(1)
  %v.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %put = bf16[9,64]{1,0} dynamic-update-slice(%v.0, %v.1, %v.2, %none)
  %minus = bf16[1,64]{1,0} negate(%v.1)
  ROOT %pair = (bf16[9,64]{1,0}, bf16[1,64]{1,0}) tuple(%put, %minus)
}

ENTRY %main (rows: bf16[9,64], row: bf16[1,64], at: s32[]) -> s32[1] {
  %rows = bf16[9,64]{1,0} parameter(0)
  %row = bf16[1,64]{1,0} parameter(1)
  %at.1 = s32[]{:T(128)S(6)} parameter(2)
  %best = (f32[1]{0}, s32[1]{0}) fusion(%rows, %at.1), kind=kLoop, calls=%greatest
  %kept = (bf16[9,64]{1,0}, bf16[1,64]{1,0:S(1)}) fusion(%rows, %row, %at.1), kind=kLoop, calls=%keep
  ROOT %which = s32[1]{0} get-tuple-element(%best), index=1
}
"""


def test_fusions_within_fusions_take_slices() -> None:
    """A row is read and two numbers written; a row is read and put into its place, its negative cached."""
    row = 64 * 2
    assert ProgramText(NESTED).memory_traffic() == (row + 4 + 4) + (row + row)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", (0, 4)),
    ],
)
def test_groups_are_read_in_every_spelling(groups: str, first: tuple[int, ...]) -> None:
    assert program(groups).collectives()[-1].group == first


def test_a_loop_whose_end_is_not_known_is_an_error() -> None:
    text = LOOP.replace("%end = s32[]{:T(128)} constant(7)", "%end = s32[] get-tuple-element(%c), index=0")
    with pytest.raises(ValueError, match="cannot tell how often loop runs"):
        ProgramText(text).collectives()


COMPILED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from scfm_jax.scaling.hlo import ProgramText

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
place = lambda *axes: NamedSharding(mesh, P(*axes))
shape = lambda sharding, *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

def layers(weights, x):
    def layer(x, weight):
        weight = jax.lax.with_sharding_constraint(weight, place())
        return jnp.tanh(x @ weight), None
    return jax.lax.scan(layer, x, weights)[0]

def loss(weights, x):
    return (layers(weights, x) ** 2).sum()

weights = shape(place(None, "fsdp"), 5, 64, 64)
x = shape(place(("data", "fsdp")), 8, 64)
for function in (layers, jax.grad(loss)):
    compiled = jax.jit(function, out_shardings=x.sharding if function is layers else weights.sharding)
    found = ProgramText(compiled.lower(weights, x).compile().as_text()).collectives()
    print(json.dumps([(c.kind, c.size, c.group, c.times) for c in found]))
"""


def test_collectives_that_xla_compiled() -> None:
    """Weights of five layers gathered over 4 of 8 devices; gradients summed over all 8."""
    forward, backward = (
        [Collective(kind, size, tuple(group), times) for kind, size, group, times in json.loads(line)]
        for line in on_eight_devices(COMPILED)
    )
    matrix = 64 * 64 * 4
    assert forward == [Collective("all-gather", matrix, (0, 1, 2, 3), times=5)]
    summed = sum(each.size * each.times for each in backward if each.kind != "all-gather")
    assert summed == 5 * matrix
    assert {len(each.group) for each in backward if each.kind != "all-gather"} == {8}
