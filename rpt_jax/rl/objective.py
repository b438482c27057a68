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
`slopes.batch_slopes` finds the derivative s_t by each log-probability first; sum_t s_t log pi(y_t) stands for its sum.

Sources: GRPO, arXiv:2402.03300 eq. 3; clip, arXiv:1707.06347 eq. 7 and arXiv:2503.14476 eq. 10 (clip-higher).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig, LossConfig
from rpt_jax.models.vocabulary_head import token_loss
from rpt_jax.rl.critic import value_loss
from rpt_jax.rl.policy_metrics import policy_metrics
from rpt_jax.rl.slopes import effective
from rpt_jax.rl.surrogates import kl_term, token_gain
from rpt_jax.scoring.logprobs import predicting_states
from rpt_jax.types import Rows


@cache
def objective_fn(config: DecoderConfig, loss: LossConfig) -> Callable:
    """Return `objective` for `update`; the same object for the same arguments, so that nothing compiles twice."""
    return partial(objective, config, effective(loss))


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

    known = replace(
        rows, sequences=None, trunk_weights=None, old_logprobs=real(rows.old_logprobs), old_values=None, returns=None,
        ref_logprobs=real(rows.ref_logprobs), sampler_logprobs=real(rows.sampler_logprobs),
    )  # fmt: skip
    hidden, targets, temperature = map(flat, (hidden_URTD, rows.sequences.branch_tokens, rows.temperature))
    terms, inputs = partial(_terms, loss), jax.tree.map(flat, (mask, known))
    total, found = token_loss(config, terms, params, hidden, targets, inputs, temperature=temperature)
    logprobs, entropy = (x.reshape(shape) for x in found)
    logprobs, metrics = real(logprobs), {}
    if rows.likelihood_weights is not None:
        metrics["completion_loss"] = -jnp.sum(rows.likelihood_weights * logprobs)
    if rows.policy_weights is None:
        return total, metrics
    if rows.returns is not None:
        metrics["value_loss"] = value_loss(loss, params, rows, hidden_URTD)
        total = total + loss.critic.coef * metrics["value_loss"]
    return total, metrics | policy_metrics(loss, known, logprobs, _old(logprobs, known), entropy)


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


def _trunk_terms(config: DecoderConfig, params, rows: Rows, trunk_ULD):
    """Return the third sum of L, at temperature 1: token l is predicted from the tokens before it."""
    targets, weights = rows.sequences.trunk_tokens[:, 1:], rows.trunk_weights[:, 1:]
    return token_loss(config, _likelihood, params, trunk_ULD[:, :-1], targets, weights, temperature=1.0)[0]


def _likelihood(logprobs, weights):
    return -weights * logprobs
