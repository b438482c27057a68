"""Several processes of one run: how they start, how they agree, and how a host reads arrays that span all of them.

Every process runs the same program and must make the same calls in the same order. Process 0 writes the files, on a
file system that all processes share.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpt_jax.config import DistributedConfig, MeshConfig
from rpt_jax.errors import ConfigError


def split_cpu(mesh: MeshConfig, config: DistributedConfig) -> None:
    """Split this host's CPU into as many devices as the mesh needs, one core each, if JAX will run on it.

    This does nothing if JAX's backend has started, there are too few cores or several processes, or XLA_FLAGS sets a
    number of devices.
    """
    is_alone = not (config.coordinator or config.join or _num_launched() > 1)
    is_told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_alone and not is_told and 1 < mesh.num_devices <= (os.cpu_count() or 1):
        # Raised if the backend has started; `make_mesh` then reports the missing devices.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", mesh.num_devices)


def start(config: DistributedConfig) -> None:
    """Join the other processes of the run, before anything else starts JAX's backend.

    Raises:
        ConfigError: the other processes did not join, or a process of a multi-host slice is not told to join.
    """
    if jax.distributed.is_initialized():
        return
    places: dict[str, Any] = {}
    if config.coordinator:
        places = dict(
            coordinator_address=config.coordinator,
            num_processes=config.num_processes,
            process_id=config.process_id,
        )
    if places or config.join or _num_launched() > 1:
        try:
            jax.distributed.initialize(**places, heartbeat_timeout_seconds=config.heartbeat_seconds)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the processes of this run could not join ({error}); they need the same coordinator and number of "
                "processes, and different ids. Check --distributed.coordinator, or the launcher."
            ) from error
    elif jax.process_count() > 1:
        raise ConfigError(
            f"this is one of {jax.process_count()} hosts of a slice; they must join. Start the same command on each, "
            "with --distributed.join."
        )


def _num_launched() -> int:
    """Return the number of processes in this job step, as the scheduler reports it."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def is_main() -> bool:
    """Return whether this process writes the run's files."""
    return jax.process_index() == 0


@contextmanager
def main_first(what: str) -> Iterator[None]:
    """Run the body on process 0 first, then on the others, which find the files that it has written."""
    if jax.process_count() == 1:
        yield
        return
    if not is_main():
        with _waiting_for_main():
            multihost_utils.sync_global_devices(what)
    yield
    if is_main():
        multihost_utils.sync_global_devices(what)


_waiting = threading.Event()


@contextmanager
def _waiting_for_main() -> Iterator[None]:
    _waiting.set()
    try:
        yield
    finally:
        _waiting.clear()


def waits_for_main() -> bool:
    """Return whether this process is waiting while process 0 works; heartbeats show whether that one is alive."""
    return _waiting.is_set()


def from_main(number: int) -> int:
    """Return process 0's number on all processes."""
    if jax.process_count() == 1:
        return number
    with _waiting_for_main():
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_process(flag: bool) -> bool:
    """Return whether the flag is set on any process; waits for all processes and their devices."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def gathered(values: np.ndarray) -> np.ndarray:
    """Stack the equally shaped arrays of all processes: [processes, ...], on each of them."""
    return values[None] if jax.process_count() == 1 else multihost_utils.process_allgather(values)


def to_host(tree: Any) -> Any:
    """Return whole numpy arrays on every process, from arrays that may span the devices of all."""

    def one(x):
        is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if is_here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(one, tree))
