"""What an update computes before it runs: which objective it is, corrected advantages, and slopes.

An objective that ties tokens together has no term per token. Its derivative by each log-probability, its slopes, stand
for it in the loss (`objective.py`), so packing, microbatches and devices do not matter.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import LossConfig
from rpt_jax.rl.advantages import TOKEN_ADVANTAGES
from rpt_jax.rl.corrections import keeps_sequence, sampler_weights
from rpt_jax.rl.surrogates import BATCH_OBJECTIVES, INERT_AT_ONE, INERT_PER_TOKEN, batch_gain, dpo, pair_margins
from rpt_jax.types import Rows


def effective(loss: LossConfig) -> LossConfig:
    """Return the loss with objectives that one update per batch makes equal to ppo named so; they share its program."""
    if loss.num_minibatches > 1:
        return loss
    # A sequence's objective spreads its tokens' advantages over it, so these must be one number.
    per_token = loss.advantage in TOKEN_ADVANTAGES or loss.correction.mode.startswith("token")
    is_inert = loss.objective in (INERT_PER_TOKEN if per_token else INERT_AT_ONE)
    name = "ppo" if is_inert else loss.objective
    return replace(loss, objective=name, surrogate=replace(loss.surrogate, dual_clip=0.0))


@partial(jax.jit, static_argnames="loss")
def corrected(loss: LossConfig, rows: Rows) -> Rows:
    """Return the rows with `loss.correction`'s weights in their advantages, which every objective multiplies.

    With one update per batch nothing else reads the old log-probabilities: the ratio is exactly 1.
    """
    mask = rows.policy_weights != 0
    weights = sampler_weights(loss.correction, rows.old_logprobs, rows.sampler_logprobs, mask)
    old = rows.old_logprobs if loss.num_minibatches > 1 else None
    return replace(rows, advantages=rows.advantages * weights, old_logprobs=old)


def has_slopes(loss: LossConfig) -> bool:
    """Return whether the rows of an update carry slopes."""
    return effective(loss).objective in BATCH_OBJECTIVES


def needs_slopes(loss: LossConfig) -> bool:
    """Return whether an update needs `batch_slopes` first."""
    return has_slopes(loss) or (loss.correction.max_old_drift > 0 and loss.num_minibatches > 1)


def num_scorings(loss: LossConfig) -> int:
    """Return how many passes over the update's tokens come before it."""
    return loss.needs_old + loss.has_reference + loss.has_critic + needs_slopes(loss)


@partial(jax.jit, static_argnames="loss")
def batch_slopes(loss: LossConfig, rows: Rows, logprobs_URC, minibatch, prompts_like_UMG) -> tuple[Rows, jax.Array]:
    """Return (rows for the update of one minibatch, what to add to the loss that it reports, f32).

    Args:
        loss: settings; a batch objective, or one with a limit on the drift of sequences.
        rows: one row per completion, of the whole global batch, not packed.
        logprobs_URC: f32, of the policy before this update, in the minibatch.
        minibatch: i32, number of the minibatch, which holds trunks i, i + n, i + 2n, ...
        prompts_like_UMG: any array of this shape.
    """
    is_in = (jnp.arange(len(logprobs_URC)) % loss.num_minibatches == minibatch)[:, None, None]
    mask = (rows.policy_weights != 0) & is_in
    logprobs = jnp.where(mask, logprobs_URC, 0.0)
    old = logprobs if rows.old_logprobs is None else jnp.where(mask, rows.old_logprobs, 0.0)
    if loss.correction.max_old_drift:
        keeps = keeps_sequence(loss.correction.max_old_drift, logprobs, old, rows.advantages, mask)
        rows = replace(rows, advantages=jnp.where(keeps | ~mask, rows.advantages, 0.0))
    if not has_slopes(loss):
        return rows, jnp.float32(0)

    def total(logprobs):
        if loss.objective != "dpo":
            gain = batch_gain(loss, logprobs, old, rows.advantages, mask)
            return jnp.sum(jnp.where(mask, rows.policy_weights * gain, 0.0))
        log_ratio = jnp.where(mask, logprobs - rows.ref_logprobs, 0.0).sum(-1).reshape(prompts_like_UMG.shape)
        ranks = rows.advantages[..., 0].reshape(prompts_like_UMG.shape)
        margins, is_pair = pair_margins(log_ratio, ranks, mask.any(-1).reshape(prompts_like_UMG.shape))
        terms = jnp.where(is_pair, dpo(margins, beta=loss.surrogate.dpo_beta), 0.0)
        return terms.sum() / jnp.maximum(1, is_pair.sum())

    value, slopes = jax.value_and_grad(total)(logprobs)
    return replace(rows, slopes=slopes), jnp.sum(slopes * logprobs) - value
