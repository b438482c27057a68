"""Policies beside the one in training: copies that follow it, by a moving average or at set steps.

They live in `TrainState.companions`, lie as the parameters do, are saved with them, and hold adapters only where the
policy has adapters. An update that is skipped leaves them as they are.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import CompanionConfig
from rpt_jax.types import TrainState

# Names of the policies that a scoring pass may ask for.
CURRENT, START, AVERAGE = "current", "start", "average"


def with_companions(state: TrainState, names: set[str]) -> TrainState:
    """The state with a copy of its parameters for each name: updates donate their buffers, so none may stand twice."""
    copies = {name: jax.tree.map(jnp.copy, state.params) for name in sorted(names)}
    return replace(state, companions=copies)


def follow(state: TrainState, config: CompanionConfig) -> TrainState:
    """The state after its companions have followed an update.

    decay d < 1: average <- d * average + (1 - d) * params after every update that was not skipped.
    every_steps n > 0: average <- params where the number of updates is a multiple of n.
    """
    if not state.companions:
        return state
    shardings = tuple(p.sharding for p in jax.tree.leaves(state.params))
    companions = {
        name: _follow(tree, state.params, state.step, state.skipped, config=config, shardings=shardings)
        for name, tree in state.companions.items()
    }
    return replace(state, companions=companions)


@partial(jax.jit, static_argnames=("config", "shardings"), donate_argnames="average")
def _follow(average: Any, params: Any, step, skipped, *, config: CompanionConfig, shardings: tuple) -> Any:
    if config.every_steps:
        weight = jnp.where(step % config.every_steps == 0, 1.0, 0.0)
    else:
        weight = jnp.float32(1 - config.decay)
    weight = jnp.where(skipped > 0, 0.0, weight)

    def one(old, new):
        mixed = old.astype(jnp.float32) + weight * (new.astype(jnp.float32) - old.astype(jnp.float32))
        # A whole step takes the parameters' own bits, and none keeps the old ones.
        return jnp.where(weight == 1, new, jnp.where(weight == 0, old, mixed.astype(old.dtype)))

    leaves, tree = jax.tree.flatten(jax.tree.map(one, average, params))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings))
