"""Sizes that a run on GPUs or TPUs chooses by their memory, and keeps."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.distributed import gathered
from rpt_jax.planning.estimate import estimate_rollout, estimate_update
from rpt_jax.planning.fitting import fit_sizes, sizes_of, with_sizes
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run
from rpt_jax.train.run_directory import read_json

_GIB = 2**30
# An estimate may be somewhat too high; beyond this share of the memory, the sizes do not fit for sure.
_CANNOT_FIT = 1.25


def fitted(run: Run) -> Run:
    """Return the run with the microbatch and slots that -1 leaves to the machine; unchanged on CPUs.

    A start on the same mesh, with as much memory, uses the sizes of the last one (sizes.json), because gradients of
    another microbatch are summed in another order. A run that is only read uses them too, and chooses none.

    Raises:
        ConfigError: the smallest sizes, or those that the config sets, need more memory.
    """
    if run.directory.is_read_only and -1 not in sizes_of(run.config).values():
        return run
    memory = device_memory(run.mesh)
    if memory is None or -1 not in sizes_of(run.config).values():
        if memory is None:
            of_host = np.array([host_memory() / len(run.mesh.local_devices) / _GIB], np.float32)
            memory = float(gathered(of_host).min()) * _GIB
        check_memory(run.config, run.template.width, memory)
        return run
    path, key = run.directory.path / "sizes.json", _key(run.config)
    kept = read_json(path) if path.exists() else None
    if kept is not None and kept["key"] == key and kept["memory_gib"] <= memory / _GIB:
        return replace(run, config=with_sizes(run.config, kept["sizes"]))
    if run.directory.is_read_only:
        return run
    config = fit_sizes(run.config, run.mesh, run.template.width, memory, console.print, run.learned_width)
    run.directory.keep("sizes", {"key": key, "memory_gib": memory / _GIB, "sizes": sizes_of(config)})
    return replace(run, config=config)


def check_memory(config: Config, num_tail: int, memory: float) -> None:
    """Refuse sizes that no memory of this size can hold.

    Args:
        config: with its sizes resolved.
        num_tail: tokens of the prompt after the text.
        memory: bytes of each device.
    Raises:
        ConfigError: names the settings to lower.
    """
    rollout = config.rollout
    rollouts = f"{rollout.num_trunks} trunks x {rollout.prompts_per_trunk} prompts x {rollout.group_size} rollouts"
    if -1 in sizes_of(config).values():
        config = with_sizes(config, {"microbatch_trunks": config.microbatch_trunks, "slots_per_trunk": 0})
    for what, estimate, change in (
        (f"sampling {rollouts}", estimate_rollout, "--rollout.slots-per-trunk, --rollout.num-trunks or "
         "--rollout.max-completion-tokens"),
        (f"an update of {config.microbatch_trunks} trunks per pass", estimate_update, "--mesh.microbatch-trunks"),
    ):  # fmt: skip
        needed = estimate(config, num_tail)
        if needed > _CANNOT_FIT * memory:
            raise ConfigError(
                f"{what} needs about {needed / _GIB:.1f} GiB by an estimate; {memory / _GIB:.1f} GiB are available to "
                f"each device. Lower {change}."
            )


def host_memory() -> float:
    """Return the bytes of memory that this process may still take; infinity where that is unknown."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        found.append(1024.0 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError, KeyError):
        # The limit of a container.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Pages of files that nobody uses are given back on demand.
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(float(limit - used + int(kept["inactive_file"])))
    return min(found)


def device_memory(mesh: Mesh) -> float | None:
    """Return the bytes that JAX may use of each device, the least of all hosts; None if unknown, as on CPUs."""
    stats = mesh.local_devices[0].memory_stats() or {}
    # In GiB, because JAX gathers 32-bit numbers.
    least = float(gathered(np.array([stats.get("bytes_limit", 0) / _GIB], np.float32)).min())
    return least * _GIB or None


def _key(config: Config) -> dict:
    """Return what the sizes depend on besides the memory: the mesh, the model and the batch."""
    mesh, rollout = (
        vars(section) | dict.fromkeys(set(sizes_of(config)) & set(vars(section)), -1)
        for section in (config.mesh, config.rollout)
    )
    shape = {"mesh": mesh, "rollout": rollout, "model": vars(config.model), "eval_trunks": config.eval.batch_trunks}
    return json.loads(json.dumps(shape, default=vars))
