"""What an update logs of its policy terms: sums over tokens with the weights of the loss; `_max` are maxima."""

import jax.numpy as jnp

from rpt_jax.config import LossConfig
from rpt_jax.rl.surrogates import kl_term
from rpt_jax.types import Rows


def policy_metrics(loss: LossConfig, rows: Rows, logprobs_URT, old_logprobs_URT, entropy_URT) -> dict:
    """Return {metric: f32 scalar}.

    Args:
        loss: settings.
        rows: of the update, without values at padding.
        logprobs_URT: f32, of the policy, nats; 0 at padding.
        old_logprobs_URT: f32, before the first update.
        entropy_URT: f32, nats.
    """
    weights, mismatch = rows.policy_weights, jnp.abs(logprobs_URT - rows.sampler_logprobs)
    ratio = jnp.exp(logprobs_URT - old_logprobs_URT)
    is_clipped = (ratio < 1 - loss.clip_eps_low) | (ratio > 1 + loss.clip_eps_high)
    if rows.slopes is not None and loss.objective != "dpo":
        is_clipped = (rows.slopes == 0) & (rows.advantages != 0)
    metrics = {}
    if loss.has_kl_term:
        kl = kl_term(loss.kl_estimator, logprobs_URT, rows.ref_logprobs, old_logprobs_URT)
        metrics["kl"] = jnp.sum(weights * kl)
    return metrics | {
        "token_weight": jnp.sum(weights),
        "entropy": jnp.sum(weights * entropy_URT),
        "clip_fraction": jnp.sum(weights * is_clipped),
        "sampler_mismatch": jnp.sum(weights * mismatch),
        "sampler_mismatch_max": jnp.max(jnp.where(weights != 0, mismatch, 0.0), initial=0.0),
    }
