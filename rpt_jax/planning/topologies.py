"""TPU slices: published rates of their chips, their devices without one at hand, and how a mesh fits on them."""

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
    """bfloat16, per second."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes of that memory per second."""
    links: float
    """Bytes per second to the other chips of a slice, all links together."""


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1228e9, links=300e9),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, links=200e9),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=600e9),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1640e9, links=448e9),
}


def describe_topology(topology: str) -> tuple[Chip, list]:
    """The chip and the devices of a topology such as v5p:4x4x4.

    Raises:
        ConfigError: unknown version or shape, or libtpu is missing.
    """
    version = topology.partition(":")[0]
    if version not in CHIPS:
        raise ConfigError(f"--topology {topology}; its version must be one of {', '.join(CHIPS)}, as in v5p:4x4x4.")
    # libtpu looks for a TPU unless it is told that there is none.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        return CHIPS[version], topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin raises what it likes
        raise ConfigError(
            f"--topology {topology} cannot be described ({error!s:.300}); it needs libtpu, the TPU's compiler: "
            "pip install -e '.[tpu]', and a shape such as v5e:4x4 or v5p:4x4x4."
        ) from error


def fit_mesh(config: Config, num_chips: int) -> Config:
    """The config on so many chips: data and tensor as they are, fsdp the rest, one trunk a shard at a time at least.

    Raises:
        ConfigError: something does not divide by these axes.
    """
    mesh = config.mesh
    if mesh.num_devices == num_chips:
        return config
    fsdp = max(1, num_chips // (mesh.data * mesh.tensor))
    fitted = replace(mesh, fsdp=fsdp)
    if fitted.num_devices != num_chips:
        raise ConfigError(
            f"{num_chips} chips are no multiple of mesh.data={mesh.data} times mesh.tensor={mesh.tensor}. Change them."
        )
    microbatch = max(mesh.microbatch_trunks, fitted.trunk_shards) if mesh.microbatch_trunks else 0
    config = replace(config, mesh=replace(fitted, microbatch_trunks=microbatch))
    config.validate()
    return config


def larger_topologies(topology: str) -> Iterator[str]:
    """The next four of the version, each of twice the chips: the shortest side doubled."""
    version, _, sides = topology.partition(":")
    sizes = [int(n) for n in sides.split("x")]
    for _ in range(4):
        sizes[sizes.index(min(sizes))] *= 2
        yield f"{version}:{'x'.join(map(str, sorted(sizes)))}"
