"""The answer that a policy gives after each thought, and after all thoughts of a prompt together, token by token.

The mixture is the mean of the distributions after a prompt's G thoughts. It is what the policy believes once the
thought is summed out: p(x | context) = mean_i p(x | context, thought_i).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models.vocabulary_head import next_logits, without_unused
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.scoring.entropy import NUM_TOP_TOKENS, top_k
from rpt_jax.scoring.logprobs import in_rounds, predicting_states
from rpt_jax.types import Sequences, record


@record
class Answers:
    """The first token of answers, at temperature 1."""

    tokens: Any  # i32 [U, R], most likely token after each thought
    logprobs: Any  # f32 [U, R], of the reference's first token, nats
    mixture_tokens: Any  # i32 [U, M, 16], most likely tokens of the mixture, the first one first
    mixture_probabilities: Any  # f32 [U, M, 16], of these tokens
    mixture_logprobs: Any  # f32 [U, M], of the reference's first token, nats


def answer_statistics(
    config: DecoderConfig,
    params,
    sequences: Sequences,
    first_UR,
    targets_UR,
    *,
    num_prompts: int,
    trunks_at_once: int = 0,
) -> Answers:
    """Read the distribution at one place of each row.

    Args:
        config, params: of the model.
        sequences: a row per thought, G rows for each prompt, with at least one token from `first` on.
        first_UR: i32, index of the answer's first token in its row.
        targets_UR: i32, the true first token.
        num_prompts: M.
        trunks_at_once: see `logprobs.in_rounds`.
    """
    with on_mesh_of(params):
        return _answer_statistics(
            config, params, (sequences, first_UR, targets_UR), num_prompts=num_prompts, trunks_at_once=trunks_at_once
        )


@partial(jax.jit, static_argnames=("config", "num_prompts", "trunks_at_once"))
def _answer_statistics(config: DecoderConfig, params, rows, *, num_prompts: int, trunks_at_once: int) -> Answers:
    def of_some(some) -> Answers:
        sequences, first_nR, targets_nR = some
        logprobs_nRV = _next_logprobs(config, params, sequences, first_nR)
        n, R, V = logprobs_nRV.shape
        by_prompt = logprobs_nRV.reshape(n, num_prompts, R // num_prompts, V)
        mixture_nMV = jax.nn.logsumexp(by_prompt, axis=2) - jnp.log(R // num_prompts)
        of_prompt_nM = targets_nR.reshape(n, num_prompts, -1)[..., 0]
        top, tokens = top_k(mixture_nMV.reshape(-1, V), min(NUM_TOP_TOKENS, V))
        return Answers(
            tokens=jnp.argmax(logprobs_nRV, axis=-1),
            logprobs=_chosen(logprobs_nRV, targets_nR),
            mixture_tokens=tokens.reshape(n, num_prompts, -1),
            mixture_probabilities=jnp.exp(top).reshape(n, num_prompts, -1),
            mixture_logprobs=_chosen(mixture_nMV, of_prompt_nM),
        )

    return in_rounds(of_some, rows, trunks_at_once)


def choice_logprobs(
    config: DecoderConfig, params, sequences: Sequences, first_UR, ids_K: tuple[int, ...], *, trunks_at_once: int = 0
):
    """Return the log-probabilities of some tokens at one place of each row, f32 [U, R, K], nats, at temperature 1.

    Arguments as in `answer_statistics`; ids_K are the tokens.
    """
    with on_mesh_of(params):
        return _choice_logprobs(config, params, (sequences, first_UR), ids_K=ids_K, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "ids_K", "trunks_at_once"))
def _choice_logprobs(config: DecoderConfig, params, rows, *, ids_K: tuple[int, ...], trunks_at_once: int):
    def of_some(some):
        return _next_logprobs(config, params, *some)[..., jnp.asarray(ids_K)]

    return in_rounds(of_some, rows, trunks_at_once)


def _next_logprobs(config: DecoderConfig, params, sequences: Sequences, first_nR):
    """Return the distribution at one place of each row, f32 [n, R, V], nats. One token per row, so it is small."""
    hidden_nRTD, _ = predicting_states(config, params, sequences)
    hidden_nRD = jnp.take_along_axis(hidden_nRTD, first_nR[..., None, None], axis=2)[:, :, 0]
    return jax.nn.log_softmax(without_unused(config, next_logits(params, hidden_nRD)))


def _chosen(values_V, ids):
    """Return values[..., ids]."""
    return jnp.take_along_axis(values_V, ids[..., None], axis=-1)[..., 0]
