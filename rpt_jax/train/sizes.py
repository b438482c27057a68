"""Sizes that a run on GPUs or TPUs chooses by their memory, and keeps."""

import json
from dataclasses import replace

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.parallel.distributed import gathered
from rpt_jax.planning.fitting import fit_sizes, sizes_of, with_sizes
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run
from rpt_jax.train.run_directory import read_json

_GIB = 2**30


def fitted(run: Run) -> Run:
    """Return the run with the microbatch and slots that -1 leaves to the machine; unchanged on CPUs.

    A start on the same mesh, with as much memory, uses the sizes of the last one (sizes.json), because gradients of
    another microbatch are summed in another order. A run that is only read uses them too, and chooses none.

    Raises:
        ConfigError: the smallest sizes need more memory.
    """
    memory = device_memory(run.mesh) if -1 in sizes_of(run.config).values() else None
    if memory is None:
        return run
    path, key = run.directory.path / "sizes.json", _key(run.config)
    kept = read_json(path) if path.exists() else None
    if kept is not None and kept["key"] == key and kept["memory_gib"] <= memory / _GIB:
        return replace(run, config=with_sizes(run.config, kept["sizes"]))
    if run.directory.is_read_only:
        return run
    config = fit_sizes(run.config, run.mesh, len(run.template.tail), memory, console.print)
    run.directory.keep("sizes", {"key": key, "memory_gib": memory / _GIB, "sizes": sizes_of(config)})
    return replace(run, config=config)


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
