"""Several processes of one run: how they start, what they agree on, and how a host reads arrays that lie on all.

Every process runs the same program and must come to the same calls in the same order. Process 0 writes the files, on a
file system that all share.
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
    """Have this host's CPU, if that is what JAX will run on, be as many devices as the mesh asks for: a core each.

    Nothing is done where JAX's backend has started, cores are fewer, processes are several, or XLA_FLAGS has a number.
    """
    is_alone = not (config.coordinator or config.join or _num_launched() > 1)
    is_told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_alone and not is_told and 1 < mesh.num_devices <= (os.cpu_count() or 1):
        # Raised where the backend has started; `make_mesh` then says what is missing.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", mesh.num_devices)


def start(config: DistributedConfig) -> None:
    """Join the run's other processes, before anything else starts JAX's backend; alone there is nothing to join.

    Raises:
        ConfigError: the others did not come, or a slice of several hosts is used by processes that do not join.
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
                f"the processes of this run could not be joined ({error}); each needs the same coordinator and number, "
                "and a number of its own. Check --distributed.coordinator, or the launcher."
            ) from error
    elif jax.process_count() > 1:
        raise ConfigError(
            f"this is one of {jax.process_count()} hosts of a slice; they must join. Start the same command on each, "
            "with --distributed.join."
        )


def _num_launched() -> int:
    """Processes that a scheduler says it has started as one job step."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def is_main() -> bool:
    """This process writes the run's files."""
    return jax.process_index() == 0


@contextmanager
def main_first(what: str) -> Iterator[None]:
    """Process 0 does it first, the others after it: they find the files that it has written."""
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
    """This process stands still because process 0 works alone; heartbeats tell whether that lives."""
    return _waiting.is_set()


def from_main(number: int) -> int:
    """Process 0's number, on all."""
    if jax.process_count() == 1:
        return number
    with _waiting_for_main():
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_process(flag: bool) -> bool:
    """Whether any process says so. Waits for all of them, and for what their devices are at."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def gathered(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: each process's array of one shape, on all."""
    return values[None] if jax.process_count() == 1 else multihost_utils.process_allgather(values)


def to_host(tree: Any) -> Any:
    """Whole numpy arrays on every process, of arrays that may lie on the devices of all."""

    def one(x):
        is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if is_here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(one, tree))
