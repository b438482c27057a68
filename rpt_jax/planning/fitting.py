"""Settings that -1 leaves to the machine: the largest microbatch and the most slots that its memory holds."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.distributed import gathered
from rpt_jax.planning.estimate import MARGIN, estimate_rollout, estimate_update
from rpt_jax.planning.programs import Program, compile_rollout, compile_update

# Most trunks per pass on a CPU, whose memory has no fixed limit: more do not make it faster.
_ON_CPU = 2
# An estimate of at most this share of the memory needs no compiled program to confirm it.
_SURE = 0.5
Note = Callable[[str], None]


def fit_microbatch(config: Config, mesh: Mesh | None, num_tail: int, memory: float | None, note: Note) -> Config:
    """Return the config with `mesh.microbatch_trunks` chosen, if it is -1: on CPUs two, else as many as fit.

    The largest value that an estimate allows is compiled, unless it needs little. While the compiled programs need more
    than there is, the next smaller value is compiled.

    Args:
        config: with everything else resolved.
        mesh: to compile for; None: trust the estimate.
        num_tail: tokens of the prompt after the text.
        memory: bytes of each device; None: no limit, as on CPUs.
        note: called with the choice and its reason.
    Raises:
        ConfigError: the smallest value needs more memory.
    """
    if config.mesh.microbatch_trunks != -1:
        return config
    options = [replace(config, mesh=replace(config.mesh, microbatch_trunks=n)) for n in _microbatches(config)]
    if memory is None:
        options = [c for c in options if c.mesh.microbatch_trunks <= _ON_CPU] or options[-1:]
    config, reason = _first_that_fits(options, estimate_update, compile_update, mesh, num_tail, memory)
    note(f"mesh.microbatch_trunks is {config.mesh.microbatch_trunks}: {reason}")
    return config


def fit_slots(config: Config, mesh: Mesh | None, num_tail: int, memory: float | None, note: Note) -> Config:
    """Return the config with `rollout.slots_per_trunk` chosen, if it is -1: on CPUs all, else as many as fit.

    Method, arguments and errors are those of `fit_microbatch`.
    """
    if config.rollout.slots_per_trunk != -1:
        return config
    options = [replace(config, rollout=replace(config.rollout, slots_per_trunk=n)) for n in _slots(config)]
    config, reason = _first_that_fits(options, estimate_rollout, compile_rollout, mesh, num_tail, memory)
    note(f"rollout.slots_per_trunk is {config.rollout.slots_per_trunk}: {reason}")
    return config


def device_memory(mesh: Mesh) -> float | None:
    """Return the bytes that JAX may use of each device, the least of all hosts; None on CPUs."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return None
    return float(gathered(np.array([device.memory_stats()["bytes_limit"]], np.int64)).min())


def _microbatches(config: Config) -> list[int]:
    """Return the possible numbers of trunks per pass, the largest first."""
    trunks, shards = config.rollout.num_trunks // config.loss.num_minibatches, config.mesh.trunk_shards
    return [n for n in range(trunks, 0, -1) if trunks % n == 0 and n % shards == 0]


def _slots(config: Config) -> Iterator[int]:
    """Yield the possible numbers of slots: all rollouts of a trunk, then halves of it."""
    slots = config.rollout.prompts_per_trunk * config.rollout.group_size
    yield slots
    while slots > 1:
        slots = -(-slots // 2)
        yield slots


def _first_that_fits(
    options: list[Config],
    estimate: Callable[[Config, int], float],
    compiled: Callable[[Config, Mesh, int], Iterator[Program]],
    mesh: Mesh | None,
    num_tail: int,
    memory: float | None,
) -> tuple[Config, str]:
    """Return the first option whose compiled programs fit, and the reason."""
    if memory is None:
        return options[0], "the default of CPUs"
    gib = 2**30
    likely = [option for option in options if estimate(option, num_tail) <= MARGIN * memory] or options[-1:]
    about = estimate(likely[0], num_tail)
    if mesh is None or about <= _SURE * memory:
        return likely[0], f"needs about {about / gib:.1f} of {memory / gib:.1f} GiB, by an estimate"
    for option in likely:
        needed = 0
        for program in compiled(option, mesh, num_tail):
            needed = max(needed, program.peak + program.resident)
            if not program.fits or needed > memory:
                break
        else:
            return option, f"needs {needed / gib:.1f} of {memory / gib:.1f} GiB"
    raise ConfigError(
        f"the smallest passes need {needed / gib:.1f} GiB; a device has {memory / gib:.1f} GiB. Use more devices "
        "(--mesh.fsdp), --lora.rank with --policy.param-dtype bfloat16, or a lower --rollout.max-completion-tokens, "
        "--data.trunk-length or --rollout.num-trunks."
    )
