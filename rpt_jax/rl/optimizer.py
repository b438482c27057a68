"""Optimizers of the stages, and the sharding of their state."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rpt_jax.config import OptimizerConfig
from rpt_jax.parallel.mesh import replicated
from rpt_jax.types import TrainState

# Matrices of a layer: (reduction axes, output axes); the leading axis is the layer.
_MATRICES = {
    "q_proj": ((1,), (2, 3)),
    "k_proj": ((1,), (2, 3)),
    "v_proj": ((1,), (2, 3)),
    "o_proj": ((1, 2), (3,)),
    "gate_proj": ((1,), (2,)),
    "up_proj": ((1,), (2,)),
    "down_proj": ((1,), (2,)),
}
_DECAYED = {*_MATRICES, "embedding", "head"}
_ADAPTER_SUFFIXES = ("_lora_a", "_lora_b")


def _by_leaf_name(params, value_of: Callable[[str], Any]):
    return jax.tree_util.tree_map_with_path(lambda path, _: value_of(path[-1].key), params)


def muon_dimensions(params):
    """Return how Muon reads each leaf as a matrix; None for leaves that AdamW updates."""
    return _by_leaf_name(
        params, lambda name: optax.contrib.MuonDimensionNumbers(*_MATRICES[name]) if name in _MATRICES else None
    )


@cache
def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Make the optimizer of a stage of `num_steps` updates: clip, then AdamW or Muon at the scheduled rate.

    It is the same object for the same arguments, so that an update compiles once.
    """

    def scheduled(peak: float):
        rest = max(1, num_steps - config.warmup_steps)
        tail = optax.linear_schedule(peak, 0.0, rest) if config.schedule == "linear" else optax.constant_schedule(peak)
        rise = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
        return optax.join_schedules([rise, tail], [config.warmup_steps]) if config.warmup_steps else tail

    if config.name == "muon":
        rule = optax.contrib.muon(
            scheduled(config.matrix_learning_rate),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=0.0,
            adam_learning_rate=scheduled(config.learning_rate),
            muon_weight_dimension_numbers=muon_dimensions,
        )
    else:
        rule = optax.adamw(
            scheduled(config.learning_rate),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: _by_leaf_name(
                params, lambda name: name in _DECAYED or name.endswith(_ADAPTER_SUFFIXES)
            ),
        )
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    return optax.chain(clip, rule)


def init_state(params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Make the state at step 0; optimizer moments are sharded like their parameters."""
    abstract = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=state_shardings(abstract, params, mesh))(params)
    # Two buffers: the state is donated, and one buffer cannot be donated twice.
    step, skipped = (jax.device_put(jnp.int32(0), replicated(mesh)) for _ in range(2))
    return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped, companions={})


def state_shardings(abstract_state, params, mesh: Mesh):
    """Return the shardings of an optimizer state: a leaf whose path ends in a parameter's path is sharded like it."""

    def keys(path):
        return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))

    by_path = {keys(path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path, leaf):
        names = keys(path)
        owners = (by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path)
        owner = next(owners, None)
        return owner.sharding if owner is not None and owner.shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)
