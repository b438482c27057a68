"""The programs of a step, compiled for a topology at their largest shapes, with their memory, traffic and kernels."""

import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.models import decoder, decoding, lora
from rpt_jax.models.lora import Frozen
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.parallel.mesh import on_mesh_of, replicated, spec_without, trunk_sharding
from rpt_jax.parallel.programs import Program as JittedProgram
from rpt_jax.planning.kernels import Kernels, read_kernels
from rpt_jax.planning.traffic import Traffic, read_traffic
from rpt_jax.rl import update
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.optimizer import make_optimizer, state_shardings
from rpt_jax.rl.shapes import microbatch_shape, tasks_shape
from rpt_jax.rollout import engine
from rpt_jax.types import TrainState


def _shapes(tree, sharding):
    """Return the shapes of a tree of arrays, with one sharding for all or a tree with one for each."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(_shapes, tree, sharding)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def abstract_state(config: Config, mesh: Mesh) -> tuple[TrainState, Frozen | None]:
    """Return the shapes of the train state, and of its adapters' base weights (None without adapters)."""
    params = decoder.abstract_params(config.model, mesh)
    # Weights that a warm start's adapters were merged into are float32.
    merged = config.lora.targets if config.lora.rank and config.supervised.num_steps else ()

    def held(path, p):
        kind = np.float32 if path[-1].key in merged else np.dtype(config.policy.param_dtype)
        return jax.ShapeDtypeStruct(p.shape, kind, sharding=p.sharding)

    params = jax.tree_util.tree_map_with_path(held, params)
    trained, frozen = params, None
    if config.lora.rank:
        trained = lora.abstract_adapters(config.model, config.lora, mesh)
        frozen = Frozen(params=params, scale=_shapes(jax.ShapeDtypeStruct((), np.float32), replicated(mesh)))
    if config.loss.has_critic:
        readout = jax.ShapeDtypeStruct((config.model.width + 1,), np.float32)
        trained = trained | {READOUT: _shapes(readout, replicated(mesh))}
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    moments = jax.eval_shape(optimizer.init, trained)
    moments = _shapes(moments, state_shardings(moments, trained, mesh))
    number = _shapes(jax.ShapeDtypeStruct((), np.int32), replicated(mesh))
    return TrainState(step=number, params=trained, opt_state=moments, skipped=number, companions={}), frozen


def bytes_per_chip(tree) -> int:
    """Return the bytes per chip of a tree of arrays or shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program, as each chip runs it."""

    name: str
    """gather weights, prefill, decode, gradients or optimizer."""
    runs: float
    """Number of runs in a step."""
    peak: int
    """Bytes of arguments, results that do not reuse an argument's buffer, temporaries and code."""
    temporary: int
    """Bytes of temporaries."""
    resident: int
    """Bytes that stay on the chip during the program but are not its arguments."""
    fits: bool
    """The program alone fits into the chip's memory, according to the compiler."""
    compile_seconds: float
    """Wall-clock seconds of lowering and compiling."""
    traffic: list[Traffic]
    """Collectives of one run."""
    kernels: Kernels | None = None
    """On GPUs: kernels of one run."""
    token_kernels: Kernels | None = None
    """On GPUs: kernels of one iteration of the loop over tokens."""


@dataclass(frozen=True)
class Compiler:
    """Compiles the programs of one config for one mesh, and measures their memory, traffic and kernels.

    Attributes:
        mesh: to compile for.
        params: shapes of the policy's parameters.
        kept: bytes per chip of what stays on it during RL.
        platform: of its devices, such as gpu.
        note: called with the name of each program before it is compiled.
        reads_text: read traffic and kernels from the programs' text; if not, a run's cache of programs serves them.
    """

    mesh: Mesh
    params: Any
    kept: int
    platform: str
    note: Callable[[str], None]
    reads_text: bool

    def __call__(self, name: str, runs: float, resident: int, function, *args, trips: float = 1.0, **options):
        """Compile one program.

        Args:
            name: see `Program`.
            runs: see `Program`.
            resident: see `Program`.
            function: jitted function to compile.
            *args: its arguments, as shapes.
            trips: assumed trip count of loops whose trip count depends on data.
            **options: its keyword arguments.
        Returns:
            (program, shapes of its results or None if it does not fit).
        """
        self.note(name)
        begin = time.monotonic()
        traffic, kernels = [], (None, None)
        with tempfile.TemporaryDirectory() as dump, on_mesh_of(self.params):
            lowered = function.lower(*args, **options)
            chosen = function.options(self.platform) if isinstance(function, JittedProgram) else {}
            try:
                # The text comes from a dump, because libtpu's format is newer than jaxlib's reader.
                dumped = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True} if self.reads_text else {}
                program = lowered.compile(compiler_options=chosen | dumped)
            except jax.errors.JaxRuntimeError as error:
                if not (needed := re.search(r"(?:temporaries \(|Used )([\d.]+)([KMG])", str(error))):
                    raise
                peak = int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]])
                return Program(
                    name=name, runs=runs, peak=peak, temporary=0, resident=resident, fits=False,
                    compile_seconds=time.monotonic() - begin, traffic=[],
                ), None  # fmt: skip
            if self.reads_text:
                (path,) = Path(dump).glob(f"*.jit_{function.__name__}.*after_optimizations.txt")
                text = path.read_text()
                traffic = read_traffic(text, dict(self.mesh.shape), unknown_trips=trips)
                kernels = read_kernels(text, unknown_trips=trips) if self.platform == "gpu" else kernels
        memory = program.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        found = Program(
            name=name, runs=runs, peak=peak, temporary=memory.temp_size_in_bytes, resident=resident, fits=True,
            compile_seconds=time.monotonic() - begin, traffic=traffic, kernels=kernels[0], token_kernels=kernels[1],
        )  # fmt: skip
        return found, _shapes(lowered.out_info, program.output_shardings)


def compile_programs(
    config: Config, mesh: Mesh, num_tail: int, note: Callable[[str], None] = lambda _: None
) -> Iterator[Program]:
    """Yield the programs of a step at their largest: every rollout has full length, in a cache window of that width.

    Passes that only score (old or reference log-probabilities, requests of rewards) are skipped, because they need
    less. A program that does not fit ends the iteration, except for decode.

    Args:
        config: of the run.
        mesh: to compile for.
        num_tail: tokens of the prompt after the text.
        note: called with the name of each program before it is compiled.
    """
    compiler = make_compiler(config, mesh, note, reads_text=True)
    for phase in (compile_rollout, compile_update):
        for program in phase(config, compiler, num_tail):
            yield program
            if not program.fits and program.name != "decode":
                return


def make_compiler(config: Config, mesh: Mesh, note: Callable[[str], None], *, reads_text: bool) -> Compiler:
    """Return the compiler of a config's programs; arguments as for `Compiler`."""
    state, frozen = abstract_state(config, mesh)
    # The policy that RL started from stays, because the control starts from it and a KL term refers to it.
    kept = bytes_per_chip((state, frozen) if frozen else (state, state.params))
    platform = config.model.platform or mesh.devices.flat[0].platform
    return Compiler(mesh, _joined(frozen, state.params), kept, platform, note, reads_text)


def compile_rollout(config: Config, compiler: Compiler, num_tail: int) -> Iterator[Program]:
    """Yield the programs of a rollout; arguments as for `compile_programs`."""
    tasks = tasks_shape(config, num_tail)
    rollout, params = config.rollout, compiler.params
    on_trunks = partial(_shapes, sharding=trunk_sharding(compiler.mesh))
    C, R = rollout.max_completion_tokens, rollout.prompts_per_trunk * rollout.group_size
    slots = min(rollout.slots_per_trunk or R, R)
    settings = engine.SamplingSettings(
        max_completion_tokens=C,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_ids=rollout.stop_ids or (0,),
        vocab_size=config.model.vocab_size,
    )
    key = _shapes(jax.eval_shape(lambda: jax.random.key(0)), replicated(compiler.mesh))
    not_params = compiler.kept - bytes_per_chip(params)
    specs = tuple(spec_without(p, "fsdp") for p in jax.tree.leaves(params))
    program, weights = compiler(
        "gather weights", 1, not_params, decoding.lay_out_for_decoding, config.model, params, specs=specs
    )
    yield program
    resident = not_params + bytes_per_chip(weights)
    program, started = compiler(
        "prefill", 1, resident, engine.start, config.model, settings, params, on_trunks(tasks.prompts), key,
        slots=slots, window=decoding.num_columns(config.model, C),
    )  # fmt: skip
    yield program
    stems, flight, written, _ = started
    # During the last widening, the old caches of half the width are still in memory.
    halves = bytes_per_chip(flight.cache) // 2
    program, _ = compiler(
        "decode", R / slots, compiler.kept + halves, engine.run_segment, config.model, settings, weights, stems, flight,
        written, jax.ShapeDtypeStruct((), np.int32), trips=C,
    )  # fmt: skip
    yield program


def compile_update(config: Config, compiler: Compiler, num_tail: int, learned_width: int = 0) -> Iterator[Program]:
    """Yield the programs of an update; arguments as for `compile_programs` and `shapes.microbatch_shape`."""
    tasks = tasks_shape(config, num_tail)
    state, frozen = abstract_state(config, compiler.mesh)
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), state.params)
    rows = _shapes(microbatch_shape(config, tasks, learned_width=learned_width), trunk_sharding(compiler.mesh))
    microbatches = config.rollout.num_trunks / rows.policy_weights.shape[0]
    program, results = compiler(
        "gradients", microbatches, compiler.kept - bytes_per_chip((state.params, frozen)),
        update.add_gradients, gradients, state.params, frozen, rows,
        loss_fn=objective_fn(config.model, config.loss),
        shardings=tuple(p.sharding for p in jax.tree.leaves(state.params)),
    )  # fmt: skip
    yield program
    program, _ = compiler(
        "optimizer", config.loss.num_minibatches, compiler.kept - bytes_per_chip(state), update.apply_gradients, state,
        gradients, results[1], optimizer=make_optimizer(config.optimizer, config.num_updates),
    )  # fmt: skip
    yield program


def _joined(frozen: Frozen | None, trained):
    """Return the shapes of the policy's parameters."""
    if frozen is None:
        return trained
    return frozen.params | trained | {"layers": frozen.params["layers"] | trained["layers"]}
