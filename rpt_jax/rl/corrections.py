"""Corrections for tokens that another policy sampled. Arrays and scalars only."""

import jax.numpy as jnp

from rpt_jax.config import CorrectionConfig


def sampler_weights(settings: CorrectionConfig, old_logprobs_URC, sampler_logprobs_URC, mask_URC):
    """Return what multiplies the terms of tokens: w = pi_old / pi_sampler, clipped or masked; 1 outside the mask.

    truncate: w clipped to [low, high] (truncated importance sampling). mask: w where it lies inside, else 0 (IcePop,
    masked importance sampling). sequence: w of all tokens of a completion together.

    Args:
        settings: mode and bounds.
        old_logprobs_URC: f32, of the policy that is updated, before its updates.
        sampler_logprobs_URC: f32, of the distribution that sampled.
        mask_URC: bool, sampled tokens.
    """
    if settings.mode == "none":
        return jnp.ones_like(old_logprobs_URC)
    log_weights = jnp.where(mask_URC, old_logprobs_URC - sampler_logprobs_URC, 0.0)
    unit, how = settings.mode.split("_")
    if unit == "sequence":
        log_weights = jnp.broadcast_to(log_weights.sum(-1, keepdims=True), log_weights.shape)
    weights = jnp.exp(log_weights)
    if how == "truncate":
        weights = jnp.clip(weights, settings.low, settings.high)
    else:
        weights = jnp.where((weights >= settings.low) & (weights <= settings.high), weights, 0.0)
    return jnp.where(mask_URC, weights, 1.0)


def keeps_sequence(max_old_drift: float, logprobs_URC, old_logprobs_URC, advantages_URC, mask_URC):
    """Return False for the tokens of sequences with a negative advantage that the policy has moved away from.

    Those have a mean log(pi_old / pi) above max_old_drift. Source: DeepSeek-V3.2, arXiv:2512.02556.
    """
    number = jnp.maximum(1, mask_URC.sum(-1, keepdims=True))
    drift = jnp.sum(jnp.where(mask_URC, old_logprobs_URC - logprobs_URC, 0.0), axis=-1, keepdims=True) / number
    return ~((advantages_URC < 0) & (drift > max_old_drift))
