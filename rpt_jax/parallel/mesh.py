"""The device mesh, and the one table of parameter shardings.

Axes: `data` replicates parameters, `fsdp` shards parameters and optimizer state, `tensor` shards heads, MLP width and
vocabulary. Trunks and their branches are split over data x fsdp, so attention to a trunk is local. Slices that are
connected only by the data-centre network form the outer part of `data`: only gradients cross it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import MeshConfig
from rpt_jax.errors import ConfigError

TRUNK_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis. Batches carry TRUNK_AXES on their leading dimension.
RULES = (
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("width", "fsdp"),
    ("layers", None),
    ("head_size", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh over the first data * fsdp * tensor devices; mesh neighbours are network neighbours.

    Args:
        config: sizes of the axes.
        devices: to use; None: all of JAX's.
    Raises:
        ConfigError: too few devices, or a process or slice would take part with only some of its devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
    if config.num_devices > len(devices):
        raise ConfigError(
            f"{axes} needs {config.num_devices} devices; {len(devices)} {devices[0].platform} device(s) are present. "
            "Lower --mesh.data, --mesh.fsdp or --mesh.tensor."
        )
    is_whole = config.num_devices == len(devices)
    if not is_whole and len({d.process_index for d in devices}) > 1:
        raise ConfigError(
            f"{axes} takes {config.num_devices} of {len(devices)} devices, which belong to several processes; all must "
            "take part. Make the product of the axes equal to the number of devices."
        )
    shape = (config.data, config.fsdp, config.tensor)
    if devices[0].platform == "tpu" and is_whole:
        grid = _tpu_grid(shape, devices, axes)
    else:
        grid = np.array(devices[: config.num_devices]).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _tpu_grid(shape: tuple[int, int, int], devices, axes: str) -> np.ndarray:
    """Arrange devices so that each axis follows links of the torus."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    data, fsdp, tensor = shape
    if data % slices:
        raise ConfigError(
            f"{axes} on {slices} slices; only data may cross the network between slices, so it must be a multiple of "
            "the number of slices. Raise --mesh.data."
        )
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def trunk_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a leading trunk dimension over data x fsdp, for every field of a batch record."""
    return NamedSharding(mesh, PartitionSpec(TRUNK_AXES))


def local_trunks(mesh: Mesh, num_trunks: int) -> np.ndarray:
    """Return the trunks of a batch on this process's devices, ascending."""
    held = trunk_sharding(mesh).addressable_devices_indices_map((num_trunks,)).values()
    return np.unique(np.concatenate([np.arange(num_trunks)[index] for index in held]))


def shard_batch(mesh: Mesh, batch: Any, *, num_trunks: int | None = None) -> Any:
    """Put a host batch on the mesh, split by trunk.

    Args:
        mesh: target.
        batch: tree of arrays with a leading trunk dimension.
        num_trunks: of the whole batch, if each process passes its `local_trunks`; None: each passes all.
    """
    sharding = trunk_sharding(mesh)
    if num_trunks is None and jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    rows = None if num_trunks is None else local_trunks(mesh, num_trunks)

    def put(x):
        shape = x.shape if rows is None else (num_trunks, *x.shape[1:])

        def part(index):
            if rows is None:
                return x[index]
            wanted = np.arange(num_trunks)[index[0]]
            return x[np.searchsorted(rows, wanted)][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def sharded_like(array: Any, values: np.ndarray) -> jax.Array:
    """Put host values, equal on every process, on the devices with the sharding of `array`."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return jax.numpy.asarray(values)
    return jax.make_array_from_callback(values.shape, array.sharding, lambda index: values[index])


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
    """Return NamedShardings for a tree of `nn.Partitioned` shapes, by RULES.

    A dimension that its axis does not divide stays unsharded. `Config.validate` forbids this for a policy, but a small
    proxy may have fewer heads than `tensor`.
    """
    named = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, RULES)
    return jax.tree.map(_as_compiled, named, nn.unbox(abstract_params))


@contextmanager
def on_mesh_of(tree: Any) -> Iterator[None]:
    """Trace programs in this context with the mesh of the tree's arrays or shapes."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def constrain(x, *axes):
    """Constrain the sharding of x inside a program: a mesh axis or None for each leading dimension.

    Without constraints, the partitioner propagates the parameters' shards into the activations and moves those. A
    dimension that its axes do not divide, such as that of a small test batch, stays unsharded.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    names = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in axes]
    sizes = zip(axes, names, x.shape, strict=False)
    fitting = [axis if size % num_shards(*name) == 0 else None for axis, name, size in sizes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def spec_without(array, axis: str) -> PartitionSpec:
    """Return the PartitionSpec of an array or shape without `axis`."""
    sharding = getattr(array, "sharding", None)
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    return PartitionSpec(*(None if part == axis else part for part in spec))


def num_shards(*axes: str) -> int:
    """Return the number of shards along these mesh axes, in the program being traced."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _as_compiled(sharding: NamedSharding, array) -> NamedSharding:
    """Normalise the sharding to the form that compiled programs return, so that updates do not recompile."""
    sizes = sharding.mesh.shape
    axes = [
        axis if axis is not None and sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(sharding.spec, array.shape, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
