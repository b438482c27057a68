"""The whole loss on one page.

    L = - sum_t w_t [gain_t - beta KL_t]          policy, completion tokens
        - sum_t v_t log pi(y_t)                   likelihood, completion tokens
        - sum_l u_l log pi(x_l)                   next token, trunk tokens
        + c sum_t w_t value_loss(V_t, R_t)        critic, completion tokens

    gain_t = min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t) or another objective (`surrogates.py`)
    rho_t = pi(y_t) / pi_old(y_t)

The weights w, v, u are normalised over the whole global batch (`rows.py`), so microbatches and devices add up. RPT uses
w, or w and u; supervised training uses v and u. Each token has its own temperature. Logits are computed once, in
chunks, for terms and gradients (`models/vocabulary_head.token_loss`). Of an objective that ties tokens together,
`batch_slopes` finds the derivative s_t by each log-probability first, and sum_t s_t log pi(y_t) stands for its sum.

Sources: GRPO, arXiv:2402.03300 eq. 3; clip, arXiv:1707.06347 eq. 7 and arXiv:2503.14476 eq. 10 (clip-higher).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig, LossConfig
from rpt_jax.models.lora import VALUE
from rpt_jax.models.vocabulary_head import token_loss
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.rl.advantages import TOKEN_ADVANTAGES
from rpt_jax.rl.corrections import clipped_value_loss, keeps_sequence, sampler_weights
from rpt_jax.rl.surrogates import (
    BATCH_OBJECTIVES,
    INERT_AT_ONE,
    INERT_PER_TOKEN,
    batch_gain,
    dpo,
    kl_term,
    pair_margins,
    token_gain,
)
from rpt_jax.scoring.logprobs import in_rounds, predicting_states
from rpt_jax.types import Rows, Sequences


@cache
def objective_fn(config: DecoderConfig, loss: LossConfig) -> Callable:
    """Return `objective` for `update`; the same object for the same arguments, so that nothing compiles twice."""
    return partial(objective, config, effective(loss))


def effective(loss: LossConfig) -> LossConfig:
    """Return the loss with objectives that one update per batch makes equal to ppo named so; they share its program."""
    if loss.num_minibatches > 1:
        return loss
    # A sequence's objective spreads its tokens' advantages over it, so these must be one number.
    per_token = loss.advantage in TOKEN_ADVANTAGES or loss.correction.mode.startswith("token")
    is_inert = loss.objective in (INERT_PER_TOKEN if per_token else INERT_AT_ONE)
    name = "ppo" if is_inert else loss.objective
    return replace(loss, objective=name, surrogate=replace(loss.surrogate, dual_clip=0.0))


def objective(config: DecoderConfig, loss: LossConfig, params, rows: Rows):
    """Compute L.

    Returns:
        (L f32, {metric: f32 scalar}: sums over tokens with the weights of the loss; names ending in _max are maxima).
    """
    hidden_URTD, trunk_ULD = predicting_states(config, params, rows.sequences)
    total, metrics = jnp.float32(0), {}
    if hidden_URTD.shape[1]:
        total, of_completions = _completion_terms(config, loss, params, rows, hidden_URTD)
        metrics |= of_completions
    if rows.trunk_weights is not None:
        metrics["trunk_loss"] = _trunk_terms(config, params, rows, trunk_ULD)
        total = total + metrics["trunk_loss"]
    return total, metrics


def _completion_terms(config: DecoderConfig, loss: LossConfig, params, rows: Rows, hidden_URTD):
    mask, shape = rows.sequences.branch_mask, hidden_URTD.shape[:3]

    def real(logprobs):
        # Padding holds arbitrary tokens: inf or NaN times weight 0 would be NaN.
        return None if logprobs is None else jnp.where(mask, logprobs, 0.0)

    def flat(x_URT):
        return x_URT.reshape(shape[0], shape[1] * shape[2], *x_URT.shape[3:])

    # For each token: its mask and the inputs of its terms, except the log-probability.
    tokens = mask, replace(
        rows, sequences=None, trunk_weights=None, old_logprobs=real(rows.old_logprobs),
        ref_logprobs=real(rows.ref_logprobs), old_values=None, returns=None,
    )  # fmt: skip
    hidden, targets, temperature = map(flat, (hidden_URTD, rows.sequences.branch_tokens, rows.temperature))
    terms, inputs = partial(_terms, loss), jax.tree.map(flat, tokens)
    total, found = token_loss(config, terms, params, hidden, targets, inputs, temperature=temperature)
    logprobs, entropy = (x.reshape(shape) for x in found)
    logprobs, metrics = real(logprobs), {}
    if rows.likelihood_weights is not None:
        metrics["completion_loss"] = -jnp.sum(rows.likelihood_weights * logprobs)
    if rows.policy_weights is None:
        return total, metrics
    weights, mismatch = rows.policy_weights, jnp.abs(logprobs - real(rows.sampler_logprobs))
    old = _old(logprobs, tokens[1])
    ratio = jnp.exp(logprobs - old)
    is_clipped = (ratio < 1 - loss.clip_eps_low) | (ratio > 1 + loss.clip_eps_high)
    if rows.slopes is not None and loss.objective != "dpo":
        is_clipped = (rows.slopes == 0) & (rows.advantages != 0)
    if loss.has_kl_term:
        metrics["kl"] = jnp.sum(weights * kl_term(loss.kl_estimator, logprobs, real(rows.ref_logprobs), old))
    if rows.returns is not None:
        metrics["value_loss"] = _value_loss(loss, params, rows, hidden_URTD)
        total = total + loss.critic.coef * metrics["value_loss"]
    return total, metrics | {
        "token_weight": jnp.sum(weights),
        "entropy": jnp.sum(weights * entropy),
        "clip_fraction": jnp.sum(weights * is_clipped),
        "sampler_mismatch": jnp.sum(weights * mismatch),
        "sampler_mismatch_max": jnp.max(jnp.where(weights != 0, mismatch, 0.0), initial=0.0),
    }


def _old(logprobs, rows: Rows):
    """Return log pi_old. With one update per batch it is stop_gradient(log pi), so rho is exactly 1."""
    return jax.lax.stop_gradient(logprobs) if rows.old_logprobs is None else rows.old_logprobs


def _terms(loss: LossConfig, logprobs, inputs):
    """Return the terms of the first two sums of L."""
    mask, rows = inputs
    logprobs = jnp.where(mask, logprobs, 0.0)
    terms = jnp.zeros_like(logprobs)
    if rows.policy_weights is not None:
        # A token without this term, such as a reference's, may have any ratio: inf times weight 0 would be NaN.
        has_term = rows.policy_weights != 0
        known, old = jnp.where(has_term, logprobs, 0.0), jnp.where(has_term, _old(logprobs, rows), 0.0)
        gain = jnp.zeros_like(logprobs)
        if rows.slopes is None:
            gain = token_gain(loss, known, old, rows.advantages)
        if loss.has_kl_term:
            gain = gain - loss.kl_coef * kl_term(loss.kl_estimator, known, rows.ref_logprobs, old)
        terms = -rows.policy_weights * gain
        if rows.slopes is not None:
            terms = terms - rows.slopes * known
    return terms if rows.likelihood_weights is None else terms - rows.likelihood_weights * logprobs


def _value_loss(loss: LossConfig, params, rows: Rows, hidden_URTD):
    """Return the fourth sum of L, without c; its gradient reaches the policy through the hidden states."""
    values = read_values(params, hidden_URTD)
    # A token without a term has weight 0, and may hold anything.
    has_term = rows.policy_weights != 0
    old, returns = (jnp.where(has_term, x, 0.0) for x in (rows.old_values, rows.returns))
    terms = clipped_value_loss(jnp.where(has_term, values, 0.0), old, returns, clip=loss.critic.clip)
    return jnp.sum(rows.policy_weights * terms)


def read_values(params, hidden_D):
    """Return the critic's value f32 [...] of hidden states [..., D] after the final norm."""
    weights, bias = params[VALUE][:-1], params[VALUE][-1]
    return jnp.einsum("...d,d->...", hidden_D, weights, preferred_element_type=jnp.float32) + bias


def score_values(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int = 0):
    """Return the critic's value of the state before each branch token, f32 [U, R, T]; arguments as in `score`."""
    with on_mesh_of(params):
        return _score_values(config, params, sequences, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "trunks_at_once"))
def _score_values(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int):
    def of_some(some: Sequences):
        return read_values(params, predicting_states(config, params, some)[0])

    return in_rounds(of_some, sequences, trunks_at_once)


def _trunk_terms(config: DecoderConfig, params, rows: Rows, trunk_ULD):
    """Return the third sum of L, at temperature 1: token l is predicted from the tokens before it."""
    targets, weights = rows.sequences.trunk_tokens[:, 1:], rows.trunk_weights[:, 1:]
    return token_loss(config, _likelihood, params, trunk_ULD[:, :-1], targets, weights, temperature=1.0)[0]


def _likelihood(logprobs, weights):
    return -weights * logprobs


# --- Before an update ---------------------------------------------------------------------------------------------


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
