"""TrainState and TrainBatch in, TrainState and metrics out: one forward and backward over trunks and branches.

RPT and supervised training differ in one function, `policy_loss` or `supervised_loss`; everything else is shared.
Loss weights are made for the whole global batch before it is split, so microbatches and devices just add up.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig, LossConfig, OptimizerConfig
from rpt_jax.models.lora import Frozen, join
from rpt_jax.models.vocabulary_head import token_loss
from rpt_jax.parallel.mesh import on_mesh_of, replicated
from rpt_jax.rl.advantages import compute_advantages
from rpt_jax.rl.losses import aggregation_weights, clipped_surrogate, kl_term
from rpt_jax.rl.scoring import predictors
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


@cache
def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a stage of `num_steps` updates: clip, then AdamW or Muon, at the scheduled rate.

    The same object for the same arguments: an update is compiled once for each.
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
    """Step 0 around `params`; optimizer moments lie where their parameters do."""
    abstract = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=state_shardings(abstract, params, mesh))(params)
    # Two buffers: the state is donated, and one buffer cannot be donated twice.
    step, skipped = (jax.device_put(jnp.int32(0), replicated(mesh)) for _ in range(2))
    return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped)


def state_shardings(abstract_state, params, mesh: Mesh):
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


def _weighted_logprobs(logprobs, weights):
    return -weights * logprobs


def _trunk_loss(config: DecoderConfig, params, batch: TrainBatch, trunk_ULD):
    """Weighted next-token loss on trunk tokens at temperature 1."""
    loss, _ = token_loss(
        config,
        _weighted_logprobs,
        params,
        trunk_ULD[:, :-1],
        batch.sequences.trunk_tokens[:, 1:],
        batch.trunk_weights[:, 1:],
        temperature=1.0,
    )
    return loss


def _branch_loss(config: DecoderConfig, term_fn, params, batch: TrainBatch, hidden_URTD, inputs, temperature: float):
    """(loss, logprobs [U, R, T], entropy [U, R, T]) of branch tokens; see `vocabulary_head.token_loss`."""
    shape = hidden_URTD.shape[:3]

    def flat(x_URT):
        return x_URT.reshape(shape[0], shape[1] * shape[2], *x_URT.shape[3:])

    loss, of_tokens = token_loss(
        config,
        term_fn,
        params,
        flat(hidden_URTD),
        flat(batch.sequences.branch_tokens),
        jax.tree.map(flat, inputs),
        temperature=temperature,
    )
    return loss, *(x.reshape(shape) for x in of_tokens)


def supervised_loss(config: DecoderConfig, params, batch: TrainBatch):
    """-(weights * log-probabilities).sum() over trunk and completion tokens; weights sum to 1 over the global batch."""
    hidden_URTD, trunk_ULD = predictors(config, params, batch.sequences)
    completion = jnp.float32(0)
    if hidden_URTD.shape[1]:
        completion, _, _ = _branch_loss(
            config, _weighted_logprobs, params, batch, hidden_URTD, batch.token_weights, temperature=1.0
        )
    trunk = _trunk_loss(config, params, batch, trunk_ULD)
    return completion + trunk, {"completion_loss": completion, "trunk_loss": trunk}


def _policy_terms(loss: LossConfig, logprobs, inputs):
    """Terms of the loss, to be minimised and summed. `inputs` is a TrainBatch's own tokens."""
    # Padding holds arbitrary tokens: its terms must not reach a product with weight 0 as inf or NaN.
    logprobs = jnp.where(inputs["mask"], logprobs, 0.0)
    ratio = jnp.exp(logprobs - _old_logprobs(logprobs, inputs))
    terms = clipped_surrogate(
        ratio, inputs["advantages"], clip_eps_low=loss.clip_eps_low, clip_eps_high=loss.clip_eps_high
    )
    if inputs["ref"] is not None:
        terms = terms - loss.kl_coef * kl_term(loss.kl_estimator, logprobs, inputs["ref"])
    return -inputs["weights"] * terms


def _old_logprobs(logprobs, inputs):
    """With one update per batch they are the present ones, without a gradient."""
    return jax.lax.stop_gradient(logprobs) if inputs["old"] is None else inputs["old"]


def _without_padding(logprobs, mask):
    return None if logprobs is None else jnp.where(mask, logprobs, 0.0)


def policy_loss(config: DecoderConfig, loss: LossConfig, temperature: float, params, batch: TrainBatch):
    """GRPO's loss (arXiv:2402.03300 eq. 3) with the configured advantage, aggregation, clip and KL.

    Log-probabilities are those of the rollout temperature. With one update per batch `old_logprobs` is None and the
    ratio is exactly 1.
    """
    mask, weights = batch.sequences.branch_mask, batch.token_weights
    hidden_URTD, trunk_ULD = predictors(config, params, batch.sequences)
    inputs = {
        "mask": mask,
        "weights": weights,
        "advantages": batch.advantages,
        "old": _without_padding(batch.old_logprobs, mask),
        "ref": _without_padding(batch.ref_logprobs, mask),
    }
    terms = partial(_policy_terms, loss)
    total, logprobs, entropy = _branch_loss(config, terms, params, batch, hidden_URTD, inputs, temperature)
    logprobs = _without_padding(logprobs, mask)
    metrics = {}
    if batch.ref_logprobs is not None:
        metrics["kl"] = jnp.sum(weights * kl_term(loss.kl_estimator, logprobs, inputs["ref"]))
    if loss.ntp_coef:
        metrics["ntp_loss"] = _trunk_loss(config, params, batch, trunk_ULD)
        total = total + loss.ntp_coef * metrics["ntp_loss"]
    ratio = jnp.exp(logprobs - _old_logprobs(logprobs, inputs))
    clipped = (ratio < 1 - loss.clip_eps_low) | (ratio > 1 + loss.clip_eps_high)
    mismatch = jnp.abs(logprobs - _without_padding(batch.sampler_logprobs, mask))
    return total, metrics | {
        "token_weight": jnp.sum(weights),
        "entropy": jnp.sum(weights * entropy),
        "clip_fraction": jnp.sum(weights * clipped),
        "sampler_mismatch": jnp.sum(weights * mismatch),
        "sampler_mismatch_max": jnp.max(mismatch, initial=0.0),
    }


@cache
def policy_loss_fn(config: DecoderConfig, loss: LossConfig, temperature: float) -> Callable:
    """`policy_loss` as `update` takes it; the same object for the same arguments."""
    return partial(policy_loss, config, loss, temperature)


@cache
def supervised_loss_fn(config: DecoderConfig) -> Callable:
    """`supervised_loss` as `update` takes it; the same object for the same arguments."""
    return partial(supervised_loss, config)


def update(
    state: TrainState, microbatches: Sequence[TrainBatch], *, loss_fn, optimizer, frozen: Frozen | None = None
) -> tuple[TrainState, dict]:
    """One optimizer step; `state` is donated.

    A step whose loss or gradient is not finite changes neither parameters nor optimizer state, bit for bit; it is
    counted in `state.skipped`, which the next good step sets back to 0.

    Args:
        microbatches: run one after the other; their gradients add up. Their shapes may differ.
        loss_fn: (policy's parameters, batch) -> (scalar, dict of scalars); a static, hashable callable.
        frozen: what the trained parameters are adapters of; None: they are the whole policy.
    Returns:
        (TrainState, dict of f32 scalars: loss, grad_norm, skipped and those of the loss; names ending in _max are
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
    """Apart from `apply_gradients`, which is then compiled once whatever the number of microbatches."""
    stacked = {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
    return {name: v.max() if name.endswith("_max") else v.sum() for name, v in stacked.items()}


@partial(jax.jit, static_argnames="shardings")
def _zeros_like(params, shardings: tuple):
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.zeros_like, params))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings))


@partial(jax.jit, static_argnames=("loss_fn", "shardings"), donate_argnames="total")
def add_gradients(total, params, frozen, batch: TrainBatch, *, loss_fn, shardings: tuple):
    """A microbatch's gradients added to `total`, lying as the parameters do; and its metrics, the loss among them."""
    value_and_grad = jax.value_and_grad(lambda params: loss_fn(join(frozen, params), batch), has_aux=True)
    (loss, metrics), gradients = value_and_grad(params)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.add, total, gradients))
    return tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, shardings)), metrics | {"loss": loss}


@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def apply_gradients(state: TrainState, gradients, metrics: dict, *, optimizer) -> tuple[TrainState, dict]:
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
    )
    return new_state, metrics | {"grad_norm": grad_norm, "skipped": new_state.skipped}


@partial(jax.jit, static_argnames=("loss", "header_length"))
def policy_batch(experience: Experience, *, loss: LossConfig, header_length: int) -> TrainBatch:
    """The TrainBatch of one rollout batch: its sequences, advantages and loss weights, made over the whole of it.

    Weights are times the number of minibatches, so that each minibatch has a loss of the usual size.

    Args:
        header_length: trunk tokens before the document, which the next-token term leaves out.
    """
    tasks, rollouts = experience.tasks, experience.rollouts
    U, M, G = tasks.row_ids.shape
    lengths_UMG = rollouts.mask.sum(-1).reshape(U, M, G)
    # A row that was sampled from numbers that are none makes the update one that is skipped.
    is_sound_UMG = jnp.isfinite(jnp.sum(rollouts.sampler_logprobs, axis=-1)).reshape(U, M, G)
    rewards_UMG = jnp.where(is_sound_UMG, experience.rewards, jnp.nan)
    advantages_UMG = compute_advantages(loss.advantage, rewards_UMG, lengths_UMG, experience.group_mask)
    columns = jnp.arange(tasks.trunk_tokens.shape[1])
    trunk_mask = (columns >= max(1, header_length)) & (columns < tasks.trunk_lengths[:, None])
    weights_URC = aggregation_weights(loss.aggregation, rollouts.mask, jnp.repeat(experience.group_mask, G, axis=1))
    return TrainBatch(
        sequences=to_sequences(tasks, rollouts.tokens, rollouts.mask),
        token_weights=loss.num_minibatches * weights_URC,
        trunk_weights=loss.num_minibatches * trunk_mask / jnp.maximum(1, trunk_mask.sum()),
        advantages=jnp.broadcast_to(advantages_UMG.reshape(U, M * G, 1), rollouts.mask.shape),
        sampler_logprobs=rollouts.sampler_logprobs,
        old_logprobs=None,
        ref_logprobs=None,
    )
