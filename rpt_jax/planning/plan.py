"""What a run needs on a TPU slice, found by compiling its real programs for it on a machine without one.

The rollout's and the update's programs are compiled ahead of time at their largest shapes. Memory is the compiler's own
account, traffic is read from the compiled programs; arithmetic and the least traffic are counted by hand beside them,
and a roofline of the chip's published rates says what a step is limited by.
"""

import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder, lora
from rpt_jax.models.lora import Frozen
from rpt_jax.parallel.mesh import make_mesh, on_mesh_of, replicated, spec_without, trunk_sharding
from rpt_jax.planning.traffic import Traffic, read_traffic
from rpt_jax.rl import update
from rpt_jax.rollout import engine
from rpt_jax.types import TaskBatch, TrainBatch, TrainState


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
    microbatch = max(config.mesh.microbatch_trunks, fitted.trunk_shards) if config.mesh.microbatch_trunks else 0
    config = replace(config, mesh=fitted, loss=replace(config.loss, microbatch_trunks=microbatch))
    config.validate()
    return config


# --- Shapes -------------------------------------------------------------------------------------------------------


def _shapes(tree, sharding):
    """Shapes of arrays, all lying in one way or each in its own."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(_shapes, tree, sharding)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def abstract_tasks(config: Config, num_tail: int) -> TaskBatch:
    """Shapes of a rollout batch."""
    r = config.rollout
    U, M, G, L, Y = r.num_trunks, r.prompts_per_trunk, r.group_size, config.data.trunk_length, 64

    def i32(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32)

    return TaskBatch(
        trunk_tokens=i32(U, L),
        trunk_lengths=i32(U),
        cuts=i32(U, M),
        position_mask=jax.ShapeDtypeStruct((U, M), bool),
        tail_tokens=i32(U, M, num_tail),
        tail_lengths=i32(U, M),
        continuation_bytes=jax.ShapeDtypeStruct((U, M, Y), np.uint8),
        boundary_mask=jax.ShapeDtypeStruct((U, M, Y), bool),
        target_tokens=i32(U, M),
        row_ids=i32(U, M, G),
        position_ids=i32(U, M),
    )


def abstract_microbatch(config: Config, tasks: TaskBatch) -> TrainBatch:
    """Shapes of the largest microbatch: every row teaches, and all are of full length."""
    U = config.mesh.microbatch_trunks or config.rollout.num_trunks // config.loss.num_minibatches
    R, C = config.rollout.prompts_per_trunk * config.rollout.group_size, config.rollout.max_completion_tokens
    tasks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((U, *x.shape[1:]), x.dtype), tasks)
    f32, mask = jax.ShapeDtypeStruct((U, R, C), np.float32), jax.ShapeDtypeStruct((U, R, C), bool)
    tokens = jax.ShapeDtypeStruct((U, R, C), np.int32)
    return TrainBatch(
        sequences=jax.eval_shape(engine.to_sequences, tasks, tokens, mask),
        token_weights=f32,
        trunk_weights=jax.ShapeDtypeStruct((U, config.data.trunk_length), np.float32),
        advantages=f32,
        sampler_logprobs=f32,
        old_logprobs=f32 if config.loss.num_minibatches > 1 else None,
        ref_logprobs=f32 if config.loss.kl_coef else None,
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[TrainState, Frozen | None]:
    """Shapes of the train state, and of what its adapters sit on."""
    params = decoder.abstract_params(config.model, mesh)
    # A warm start's adapters are merged in float32.
    merged = config.lora.targets if config.lora.rank and config.supervised.num_steps else ()

    def held(path, p):
        kind = np.float32 if path[-1].key in merged else np.dtype(config.policy.param_dtype)
        return jax.ShapeDtypeStruct(p.shape, kind, sharding=p.sharding)

    params = jax.tree_util.tree_map_with_path(held, params)
    trained, frozen = params, None
    if config.lora.rank:
        trained = lora.abstract_adapters(config.model, config.lora, mesh)
        frozen = Frozen(params=params, scale=_shapes(jax.ShapeDtypeStruct((), np.float32), replicated(mesh)))
    optimizer = update.make_optimizer(config.optimizer, config.num_updates)
    moments = jax.eval_shape(optimizer.init, trained)
    moments = _shapes(moments, update.state_shardings(moments, trained, mesh))
    number = _shapes(jax.ShapeDtypeStruct((), np.int32), replicated(mesh))
    return TrainState(step=number, params=trained, opt_state=moments, skipped=number), frozen


def bytes_per_chip(tree) -> int:
    """Of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- Programs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program, as each chip runs it."""

    name: str
    runs: float
    """Times that it is run in a step."""
    peak: int
    """Bytes of its arguments, of results in buffers of their own, and of what it needs on the way."""
    temporary: int
    """Bytes of the last."""
    resident: int
    """Bytes of what a run keeps on the chip meanwhile and this program does not see."""
    fits: bool
    """The compiler found room for it."""
    compile_seconds: float
    traffic: list[Traffic]
    """Of one run."""


def compile_programs(
    config: Config, mesh: Mesh, num_tail: int, note: Callable[[str], None] = lambda _: None
) -> Iterator[Program]:
    """The programs of a step at their largest: every rollout of full length, in one window as wide as that.

    Passes that only score (old or reference log-probabilities, dense rewards) are left out: they need less.

    Args:
        num_tail: tokens of the prompt behind the text.
        note: told the name of each before it is compiled.
    """
    state, frozen = abstract_state(config, mesh)
    params = _joined(frozen, state.params)
    on_trunks, on_all = partial(_shapes, sharding=trunk_sharding(mesh)), partial(_shapes, sharding=replicated(mesh))
    tasks, rollout = abstract_tasks(config, num_tail), config.rollout
    C, R = rollout.max_completion_tokens, rollout.prompts_per_trunk * rollout.group_size
    slots = min(rollout.slots_per_trunk or R, R)
    law = engine.Law(
        max_completion_tokens=C,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        eos_id=0,
        vocab_size=config.model.vocab_size,
    )
    key = on_all(jax.eval_shape(lambda: jax.random.key(0)))
    # The policy that RL started from stays: the control begins with it, and a KL term refers to it.
    kept = bytes_per_chip((state, frozen) if frozen else (state, state.params))

    def compiled(name: str, runs: float, resident: int, function, *args, trips: float = 1.0, **options):
        """(the program, its results' shapes)."""
        note(name)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as dump, on_mesh_of(params):
            lowered = function.lower(*args, **options)
            try:
                # The text comes from a dump: what libtpu writes is newer than jaxlib's own reader.
                program = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
            except jax.errors.JaxRuntimeError as error:
                if not (needed := re.search(r"(?:temporaries \(|Used )([\d.]+)([KMG])", str(error))):
                    raise
                peak = int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]])
                memory, traffic = None, []
            else:
                memory = program.memory_analysis()
                (text,) = Path(dump).glob(f"*.jit_{function.__name__}.*after_optimizations.txt")
                traffic = read_traffic(text.read_text(), dict(mesh.shape), unknown_trips=trips)
        if memory is not None:
            peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        found = Program(
            name=name,
            runs=runs,
            peak=peak,
            temporary=memory.temp_size_in_bytes if memory is not None else 0,
            resident=resident,
            fits=memory is not None,
            compile_seconds=time.monotonic() - begin,
            traffic=traffic,
        )
        return found, None if memory is None else _shapes(lowered.out_info, program.output_shardings)

    not_params = kept - bytes_per_chip(params)
    specs = tuple(spec_without(p, "fsdp") for p in jax.tree.leaves(params))
    program, weights = compiled(
        "gather weights", 1, not_params, decoder.lay_out_for_decoding, config.model, params, specs=specs
    )
    yield program
    if weights is None:
        return
    program, started = compiled(
        "prefill", 1, not_params + bytes_per_chip(weights), engine.start, config.model, law, params, on_trunks(tasks),
        key, slots=slots, window=C,
    )  # fmt: skip
    yield program
    if started is None:
        return
    # While caches are widened for the last time, their first half is still there.
    halves = bytes_per_chip(started[1].cache) // 2
    program, _ = compiled(
        "decode", R / slots, kept + halves, engine.run_segment, config.model, law, weights, *started,
        jax.ShapeDtypeStruct((), np.int32), trips=C,
    )  # fmt: skip
    yield program
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), state.params)
    microbatch = on_trunks(abstract_microbatch(config, tasks))
    microbatches = rollout.num_trunks / microbatch.token_weights.shape[0]
    program, results = compiled(
        "gradients", microbatches, kept - bytes_per_chip((state.params, frozen)),
        update.add_gradients, gradients, state.params, frozen, microbatch,
        loss_fn=update.policy_loss_fn(config.model, config.loss, rollout.temperature),
        shardings=tuple(p.sharding for p in jax.tree.leaves(state.params)),
    )  # fmt: skip
    yield program
    if results is None:
        return
    program, _ = compiled(
        "optimizer", config.loss.num_minibatches, kept - bytes_per_chip(state), update.apply_gradients, state,
        gradients, results[1], optimizer=update.make_optimizer(config.optimizer, config.num_updates),
    )  # fmt: skip
    yield program


def _joined(frozen: Frozen | None, trained):
    """Shapes of the policy's parameters."""
    if frozen is None:
        return trained
    return frozen.params | trained | {"layers": frozen.params["layers"] | trained["layers"]}


# --- Arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one phase of a step asks of each chip; every rollout of full length."""

    name: str
    flops: float
    bytes: float
    """Read and written in the chip's memory: weights, caches and what is kept for the backward pass, each once."""
    least_traffic: float
    """Bytes that this layout of parameters and activations has to send, however it is scheduled."""


def count_work(config: Config, num_tail: int) -> list[Work]:
    """The phases of a step, counted by hand: products of the matrices, attention, and the head."""
    m, r, mesh = config.model, config.rollout, config.mesh
    U, M, G, L, E = r.num_trunks, r.prompts_per_trunk, r.group_size, config.data.trunk_length, num_tail
    C, B, chips = r.max_completion_tokens, U * M * G, mesh.num_devices
    D, heads, size = m.width, m.num_heads * m.head_size, 2 if m.activation_dtype == "bfloat16" else 4
    layer = D * (2 * heads + 2 * m.num_kv_heads * m.head_size) + 3 * D * m.mlp_width
    head, num = m.vocab_size * D, m.num_layers
    kv = 2 * num * m.num_kv_heads * m.head_size * size  # bytes of a token
    stems, completions = U * (L + M * E), B * C
    stem_pairs = U * (L * L / 2 + M * E * (L + E / 2))
    pairs = B * C * (L + E + C / 2)
    tensor_share, fsdp_share = (mesh.tensor - 1) / mesh.tensor, (mesh.fsdp - 1) / mesh.fsdp
    weights = (num * layer + head * (1 if m.tie_embeddings else 2)) * size
    slots = min(r.slots_per_trunk or M * G, M * G)
    waves = M * G / slots
    # Windows double: the mean width while a row grows to C.
    widths, width, fed = 0.0, 64, 0
    while fed < C:
        width = min(width, C)
        widths, fed, width = widths + (width - fed) * width, width, 2 * width
    # Caches that are wide once stay so: the waves behind the first read all columns at every step.
    columns = widths + (waves - 1) * C * C
    rows = U / mesh.trunk_shards * slots

    def reduced(tokens: float, products: float) -> float:
        """Bytes sent for activations that are summed over tensor (or gathered and scattered: a half each), per chip."""
        return 2 * tensor_share * products * num * tokens / mesh.trunk_shards * D * size

    gathered = weights / mesh.tensor * fsdp_share
    prefill = Work(
        name="prefill",
        flops=(2 * num * layer * stems + 4 * num * heads * stem_pairs) / chips,
        bytes=(weights / mesh.tensor + stems / mesh.trunk_shards * kv / mesh.tensor),
        least_traffic=2 * gathered + reduced(stems, 2),
    )
    decode = Work(
        name="decode",
        flops=(2 * (num * layer + head) * completions + 4 * num * heads * pairs) / chips,
        bytes=waves * C * weights / mesh.tensor
        + (rows * columns + waves * C * stems / mesh.trunk_shards) * kv / mesh.tensor,
        least_traffic=reduced(completions, 2),
    )
    micro = U / (config.mesh.microbatch_trunks or U // config.loss.num_minibatches)
    # Two for the forward pass, twice that backward, or once where weights have no gradients of their own; and what is
    # made anew for it, all but a layer's last product.
    products = (2 + (2 if config.lora.rank else 4)) * layer + (2 * (layer - D * m.mlp_width) if m.remat else 0)
    attention = 4 * (4 if m.remat else 3) * num * heads * (stem_pairs + pairs)
    trained = weights / size * 4 / mesh.tensor * (0 if config.lora.rank else 1)
    update_work = Work(
        name="update",
        flops=(products * num * (stems + completions) + 6 * head * completions + attention) / chips,
        bytes=micro * 3 * weights / mesh.tensor + 2 * num * (stems + completions) / chips * D * size,
        # Layers are gathered forward and backward, embedding and head once; gradients are scattered to their shards and
        # met over data.
        least_traffic=micro * (gathered * (1 + num * layer * size / weights) + trained * fsdp_share)
        + 2 * trained / mesh.fsdp * (mesh.data - 1) / mesh.data
        + reduced(stems + completions, 5.5 if m.remat else 4),
    )
    return [prefill, decode, update_work]


# --- The plan -----------------------------------------------------------------------------------------------------

# Of a chip's memory, left to the runtime.
_RESERVED = 0.03
# Of a chip's memory, what an estimate may reach to be worth compiling.
_MARGIN = 0.9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found. Bytes and FLOPs are each chip's; seconds are a roofline's, without latency or idling."""

    topology: str
    chip: Chip
    parameters: int
    """Of the model."""
    memory: dict[str, int]
    """Bytes of parameters, optimizer, caches, and the most that each program takes with all that stands beside it."""
    fits: bool
    programs: list[Program]
    phases: list[dict]
    """Of each: FLOPs, bytes, traffic, least traffic, seconds that each would take alone, and which takes longest."""
    seconds: float
    """Of a step: the sum of the phases' longest."""

    def to_json(self) -> dict:
        return asdict(self)


# The programs that a phase runs.
_PHASES = {"prefill": ("gather weights", "prefill"), "decode": ("decode",), "update": ("gradients", "optimizer")}


def make_plan(config: Config, topology: str, num_tail: int, note: Callable[[str], None] = lambda _: None) -> Plan:
    """Compile the config's programs for a topology and account for them.

    Raises:
        ConfigError: see `describe_topology` and `make_mesh`; evaluations would need more than a step.
    """
    chip, devices = describe_topology(topology)
    _check_evaluation(config)
    config = replace(config, model=replace(config.model, platform="tpu"))
    mesh = make_mesh(config.mesh, devices)
    programs = list(compile_programs(config, mesh, num_tail, note))
    state, frozen = abstract_state(config, mesh)
    caches = jax.eval_shape(partial(decoder.empty_cache, config.model, *_cache_shape(config)))
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
    memory = {
        "parameters": bytes_per_chip((state.params, frozen)),
        "optimizer": bytes_per_chip(state.opt_state),
        "caches": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) // shards,
    }
    memory |= {f"in {p.name}": p.peak + p.resident for p in programs}
    complete = len(programs) == sum(map(len, _PHASES.values()))
    fits = complete and all(p.fits and p.peak + p.resident <= (1 - _RESERVED) * chip.memory for p in programs)
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
        memory=memory,
        fits=fits,
        programs=programs,
        phases=phases,
        seconds=sum(max(p["seconds"].values()) for p in phases),
    )


def _check_evaluation(config: Config) -> None:
    """Raises ConfigError where an evaluation keeps more stems or rows than a step, whose programs are compiled."""
    r, e = config.rollout, config.eval
    R = r.prompts_per_trunk * r.group_size
    k = r.prompts_per_trunk * e.num_samples
    rows, allowed = (n * min(r.slots_per_trunk or m, m) for n, m in ((e.batch_trunks, k), (r.num_trunks, R)))
    if e.batch_trunks > r.num_trunks or rows > allowed:
        most = min(r.num_trunks, allowed * e.batch_trunks // rows) // config.mesh.trunk_shards
        raise ConfigError(
            f"eval.batch_trunks={e.batch_trunks} with eval.num_samples={e.num_samples} keeps {rows} rollouts at once, "
            f"more than a step's {allowed} from {r.num_trunks} trunks, for which memory is planned. Set "
            f"--eval.batch-trunks {max(1, most) * config.mesh.trunk_shards}, or fewer samples."
        )


def _cache_shape(config: Config) -> tuple[int, int, int]:
    r = config.rollout
    R = r.prompts_per_trunk * r.group_size
    return r.num_trunks, min(r.slots_per_trunk or R, R), r.max_completion_tokens


# --- What would fit -----------------------------------------------------------------------------------------------


def estimate_memory(config: Config, num_tail: int) -> float:
    """Bytes that each chip needs at most, roughly: to choose what to compile, not to be trusted."""
    m, r, mesh = config.model, config.rollout, config.mesh
    t, shards, size = mesh.tensor, mesh.trunk_shards, 2 if m.activation_dtype == "bfloat16" else 4
    D, heads = m.width, m.num_heads * m.head_size
    layer = D * (2 * heads + 2 * m.num_kv_heads * m.head_size) + 3 * D * m.mlp_width
    count = m.num_layers * layer + m.vocab_size * D * (1 if m.tie_embeddings else 2)
    held = count * (2 if config.policy.param_dtype == "bfloat16" else 4) / mesh.num_devices
    trained = 0.02 * count if config.lora.rank else count
    state = (1 if config.lora.rank else 2) * held + 8 * trained / mesh.num_devices
    kv = 2 * m.num_layers * m.num_kv_heads * m.head_size * size / t
    R = r.prompts_per_trunk * r.group_size
    slots = min(r.slots_per_trunk or R, R)
    stem = config.data.trunk_length + r.prompts_per_trunk * num_tail
    per_shard = r.num_trunks / shards
    rollout = count * size / t + per_shard * (stem + 1.5 * slots * r.max_completion_tokens) * kv
    per_token = (4 * D + (6 * m.mlp_width + 8 * heads) / t) * size
    trunks = (config.mesh.microbatch_trunks or r.num_trunks // config.loss.num_minibatches) / shards
    tokens = trunks * (stem + R * r.max_completion_tokens)
    kept = m.num_layers * D / t * size if m.remat else m.num_layers * per_token
    head = 2 * 4 * m.vocab_size * D / t  # its gradient, whole on every shard of the trunks
    return state + max(rollout, 4 * trained / mesh.num_devices + head + tokens * (kept + per_token))


def nearest_settings(config: Config, num_tail: int, memory: float) -> Iterator[tuple[list[str], Config]]:
    """Changes of the config that would fit by the estimate, the fewest and gentlest first.

    Rollouts in flight and trunks' sizes cost time only; more tensor shards need links; adapters train something else.
    """
    found = []
    r, mesh = config.rollout, config.mesh
    R = r.prompts_per_trunk * r.group_size
    for use_lora in (False, True) if not config.lora.rank else (False,):
        for tensor in (mesh.tensor * 2**i for i in range(4)):
            for prompts in (r.prompts_per_trunk // 2**i for i in range(8) if r.prompts_per_trunk >= 2**i):
                for parts in (1, 2, 4, 8, 16):
                    slots = prompts * r.group_size // parts
                    if not slots:
                        continue
                    change = _changed(config, use_lora, tensor, prompts, 0 if parts == 1 else slots)
                    try:
                        change.validate()
                    except ConfigError:
                        continue
                    if change.mesh.num_devices != config.mesh.num_devices:
                        continue
                    if estimate_memory(change, num_tail) <= _MARGIN * memory:
                        words = [
                            f"--rollout.num-trunks {change.rollout.num_trunks} --rollout.prompts-per-trunk {prompts}"
                            if prompts != r.prompts_per_trunk
                            else "",
                            f"--rollout.slots-per-trunk {slots}" if slots != min(r.slots_per_trunk or R, R) else "",
                            f"--mesh.fsdp {change.mesh.fsdp} --mesh.tensor {tensor}" if tensor != mesh.tensor else "",
                            "--lora.rank 32 --policy.param-dtype bfloat16" if use_lora else "",
                            f"--mesh.microbatch-trunks {change.mesh.microbatch_trunks}"
                            if change.mesh.microbatch_trunks != config.mesh.microbatch_trunks
                            else "",
                        ]
                        words = [w for w in words if w]
                        if words:  # without any it is the config itself
                            gentleness = 8 * use_lora + 2 * (tensor != mesh.tensor) + parts / 16 + len(words)
                            found.append((gentleness, words, change))
    for _, words, change in sorted(found, key=lambda f: f[0]):
        yield words, change


def larger_topologies(topology: str) -> Iterator[str]:
    """The next four of the version, each of twice the chips: the shortest side doubled."""
    version, _, sides = topology.partition(":")
    sizes = [int(n) for n in sides.split("x")]
    for _ in range(4):
        sizes[sizes.index(min(sizes))] *= 2
        yield f"{version}:{'x'.join(map(str, sorted(sizes)))}"


def _changed(config: Config, use_lora: bool, tensor: int, prompts: int, slots: int) -> Config:
    mesh = config.mesh
    mesh = replace(mesh, tensor=tensor, fsdp=max(1, mesh.fsdp * mesh.tensor // tensor))
    trunks = config.rollout.num_trunks * config.rollout.prompts_per_trunk // prompts
    return replace(
        config,
        mesh=mesh,
        rollout=replace(config.rollout, num_trunks=trunks, prompts_per_trunk=prompts, slots_per_trunk=slots),
        loss=replace(config.loss, microbatch_trunks=mesh.trunk_shards),
        lora=replace(config.lora, rank=32) if use_lora else config.lora,
        policy=replace(config.policy, param_dtype="bfloat16") if use_lora else config.policy,
    )
