"""TrainState and TrainBatch in, TrainState and metrics out: one forward and backward over trunks and branches.

RPT and supervised training differ in one function, `policy_loss` or `supervised_loss`; everything else is shared.
Loss weights are made for the whole global batch before it is split, so microbatches and devices just add up.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig, LossConfig, OptimizerConfig
from rpt_jax.models import decoder
from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import replicated
from rpt_jax.rl.advantages import compute_advantages
from rpt_jax.rl.losses import aggregation_weights, clipped_surrogate, kl_term
from rpt_jax.rl.scoring import completion_logprobs
from rpt_jax.rollout.engine import to_sequences
from rpt_jax.types import Experience, TrainBatch, TrainState

# Matrices of a layer: (reduction axes, output axes), the leading axis being the layer.
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
    """Which leaves Muon owns, and how it reads them as matrices; None where AdamW updates the leaf."""
    return _by_leaf_name(
        params, lambda name: optax.contrib.MuonDimensionNumbers(*_MATRICES[name]) if name in _MATRICES else None
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a stage of `num_steps` updates: clip, then AdamW or Muon, at the scheduled rate."""

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
    """Step 0 around `params`; optimizer moments lie where their parameters do."""
    abstract = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=_state_shardings(abstract, params, mesh))(params)
    # Two buffers: the state is donated, and one buffer cannot be donated twice.
    step, skipped = (jax.device_put(jnp.int32(0), replicated(mesh)) for _ in range(2))
    return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped)


def _state_shardings(abstract_state, params, mesh: Mesh):
    """Shardings of an optimizer state: a leaf whose path ends in a parameter's path lies like that parameter."""

    def keys(path):
        return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))

    by_path = {keys(path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path, leaf):
        names = keys(path)
        owners = (by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path)
        owner = next(owners, None)
        return owner.sharding if owner is not None and owner.shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def _trunk_loss(params, batch: TrainBatch, trunk_ULD):
    """Weighted next-token loss on trunk tokens at temperature 1."""
    logprobs, _ = decoder.token_logprobs(
        decoder.output_head(params), trunk_ULD[:, :-1], batch.sequences.trunk_tokens[:, 1:], temperature=1.0
    )
    return -jnp.sum(batch.trunk_weights[:, 1:] * logprobs)


def supervised_loss(config: DecoderConfig, params, batch: TrainBatch):
    """-(weights * log-probabilities).sum() over trunk and completion tokens; weights sum to 1 over the global batch."""
    C = batch.token_weights.shape[-1]
    logprobs, _, trunk_ULD = completion_logprobs(config, params, batch.sequences, C, 1.0)
    completion = -jnp.sum(batch.token_weights * logprobs)
    trunk = _trunk_loss(params, batch, trunk_ULD)
    return completion + trunk, {"completion_loss": completion, "trunk_loss": trunk}


def policy_loss(config: DecoderConfig, loss: LossConfig, temperature: float, params, batch: TrainBatch):
    """GRPO's loss (arXiv:2402.03300 eq. 3) with the configured advantage, aggregation, clip and KL.

    Log-probabilities are those of the rollout temperature. With one update per batch `old_logprobs` is None and the
    ratio is exactly 1.
    """
    mask = batch.completion_mask
    logprobs, entropy, trunk_ULD = completion_logprobs(config, params, batch.sequences, mask.shape[-1], temperature)
    # Padding holds arbitrary tokens: their terms must not reach a product with weight 0 as inf or NaN.
    logprobs = jnp.where(mask, logprobs, 0.0)
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else jnp.where(mask, batch.old_logprobs, 0.0)
    ratio = jnp.exp(logprobs - old)
    terms = clipped_surrogate(ratio, batch.advantages, clip_eps_low=loss.clip_eps_low, clip_eps_high=loss.clip_eps_high)
    metrics = {}
    if batch.ref_logprobs is not None:
        kl = kl_term(loss.kl_estimator, logprobs, jnp.where(mask, batch.ref_logprobs, 0.0))
        terms = terms - loss.kl_coef * kl
        metrics["kl"] = jnp.sum(batch.token_weights * kl)
    total = -jnp.sum(batch.token_weights * terms)
    if loss.ntp_coef:
        metrics["ntp_loss"] = _trunk_loss(params, batch, trunk_ULD)
        total = total + loss.ntp_coef * metrics["ntp_loss"]
    mismatch = jnp.abs(jax.lax.stop_gradient(logprobs) - jnp.where(mask, batch.sampler_logprobs, 0.0))
    clipped = (ratio < 1 - loss.clip_eps_low) | (ratio > 1 + loss.clip_eps_high)
    return total, metrics | {
        "token_weight": jnp.sum(batch.token_weights),
        "entropy": jnp.sum(batch.token_weights * entropy),
        "clip_fraction": jnp.sum(batch.token_weights * clipped),
        "sampler_mismatch": jnp.sum(batch.token_weights * mismatch),
        "sampler_mismatch_max": jnp.max(mismatch, initial=0.0),
    }


@partial(jax.jit, static_argnames=("loss_fn", "optimizer", "num_microbatches"), donate_argnums=0)
def update(
    state: TrainState, batch: TrainBatch, *, loss_fn, optimizer, num_microbatches: int, frozen: Frozen | None = None
):
    """One optimizer step.

    A step whose loss or gradient is not finite changes neither parameters nor optimizer state, bit for bit; it is
    counted in `state.skipped`, which the next good step sets back to 0.

    Args:
        loss_fn: (policy's parameters, batch) -> (scalar, dict of scalars); a static, hashable callable.
        frozen: what the trained parameters are adapters of; None: they are the whole policy.
        num_microbatches: the batch's trunks are run in so many passes whose gradients add up.
    Returns:
        (TrainState, dict of f32 scalars: loss, grad_norm, skipped and those of the loss; names ending in _max are
        maxima, the others sums over microbatches).
    """
    value_and_grad = jax.value_and_grad(lambda params, batch: loss_fn(join(frozen, params), batch), has_aux=True)

    def split(x):
        # Every n-th trunk: each pass then has trunks of every device.
        return jnp.swapaxes(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 0, 1)

    def accumulate(total, microbatch):
        (loss, metrics), grads = value_and_grad(state.params, microbatch)
        return jax.tree.map(jnp.add, total, (loss, grads)), metrics

    if num_microbatches == 1:
        (loss, metrics), grads = value_and_grad(state.params, batch)
    else:
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), metrics = jax.lax.scan(accumulate, zero, jax.tree.map(split, batch))
        metrics = {name: v.max() if name.endswith("_max") else v.sum() for name, v in metrics.items()}

    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.where(is_finite, 0, state.skipped + 1),
    )
    return new_state, metrics | {"loss": loss, "grad_norm": grad_norm, "skipped": new_state.skipped}


@partial(jax.jit, static_argnames=("loss", "header_length"))
def policy_batch(experience: Experience, *, loss: LossConfig, header_length: int) -> TrainBatch:
    """The TrainBatch of one rollout batch: its sequences, advantages and loss weights, made over the whole of it.

    Args:
        header_length: trunk tokens before the document, which the next-token term leaves out.
    """
    tasks, rollouts = experience.tasks, experience.rollouts
    U, M, G = tasks.row_ids.shape
    lengths_UMG = rollouts.mask.sum(-1).reshape(U, M, G)
    advantages_UMG = compute_advantages(loss.advantage, experience.rewards, lengths_UMG, experience.group_mask)
    columns = jnp.arange(tasks.trunk_tokens.shape[1])
    trunk_mask = (columns >= max(1, header_length)) & (columns < tasks.trunk_lengths[:, None])
    return TrainBatch(
        sequences=to_sequences(tasks, rollouts.tokens, rollouts.mask),
        completion_mask=rollouts.mask,
        token_weights=aggregation_weights(
            loss.aggregation, rollouts.mask, jnp.repeat(experience.group_mask, G, axis=1)
        ),
        trunk_weights=trunk_mask / jnp.maximum(1, trunk_mask.sum()),
        advantages=advantages_UMG.reshape(U, M * G),
        sampler_logprobs=rollouts.sampler_logprobs,
        old_logprobs=None,
        ref_logprobs=None,
    )


def split_minibatches(batch: TrainBatch, number: int) -> list[TrainBatch]:
    """Every `number`-th trunk each, so that all devices hold a part; weights times `number` keep the loss's size."""
    if number == 1:
        return [batch]
    parts = [jax.tree.map(lambda x, i=i: x[i::number], batch) for i in range(number)]
    return [replace(p, token_weights=p.token_weights * number, trunk_weights=p.trunk_weights * number) for p in parts]
