"""What a run needs on TPUs or GPUs, found by compiling its real programs on a machine without them.

The compiler reports memory; traffic and kernels are read from the compiled programs (`programs.py`). Arithmetic and the
least traffic are counted by hand (`arithmetic.py`). A roofline of the chip's published rates shows what limits a step.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import jax

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoding
from rpt_jax.models.attention import default_dtype
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning.arithmetic import count_work
from rpt_jax.planning.fitting import fit_sizes
from rpt_jax.planning.programs import Program, abstract_state, bytes_per_chip, compile_programs
from rpt_jax.planning.topologies import Chip, describe_topology

# Share of a chip's memory that programs may use. JAX takes three quarters of a GPU's, unless XLA_CLIENT_MEM_FRACTION is
# set.
_AVAILABLE = {"tpu": 0.97, "gpu": 0.75}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources of a step. Bytes and FLOPs are per chip; seconds are a roofline, without latency or idle time."""

    topology: str
    """Name of the topology, such as v5p:4x4x4 or h100:8."""
    chip: Chip
    """Published rates of its chips."""
    parameters: int
    """Number of the model's parameters."""
    sizes: dict[str, int]
    """Trunks per pass of the update, and slots per trunk."""
    memory: dict[str, int]
    """Bytes of parameters, optimizer state and caches, and for each program its peak plus everything else on the
    chip."""
    fits: bool
    """Every program compiled, and fits next to everything else into the memory that JAX may use: 97% on TPUs, 75% on
    GPUs."""
    programs: list[Program]
    """The compiled programs, in the order of a step."""
    phases: list[dict]
    """Per phase: FLOPs, bytes, traffic, least traffic, the seconds that arithmetic, memory and links would each take
    alone, and which of them takes longest."""
    seconds: float
    """Seconds of a step: the sum over phases of the longest of the three."""

    def to_json(self) -> dict:
        """Return the plan as a JSON-able dict."""
        return asdict(self)


# Programs that each phase runs.
_PHASES = {"prefill": ("gather weights", "prefill"), "decode": ("decode",), "update": ("gradients", "optimizer")}


def make_plan(config: Config, topology: str, num_tail: int, note: Callable[[str], None] = lambda _: None) -> Plan:
    """Compile the config's programs for a topology and add up what they need.

    Args:
        config: with a mesh that fits the topology.
        topology: such as v5p:4x4x4.
        num_tail: tokens of the prompt after the text.
        note: called with each choice of `fitting.py`, and with each program before it is compiled.
    Raises:
        ConfigError: see `describe_topology` and `make_mesh`; or an evaluation would need more than a step.
    """
    chip, devices = describe_topology(topology)
    config = on_chip(config, chip, num_tail, note)
    _check_evaluation(config)
    mesh = make_mesh(config.mesh, devices)
    programs = list(compile_programs(config, mesh, num_tail, lambda name: note(f"compiling: {name}")))
    state, frozen = abstract_state(config, mesh)
    caches = jax.eval_shape(partial(decoding.empty_cache, config.model, *_cache_shape(config)))
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
    memory = {
        "parameters": bytes_per_chip((state.params, frozen)),
        "optimizer": bytes_per_chip(state.opt_state),
        "caches": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) // shards,
    }
    memory |= {f"in {p.name}": p.peak + p.resident for p in programs}
    complete = len(programs) == sum(map(len, _PHASES.values()))
    fits = complete and all(p.fits and p.peak + p.resident <= _AVAILABLE[chip.platform] * chip.memory for p in programs)
    phases = []
    for work in count_work(config, num_tail):
        runs = [p for p in programs if p.name in _PHASES[work.name]]
        traffic = sum(p.runs * t.bytes for p in runs for t in p.traffic)
        seconds = {
            "arithmetic": work.flops / chip.flops,
            "memory": work.bytes / chip.bandwidth,
            "links": traffic / chip.links,
        }
        limit = max(seconds, key=seconds.get)
        phases.append(asdict(work) | {"traffic": traffic, "seconds": seconds, "limited_by": limit})
    return Plan(
        topology=topology,
        chip=chip,
        parameters=sum(x.size for x in jax.tree.leaves(state.params if frozen is None else frozen.params)),
        sizes={
            "microbatch_trunks": config.microbatch_trunks,
            "slots_per_trunk": _cache_shape(config)[1],
        },
        memory=memory,
        fits=fits,
        programs=programs,
        phases=phases,
        seconds=sum(max(p["seconds"].values()) for p in phases),
    )


def on_chip(config: Config, chip: Chip, num_tail: int, note: Callable[[str], None]) -> Config:
    """Return the config with the platform, dtype and sizes that a run on this chip takes.

    Args:
        config: with a mesh that fits the topology.
        chip: of the topology.
        num_tail: tokens of the prompt after the text.
        note: called with each choice of `fitting.py`.
    Raises:
        ConfigError: the model has no vocabulary, because nothing names its shape.
    """
    if not config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size=0; a plan needs the model's shape. Set --policy.path, or --model.vocab-size."
        )
    model = replace(config.model, platform=chip.platform)
    config = replace(config, model=replace(model, activation_dtype=default_dtype(model)))
    return fit_sizes(config, None, num_tail, _AVAILABLE[chip.platform] * chip.memory, note)


def _check_evaluation(config: Config) -> None:
    """Raise ConfigError if an evaluation keeps more stems or rows than a step: only a step's programs are compiled."""
    r, e = config.rollout, config.eval
    R = r.prompts_per_trunk * r.group_size
    k = r.prompts_per_trunk * e.num_samples
    rows, allowed = (n * min(r.slots_per_trunk or m, m) for n, m in ((e.batch_trunks, k), (r.num_trunks, R)))
    if e.batch_trunks > r.num_trunks or rows > allowed:
        most = min(r.num_trunks, allowed * e.batch_trunks // rows) // config.mesh.trunk_shards
        raise ConfigError(
            f"eval.batch_trunks={e.batch_trunks} with eval.num_samples={e.num_samples} keeps {rows} rollouts of "
            f"{e.batch_trunks} trunks at once; memory is planned for a step's {allowed} of {r.num_trunks} trunks. Set "
            f"--eval.batch-trunks {max(1, most) * config.mesh.trunk_shards}, or lower --eval.num-samples."
        )


def _cache_shape(config: Config) -> tuple[int, int, int]:
    r = config.rollout
    R = r.prompts_per_trunk * r.group_size
    return r.num_trunks, min(r.slots_per_trunk or R, R), r.max_completion_tokens
