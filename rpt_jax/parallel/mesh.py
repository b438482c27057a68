"""The device mesh and the one table that says how arrays lie on it.

Axes: `data` replicates parameters, `fsdp` shards parameters and optimizer state, `tensor` shards heads, MLP width and
vocabulary. Trunks, with the branches that leave them, are split over data x fsdp, so attention to a trunk is local.
Slices that are joined by the data-centre network alone are the outer part of `data`: only gradients cross it.
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
    """A mesh over the first data * fsdp * tensor devices, neighbours on it being neighbours of the network.

    Args:
        devices: None: all of JAX's.
    Raises:
        ConfigError: fewer devices are present; some of a process or of a slice would be left out.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
    if config.num_devices > len(devices):
        raise ConfigError(
            f"{axes} needs {config.num_devices} devices; {len(devices)} {devices[0].platform} device(s) are present. "
            "Make the axes' product at most that."
        )
    is_whole = config.num_devices == len(devices)
    if not is_whole and len({d.process_index for d in devices}) > 1:
        raise ConfigError(
            f"{axes} takes {config.num_devices} of {len(devices)} devices, which lie on several processes; each must "
            "have part in the work. Make the axes' product their number."
        )
    shape = (config.data, config.fsdp, config.tensor)
    if devices[0].platform == "tpu" and is_whole:
        grid = _tpu_grid(shape, devices, axes)
    else:
        grid = np.array(devices[: config.num_devices]).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _tpu_grid(shape: tuple[int, int, int], devices, axes: str) -> np.ndarray:
    """Devices so that each axis runs along links of the torus."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    data, fsdp, tensor = shape
    if data % slices:
        raise ConfigError(
            f"{axes} on {slices} slices; only data may cross the network between slices, so it must be a multiple of "
            "their number. Raise --mesh.data."
        )
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def trunk_sharding(mesh: Mesh) -> NamedSharding:
    """Leading (trunk) dimension over data x fsdp; fits every field of a batch record that has a trunk dimension."""
    return NamedSharding(mesh, PartitionSpec(TRUNK_AXES))


def local_trunks(mesh: Mesh, num_trunks: int) -> np.ndarray:
    """Trunks of a batch that this process's devices hold, ascending."""
    held = trunk_sharding(mesh).addressable_devices_indices_map((num_trunks,)).values()
    return np.unique(np.concatenate([np.arange(num_trunks)[index] for index in held]))


def shard_batch(mesh: Mesh, batch: Any, *, num_trunks: int | None = None) -> Any:
    """Put a host batch on the mesh, split by trunk.

    Args:
        num_trunks: of the whole batch, of which each process gives its `local_trunks`; None: each gives all.
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


def beside(array: Any, values: np.ndarray) -> jax.Array:
    """Host values, the same on every process, lying as `array` does: split by trunk where it is."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return jax.numpy.asarray(values)
    return jax.make_array_from_callback(values.shape, array.sharding, lambda index: values[index])


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
    """NamedShardings for a tree of `nn.Partitioned` shapes, through RULES.

    A dimension that its axis does not divide is left whole. `Config.validate` refuses this of a policy; a small proxy
    may have fewer heads than `tensor`.
    """
    named = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, RULES)
    return jax.tree.map(_as_compiled, named, nn.unbox(abstract_params))


@contextmanager
def on_mesh_of(tree: Any) -> Iterator[None]:
    """Programs that are traced inside lay their arrays on the mesh that the tree's arrays, or their shapes, lie on."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def constrain(x, *axes):
    """x, laid out so inside a program: a mesh axis or None for each dimension, None for those not named.

    Left to itself the partitioner spreads the parameters' shards into the activations, and moves those. A dimension
    that its axes do not divide, as in a small batch made by hand, is left whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    names = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in axes]
    sizes = zip(axes, names, x.shape, strict=False)
    fitting = [axis if size % num_shards(*name) == 0 else None for axis, name, size in sizes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def spec_without(array, axis: str) -> PartitionSpec:
    """How an array (or its shape) lies on its mesh, were it whole along `axis`."""
    sharding = getattr(array, "sharding", None)
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    return PartitionSpec(*(None if part == axis else part for part in spec))


def num_shards(*axes: str) -> int:
    """Parts that these mesh axes cut a dimension into, in the program that is being traced."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _as_compiled(sharding: NamedSharding, array) -> NamedSharding:
    """The sharding as a compiled program names it: an update's results then compile nothing anew."""
    sizes = sharding.mesh.shape
    axes = [
        axis if axis is not None and sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(sharding.spec, array.shape, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
