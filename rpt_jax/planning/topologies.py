"""Slices of TPUs and hosts of GPUs: published rates of their chips, their devices without the hardware, and meshes."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jax.experimental import topologies

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published rates of one chip.

    Sources: cloud.google.com/tpu/docs, system architecture of each version; NVIDIA's data sheets of the SXM modules.
    """

    flops: float
    """bfloat16 FLOPs per second, without sparsity."""
    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Bytes per second of that memory."""
    links: float
    """Bytes per second sent to the other chips, over all links (ICI or NVLink)."""
    platform: Literal["tpu", "gpu"] = "tpu"


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A GPU as XLA's compiler asks for it. Source: CUDA's device properties."""

    name: str
    capability: tuple[int, int]
    """Compute capability."""
    clock: float
    """GHz."""
    cores: int
    """Streaming multiprocessors."""
    lanes: int
    """Float32 units of a core."""
    shared: int
    """Bytes of shared memory of a core."""
    cache: int
    """Bytes of the L2 cache."""
    platform: Literal["tpu", "gpu"] = "gpu"


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1228e9, links=300e9),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, links=200e9),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=600e9),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1640e9, links=448e9),
    "a100": Gpu(
        flops=312e12, memory=85_100_068_864, bandwidth=2039e9, links=300e9, name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0), clock=1.41, cores=108, lanes=64, shared=167_936, cache=40 * 2**20,
    ),
    "h100": Gpu(
        flops=989e12, memory=84_942_979_072, bandwidth=3352e9, links=450e9, name="NVIDIA H100 80GB HBM3",
        capability=(9, 0), clock=1.98, cores=132, lanes=128, shared=233_472, cache=50 * 2**20,
    ),
    "h200": Gpu(
        flops=989e12, memory=151_397_597_184, bandwidth=4800e9, links=450e9, name="NVIDIA H200",
        capability=(9, 0), clock=1.98, cores=132, lanes=128, shared=233_472, cache=50 * 2**20,
    ),
}  # fmt: skip

# XLA's GpuTargetConfigProto. A block of threads may use all but 1 KiB of its core's shared memory.
_TARGET = """
platform_name: "CUDA"
device_description_str: "{gpu.name}"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {extension} }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
  clock_rate_ghz: {gpu.clock} core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
  device_memory_size: {gpu.memory} memory_bandwidth: {bandwidth} l2_cache_size: {gpu.cache} device_address_bits: 64
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
"""


def describe_topology(topology: str) -> tuple[Chip, list]:
    """Return the chip and the devices of a topology such as v5p:4x4x4 or h100:8.

    Raises:
        ConfigError: unknown version or shape, or the compiler is missing.
    """
    version, _, shape = topology.partition(":")
    if version not in CHIPS:
        raise ConfigError(
            f"--topology {topology}; its version must be one of {', '.join(CHIPS)}, as in v5p:4x4x4 or h100:8."
        )
    chip = CHIPS[version]
    return chip, _gpus(topology, chip, shape) if isinstance(chip, Gpu) else _tpus(topology)


def _tpus(topology: str) -> list:
    # Without these settings, libtpu looks for a TPU.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin may raise any exception
        raise ConfigError(
            f"--topology {topology} cannot be described ({error!s:.300}); it needs libtpu, the TPU's compiler: "
            "pip install -e '.[tpu]', and a shape such as v5e:4x4 or v5p:4x4x4."
        ) from error


def _gpus(topology: str, gpu: Gpu, number: str) -> list:
    if not number.isdigit() or not 1 <= int(number) <= 8:
        raise ConfigError(f"--topology {topology}; a host has 1 to 8 GPUs, as in h100:8. Correct the number.")
    if not shutil.which("ptxas"):
        raise ConfigError(f"--topology {topology} needs ptxas, of the CUDA 13 toolkit, on the PATH. Install it.")
    target = _TARGET.format(
        gpu=gpu,
        extension="ACCELERATED_FEATURES" if gpu.capability >= (9, 0) else "NONE",
        bandwidth=int(gpu.bandwidth),
        block=gpu.shared - 1024,
    )
    try:
        return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{number}", target_config=target).devices
    except Exception as error:  # the plugin may raise any exception
        raise ConfigError(
            f"--topology {topology} cannot be described ({error!s:.300}); it needs the compiler for GPUs: "
            "pip install -e '.[gpu-aot]'."
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
    microbatch = mesh.microbatch_trunks
    if microbatch > 0:
        microbatch = max(microbatch, fitted.trunk_shards)
    config = replace(config, mesh=replace(fitted, microbatch_trunks=microbatch))
    config.validate()
    return config


def larger_topologies(topology: str) -> Iterator[str]:
    """Yield the next four topologies of a TPU version, or those of up to eight GPUs.

    Each doubles the shortest side, and so the number of chips.
    """
    version, _, sides = topology.partition(":")
    sizes = [int(n) for n in sides.split("x")]
    for _ in range(4):
        sizes[sizes.index(min(sizes))] *= 2
        if CHIPS[version].platform == "gpu" and sizes[0] > 8:
            return
        yield f"{version}:{'x'.join(map(str, sorted(sizes)))}"
