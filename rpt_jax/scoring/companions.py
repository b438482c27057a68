"""Companions: copies that follow the policy, by a moving average or at fixed steps.

They are part of `TrainState.companions`, are sharded like the parameters, and are saved with them. They hold only
adapters if the policy has adapters. Skipped updates do not change them.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import CompanionConfig
from rpt_jax.types import TrainState

# Names of the policies that a scoring pass may use.
CURRENT, START, AVERAGE = "current", "start", "average"


def with_companions(state: TrainState, names: set[str]) -> TrainState:
    """Add a copy of the parameters for each name. Copies, because updates donate their buffers."""
    copies = {name: jax.tree.map(jnp.copy, state.params) for name in sorted(names)}
    return replace(state, companions=copies)


def follow(state: TrainState, config: CompanionConfig) -> TrainState:
    """Update the companions after an update of the policy.

    decay d < 1: average <- d * average + (1 - d) * params after every update that was not skipped.
    every_steps n > 0: average <- params whenever the number of updates is a multiple of n.
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
        # Weight 1 takes the parameters bit for bit, weight 0 keeps the old copy bit for bit.
        return jnp.where(weight == 1, new, jnp.where(weight == 0, old, mixed.astype(old.dtype)))

    leaves, tree = jax.tree.flatten(jax.tree.map(one, average, params))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings))
