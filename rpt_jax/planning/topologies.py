"""TPU slices: published rates of their chips, their devices on a machine without a TPU, and meshes that fit them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jax.experimental import topologies

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published rates of one chip. Source: cloud.google.com/tpu/docs, system architecture of each version."""

    flops: float
    """bfloat16 FLOPs per second."""
    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Bytes per second of that memory."""
    links: float
    """Bytes per second to the other chips of a slice, over all links."""


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1228e9, links=300e9),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, links=200e9),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=600e9),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1640e9, links=448e9),
}


def describe_topology(topology: str) -> tuple[Chip, list]:
    """Return the chip and the devices of a topology such as v5p:4x4x4.

    Raises:
        ConfigError: unknown version or shape, or libtpu is missing.
    """
    version = topology.partition(":")[0]
    if version not in CHIPS:
        raise ConfigError(f"--topology {topology}; its version must be one of {', '.join(CHIPS)}, as in v5p:4x4x4.")
    # Without these settings, libtpu looks for a TPU.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        return CHIPS[version], topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin may raise any exception
        raise ConfigError(
            f"--topology {topology} cannot be described ({error!s:.300}); it needs libtpu, the TPU's compiler: "
            "pip install -e '.[tpu]', and a shape such as v5e:4x4 or v5p:4x4x4."
        ) from error


def fit_mesh(config: Config, num_chips: int) -> Config:
    """Return the config with a mesh of `num_chips` chips: data and tensor stay, fsdp takes the rest.

    If microbatches are set, each has at least one trunk per shard.

    Raises:
        ConfigError: the chips or a setting are not divisible by these axes.
    """
    mesh = config.mesh
    if mesh.num_devices == num_chips:
        return config
    fsdp = max(1, num_chips // (mesh.data * mesh.tensor))
    fitted = replace(mesh, fsdp=fsdp)
    if fitted.num_devices != num_chips:
        raise ConfigError(
            f"{num_chips} chips are not a multiple of mesh.data={mesh.data} times mesh.tensor={mesh.tensor}; they "
            "must be, because mesh.fsdp takes the rest. Change --mesh.data or --mesh.tensor."
        )
    microbatch = max(mesh.microbatch_trunks, fitted.trunk_shards) if mesh.microbatch_trunks else 0
    config = replace(config, mesh=replace(fitted, microbatch_trunks=microbatch))
    config.validate()
    return config


def larger_topologies(topology: str) -> Iterator[str]:
    """Yield the next four topologies of the version; each doubles the shortest side, and so the number of chips."""
    version, _, sides = topology.partition(":")
    sizes = [int(n) for n in sides.split("x")]
    for _ in range(4):
        sizes[sizes.index(min(sizes))] *= 2
        yield f"{version}:{'x'.join(map(str, sorted(sizes)))}"
