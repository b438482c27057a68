"""Settings that -1 leaves to the machine: the largest microbatch and the most slots that a device's memory holds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.planning.estimate import MARGIN, estimate_rollout, estimate_update
from rpt_jax.planning.programs import Program, compile_rollout, compile_update, make_compiler

# An estimate of at most this share of the memory needs no compiled program to confirm it.
_SURE = 0.5
# Share of the memory that compiled programs may take.
_FULL = 0.95
Note = Callable[[str], None]


def fit_sizes(
    config: Config, mesh: Mesh | None, num_tail: int, memory: float, note: Note, learned_width: int = 0
) -> Config:
    """Return the config with `mesh.microbatch_trunks` and `rollout.slots_per_trunk` chosen, if they are -1.

    The largest value that an estimate allows is compiled, unless it needs little. While the compiled programs need more
    than there is, the next smaller value is compiled.

    Args:
        config: with everything else resolved.
        mesh: to compile for; None: trust the estimate.
        num_tail: tokens of the prompt after the text.
        memory: bytes of each device.
        note: called with each choice and its reason, and with each program before it is compiled.
        learned_width: length of update rows that end with a reference to learn; 0: rows are completions.
    Raises:
        ConfigError: the smallest value needs more memory.
    """
    if config.mesh.microbatch_trunks == -1:
        options = {n: replace(config, mesh=replace(config.mesh, microbatch_trunks=n)) for n in _microbatches(config)}
        compiled = partial(compile_update, learned_width=learned_width) if learned_width else compile_update
        size = _first_that_fits("mesh.microbatch_trunks", options, compiled, mesh, num_tail, memory, note)
        config = options[size]
    if config.rollout.slots_per_trunk == -1:
        # An evaluation may keep more stems than a step.
        trunks = max(config.rollout.num_trunks, config.eval.batch_trunks)
        options = {
            n: replace(config, rollout=replace(config.rollout, num_trunks=trunks, slots_per_trunk=n))
            for n in _slots(config)
        }
        size = _first_that_fits("rollout.slots_per_trunk", options, compile_rollout, mesh, num_tail, memory, note)
        config = replace(config, rollout=replace(config.rollout, slots_per_trunk=size))
    return config


def sizes_of(config: Config) -> dict[str, int]:
    """Return the two settings."""
    return {"microbatch_trunks": config.mesh.microbatch_trunks, "slots_per_trunk": config.rollout.slots_per_trunk}


def with_sizes(config: Config, sizes: dict[str, int]) -> Config:
    """Return the config with these sizes where it leaves them open."""
    mesh, rollout = config.mesh, config.rollout
    if mesh.microbatch_trunks == -1:
        mesh = replace(mesh, microbatch_trunks=sizes["microbatch_trunks"])
    if rollout.slots_per_trunk == -1:
        rollout = replace(rollout, slots_per_trunk=sizes["slots_per_trunk"])
    return replace(config, mesh=mesh, rollout=rollout)


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
    name: str,
    options: dict[int, Config],
    compiled: Callable[..., Iterator[Program]],
    mesh: Mesh | None,
    num_tail: int,
    memory: float,
    note: Note,
) -> int:
    """Return the first option that fits, and note it."""
    gib = 2**30
    estimate = estimate_rollout if compiled is compile_rollout else estimate_update
    likely = [n for n, c in options.items() if estimate(c, num_tail) <= MARGIN * memory] or list(options)[-1:]
    for n in likely:
        needed = estimate(options[n], num_tail)
        if mesh is None or needed <= _SURE * memory:
            note(f"{name} is {n}: by an estimate it needs {needed / gib:.1f} of {memory / gib:.1f} GiB")
            return n
        needed = 0
        compiler = make_compiler(options[n], mesh, partial(_note_part, note, f"{name} may be {n}"), reads_text=False)
        for program in compiled(options[n], compiler, num_tail):
            needed = max(needed, program.peak + program.resident)
            if not program.fits or needed > _FULL * memory:
                break
        else:
            note(f"{name} is {n}: it needs {needed / gib:.1f} of {memory / gib:.1f} GiB")
            return n
    raise ConfigError(
        f"{name}={n}, the smallest, needs {needed / gib:.1f} GiB; a device has {memory / gib:.1f} GiB. Use more "
        "devices (--mesh.fsdp), adapters of a bfloat16 policy (--lora.rank, --policy.param-dtype), or lower "
        "--rollout.max-completion-tokens, --data.trunk-length or --rollout.num-trunks."
    )


def _note_part(note: Note, guess: str, part: str) -> None:
    note(f"{guess}: compiling {part}")
