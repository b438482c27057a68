"""Traffic of programs compiled for eight virtual devices, against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.config import MeshConfig
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning.traffic import read_traffic


def traffic_of(function, mesh, *shapes_and_specs, trips=1.0):
    """Return {(kind, axes): (count, bytes)} of a program whose result is replicated on all devices."""
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in shapes_and_specs
    ]
    compiled = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*arguments).compile()
    found = read_traffic(compiled.as_text(), dict(mesh.shape), unknown_trips=trips)
    return {(t.kind, t.axes): (t.count, t.bytes) for t in found}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


def test_a_sum_over_shards_is_an_all_reduce(mesh):
    """[64, 32] @ [32, 16], contracted over fsdp: 64 x 16 floats reduced over four devices, 2 * 3/4 of 4,096 bytes."""
    found = traffic_of(jnp.dot, mesh, ((64, 32), (None, "fsdp")), ((32, 16), ("fsdp", None)))
    assert found == {("all-reduce", "fsdp"): (1, 2 * 3 / 4 * 64 * 16 * 4)}


def test_gathering_counts_what_a_device_lacks_in_its_own_group(mesh):
    found = traffic_of(lambda x: x * 2, mesh, ((64, 32), ("tensor", None)))
    assert found == {("all-gather", "tensor"): (1, 1 / 2 * 64 * 32 * 4)}
    found = traffic_of(lambda x: x * 2, mesh, ((64, 32), (("fsdp", "tensor"), None)))
    assert found == {("all-gather", "fsdp+tensor"): (1, 7 / 8 * 64 * 32 * 4)}
    # A replicated array moves nothing.
    assert traffic_of(lambda x: x * 2, mesh, ((64, 32), ())) == {}


def test_loops_count_as_often_as_they_run(mesh):
    def five_times(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w @ w.T), x)

    once = traffic_of(lambda x, w: jnp.tanh(x @ w @ w.T), mesh, ((8, 32), ()), ((32, 64), (None, "fsdp")))
    five = traffic_of(five_times, mesh, ((8, 32), ()), ((32, 64), (None, "fsdp")))
    assert set(once) == set(five) == {("all-reduce", "fsdp")}
    np.testing.assert_allclose(five["all-reduce", "fsdp"], 5 * np.array(once["all-reduce", "fsdp"]))


def test_loops_whose_length_depends_on_data_count_as_given(mesh):
    def until_large(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w @ w.T, x)

    shapes = ((8, 32), ()), ((32, 64), (None, "fsdp"))
    assert traffic_of(until_large, mesh, *shapes, trips=7)["all-reduce", "fsdp"][0] == 7

    def twice_until_large(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: until_large(x, w) + 1, x)

    # The inner loop runs once per iteration of the outer one: unknown_trips applies only once.
    assert traffic_of(twice_until_large, mesh, *shapes, trips=7)["all-reduce", "fsdp"][0] == 7


# In the TPU compiler's form: one all-gather of 64 bytes per device, started, overlapped with a loop, and ended. The
# loop is unrolled twice: its counter goes from 0 to 8 in steps of 2.
SPREAD = """
%begin (p.1: f32[16]) -> f32[64] {
  %p.1 = f32[16]{0} parameter(0)
  ROOT %g.1 = f32[64]{0} all-gather(%p.1), GATHERED
}

%carry_on (p.2: f32[16]) -> f32[64] {
  %p.2 = f32[16]{0} parameter(0)
  ROOT %g.2 = f32[64]{0} all-gather(%p.2), GATHERED
}

%end (p.3: f32[16]) -> f32[64] {
  %p.3 = f32[16]{0} parameter(0)
  ROOT %g.3 = f32[64]{0} all-gather(%p.3), GATHERED
}

%is_before_eight (c: (f32[16], u32[])) -> pred[] {
  %c = (f32[16]{0}, u32[]) parameter(0)
  %count.1 = u32[] get-tuple-element(%c), index=1
  %eight = u32[] constant(8)
  ROOT %is_less = pred[] compare(%count.1, %eight), direction=LT
}

%twice (b: (f32[16], u32[])) -> (f32[16], u32[]) {
  %b = (f32[16]{0}, u32[]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%b), index=0
  %count.2 = u32[] get-tuple-element(%b), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%count.2, %two)
  %f.2 = f32[64]{0} fusion(%x), kind=kCustom, calls=%carry_on
  %moved = f32[16]{0} collective-permute(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[16]{0}, u32[]) tuple(%moved, %next)
}

ENTRY %main (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %zero = u32[] constant(0)
  %f.1 = f32[64]{0} fusion(%a), kind=kCustom, calls=%begin
  %i = (f32[16]{0}, u32[]) tuple(%a, %zero)
  %w = (f32[16]{0}, u32[]) while(%i), condition=%is_before_eight, body=%twice
  ROOT %f.3 = f32[64]{0} fusion(%a), kind=kCustom, calls=%end
}
""".replace(
    "GATHERED",
    'channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, frontend_attributes={chain_id="3"}',
)


def test_a_collective_spread_over_fusions_counts_once_and_an_unrolled_loop_by_its_step():
    found = {(t.kind, t.axes): (t.count, t.bytes) for t in read_traffic(SPREAD, {"fsdp": 4, "tensor": 2})}
    assert found == {("all-gather", "fsdp"): (1, 3 / 4 * 64 * 4), ("collective-permute", "tensor"): (4, 4 * 16 * 4)}
