"""One optimizer step over microbatches, from rows to new parameters. A non-finite step changes nothing.

RL and supervised training differ only in their rows; the loss is `objective.py`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.parallel.programs import program
from rpt_jax.types import Rows, TrainState


def update(
    state: TrainState, microbatches: Sequence[Rows], *, loss_fn, optimizer, frozen: Frozen | None = None
) -> tuple[TrainState, dict]:
    """Take one optimizer step; `state` is donated.

    If the loss or a gradient is not finite, parameters and optimizer state keep every bit. `state.skipped` counts such
    steps, and the next finite step resets it to 0.

    Args:
        state: to update.
        microbatches: run in order; their gradients add up. Their shapes may differ.
        loss_fn: (policy's parameters, batch) -> (scalar, dict of scalars); a static, hashable callable.
        optimizer: of the stage.
        frozen: base weights of trained adapters; None: the state holds the whole policy.
    Returns:
        (TrainState, {name: f32 scalar}: loss, grad_norm, skipped and the metrics of the loss; names ending in _max are
        maxima, the others sums over microbatches).
    """
    shardings = tuple(p.sharding for p in jax.tree.leaves(state.params))
    with on_mesh_of(state.params):
        gradients, metrics = _zeros_like(state.params, shardings), []
        for batch in microbatches:
            gradients, of_batch = add_gradients(
                gradients, state.params, frozen, batch, loss_fn=loss_fn, shardings=shardings
            )
            metrics.append(of_batch)
        return apply_gradients(state, gradients, _combined(metrics), optimizer=optimizer)


@jax.jit
def _combined(metrics: list[dict]) -> dict:
    """Combine metrics of microbatches; not in `apply_gradients`, which then compiles once for any number of them."""
    stacked = {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
    return {name: v.max() if name.endswith("_max") else v.sum() for name, v in stacked.items()}


@partial(jax.jit, static_argnames="shardings")
def _zeros_like(params, shardings: tuple):
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.zeros_like, params))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings))


# On GPUs, XLA would join the stems' and the branches' products, which copies both.
@program(static_argnames=("loss_fn", "shardings"), donate_argnames="total", gpu={"xla_gpu_dot_merger_threshold_mb": 0})
def add_gradients(total, params, frozen, batch: Rows, *, loss_fn, shardings: tuple):
    """Add a microbatch's gradients to `total`.

    Args:
        total: tree like params; donated.
        params: trained parameters.
        frozen: base weights of adapters, or None.
        batch: the microbatch.
        loss_fn: as in `update`.
        shardings: of the leaves of params, which the result keeps.
    Returns:
        (gradients, metrics of the loss with the loss itself).
    """
    value_and_grad = jax.value_and_grad(lambda params: loss_fn(join(frozen, params), batch), has_aux=True)
    (loss, metrics), gradients = value_and_grad(params)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.add, total, gradients))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings)), metrics | {"loss": loss}


@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def apply_gradients(state: TrainState, gradients, metrics: dict, *, optimizer) -> tuple[TrainState, dict]:
    """Apply summed gradients, unless the loss or their norm is not finite.

    Args:
        state: donated.
        gradients: tree like state.params.
        metrics: of the step; "loss" is f32 [].
        optimizer: of the stage.
    Returns:
        (new state, metrics with grad_norm f32 [] and skipped i32 []).
    """
    grad_norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.where(is_finite, 0, state.skipped + 1),
        companions=state.companions,
    )
    return new_state, metrics | {"grad_norm": grad_norm, "skipped": new_state.skipped}
