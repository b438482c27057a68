"""Compile the large programs of RL before its first step, in threads.

Their shapes follow from the config. JAX keeps the compiled programs for the calls of the first step.
"""

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial

import jax
import numpy as np

from rpt_jax.models import decoding
from rpt_jax.parallel.mesh import on_mesh_of, spec_without, trunk_sharding
from rpt_jax.parallel.programs import program_shapes
from rpt_jax.rl import update
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.packing import ROUNDINGS, rounded
from rpt_jax.rl.shapes import microbatch_shape, tasks_shape
from rpt_jax.rl.trainer import Trainer
from rpt_jax.rollout import engine, slots
from rpt_jax.train.progress import progress_bar
from rpt_jax.types import Prompts, TrainState


def compile_ahead(trainer: Trainer, state: TrainState, num_tail: int, learned_width: int = 0) -> None:
    """Compile sampling and update of the run's shapes, if these are few (`run.shapes`).

    Args:
        trainer: of the run.
        state: at any step.
        num_tail: number of prompt tokens after the text.
        learned_width: length of rows that end with a reference to learn; 0: rows are completions.
    """
    config = trainer.config
    if program_shapes(config) != "few" or jax.process_count() > 1:
        return
    on_trunks = partial(_with_sharding, sharding=trunk_sharding(trainer.mesh))
    tasks = tasks_shape(config, num_tail)
    chains: dict[str, Callable] = {}
    if not config.rollout.new_tokens_per_step:  # rows that wait make prompts of many shapes
        chains["sampling"] = partial(_compile_sampling, trainer, state, on_trunks(tasks.prompts))
    rows, steps = config.rollout.prompts_per_trunk * config.rollout.group_size, ROUNDINGS["few"].lanes
    for lanes in sorted({rounded(n, rows, steps) for n in range(1, rows + 1)}):
        batch = on_trunks(microbatch_shape(config, tasks, lanes, learned_width))
        chains[f"update of {lanes} lanes"] = partial(_compile_update, trainer, state, batch, apply=lanes == rows)
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool, progress_bar("compiling", 0) as progress:
        running, done = {pool.submit(chain): name for name, chain in chains.items()}, 0
        while running:
            for future in list(wait(running, return_when=FIRST_COMPLETED).done):
                # A chain returns those that needed its results.
                running |= {pool.submit(chain): name for name, chain in future.result().items()}
                del running[future]
                done += 1
                progress(done, ", ".join(running.values()), done + len(running))


def _with_sharding(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _compiled(function: Callable, *args, **static):
    """Compile a program; return the shapes of its results, with their shardings."""
    lowered = function.lower(*args, **static)
    compiled = lowered.compile()
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )


def _compile_sampling(trainer: Trainer, state: TrainState, prompts: Prompts) -> dict[str, Callable]:
    """Compile what `engine.generate` calls before its loops; return the chains that compile these."""
    config, model, params = trainer.config, trainer.config.model, trainer.policy(state)
    options = dict(config.rollout.sampling, vocab_size=trainer.tokenizer.vocab_size)
    U, M, G = prompts.row_ids.shape
    size = min(options.pop("slots_per_trunk") or M * G, M * G)
    settings, schedule = engine.SamplingSettings(**options), engine.SCHEDULES["few"]
    limit = settings.max_completion_tokens
    key = engine.rollout_key(config.run.seed, 0)  # outside the mesh, as `Trainer.roll_out` makes it
    with on_mesh_of(params):
        specs = tuple(spec_without(p, "fsdp") for p in jax.tree.leaves(params))
        weights = _compiled(decoding.lay_out_for_decoding, model, params, specs=specs)
        window = engine.first_window(model, schedule, limit)
        stems, flight, written, _ = _compiled(
            engine.start, model, settings, params, prompts, key, slots=size, window=window
        )
        may_regroup = config.mesh.trunk_shards == 1
        shapes = {f"sampling of {U} x {size} rows": (stems, flight)}
        num_stem = stems.stem_layout.shape[1]
        for groups, fewer in engine.chain_of_shapes(U, size, num_stem, limit, may_regroup, schedule.shares):
            if may_regroup:
                stems, flight = _compiled(slots.regroup, stems, flight, num_trunks=U, groups=groups, slots=fewer)
            else:
                flight = _compiled(slots.shrink, flight, slots=fewer)
            shapes[f"sampling of {flight.row.shape[0]} x {fewer} rows"] = stems, flight

    def compile_segment(stems, flight) -> dict:
        with on_mesh_of(params):
            _compiled(engine.run_segment, model, settings, weights, stems, flight, written, np.int32(0))
        return {}

    return {name: partial(compile_segment, *shape) for name, shape in shapes.items()}


def _compile_update(trainer: Trainer, state: TrainState, batch, *, apply: bool) -> dict:
    """Compile the gradients of a microbatch and, with `apply`, the step that applies them."""
    shardings = tuple(p.sharding for p in jax.tree.leaves(state.params))
    with on_mesh_of(state.params):
        loss_fn = objective_fn(trainer.config.model, trainer.config.loss)
        gradients, metrics = _compiled(
            update.add_gradients, state.params, state.params, trainer.frozen, batch, loss_fn=loss_fn,
            shardings=shardings,
        )  # fmt: skip
        if apply:
            _compiled(update.apply_gradients, state, gradients, metrics, optimizer=trainer.optimizer)
    return {}
