"""Traffic of compiled programs against counts by hand; compiled for eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.config import MeshConfig
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.traffic import read_traffic


def traffic_of(function, mesh, *shapes_and_specs, trips=1.0):
    """{(kind, axes): (count, bytes)} of a program whose result is whole everywhere."""
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
    """[64, 32] @ [32, 16], contracted over fsdp: 64 x 16 numbers are reduced among four: 2 * 3/4 of 4,096 bytes."""
    found = traffic_of(jnp.dot, mesh, ((64, 32), (None, "fsdp")), ((32, 16), ("fsdp", None)))
    assert found == {("all-reduce", "fsdp"): (1, 2 * 3 / 4 * 64 * 16 * 4)}


def test_gathering_counts_what_a_device_lacks_in_its_own_group(mesh):
    found = traffic_of(lambda x: x * 2, mesh, ((64, 32), ("tensor", None)))
    assert found == {("all-gather", "tensor"): (1, 1 / 2 * 64 * 32 * 4)}
    found = traffic_of(lambda x: x * 2, mesh, ((64, 32), (("fsdp", "tensor"), None)))
    assert found == {("all-gather", "fsdp+tensor"): (1, 7 / 8 * 64 * 32 * 4)}
    # What is whole already moves nothing.
    assert traffic_of(lambda x: x * 2, mesh, ((64, 32), ())) == {}


def test_loops_count_as_often_as_they_run(mesh):
    def five_times(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w @ w.T), x)

    once = traffic_of(lambda x, w: jnp.tanh(x @ w @ w.T), mesh, ((8, 32), ()), ((32, 64), (None, "fsdp")))
    five = traffic_of(five_times, mesh, ((8, 32), ()), ((32, 64), (None, "fsdp")))
    assert set(once) == set(five) == {("all-reduce", "fsdp")}
    np.testing.assert_allclose(five["all-reduce", "fsdp"], 5 * np.array(once["all-reduce", "fsdp"]))


def test_loops_that_their_data_end_count_as_the_caller_says(mesh):
    def until_large(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w @ w.T, x)

    shapes = ((8, 32), ()), ((32, 64), (None, "fsdp"))
    assert traffic_of(until_large, mesh, *shapes, trips=7)["all-reduce", "fsdp"][0] == 7
