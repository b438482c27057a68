"""The device mesh and the one table that says how arrays lie on it.

Axes: `data` replicates parameters, `fsdp` shards parameters and optimizer state, `tensor` shards heads, MLP width and
vocabulary. Trunks, with the branches that leave them, are split over data x fsdp, so attention to a trunk is local.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
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


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices.

    Raises:
        ConfigError: fewer devices are present.
    """
    devices = jax.devices()
    if config.num_devices > len(devices):
        raise ConfigError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} needs {config.num_devices} devices; "
            f"{len(devices)} {devices[0].platform} device(s) are present. Make the axes' product at most that."
        )
    shape = (config.data, config.fsdp, config.tensor)
    grid = np.array(devices[: config.num_devices]).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def trunk_sharding(mesh: Mesh) -> NamedSharding:
    """Leading (trunk) dimension over data x fsdp; fits every field of a batch record that has a trunk dimension."""
    return NamedSharding(mesh, PartitionSpec(TRUNK_AXES))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Put a host batch on the mesh, split by trunk."""
    return jax.device_put(batch, trunk_sharding(mesh))


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
    """NamedShardings for a tree of `nn.Partitioned` shapes, through RULES."""
    named = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, RULES)
    return jax.tree.map(_as_compiled, named)


def _as_compiled(sharding: NamedSharding) -> NamedSharding:
    """The same sharding as a compiled program names it: an update's results then compile nothing anew."""
    sizes = sharding.mesh.shape
    axes = [axis if axis is not None and sizes[axis] > 1 else None for axis in sharding.spec]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
