"""Teacher-forced log-probabilities through the model's one graph: of completions, and of direct next-token laws."""

from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.types import Sequences, TaskBatch


def completion_logprobs(config: DecoderConfig, params, sequences: Sequences, num_completion: int, temperature: float):
    """Teacher-forced log-probabilities and entropies of completion tokens.

    Args:
        num_completion: C, the last columns of the branches.
        temperature: of the law that is scored; > 0.
    Returns:
        (logprobs f32 [U, R, C], entropy f32 [U, R, C], trunk hidden states [U, L, D]).
    """
    trunk_ULD, branch_URTD = decoder.forward(config, params, sequences)
    U, R, T = sequences.branch_tokens.shape
    C = num_completion
    if not R:
        empty = jnp.zeros((U, 0, C))
        return empty, empty, trunk_ULD
    hidden = branch_URTD[:, :, T - C - 1 : T - 1].reshape(U, R * C, -1)
    targets = sequences.branch_tokens[:, :, T - C :].reshape(U, R * C)
    both = decoder.token_logprobs(decoder.output_head(params), hidden, targets, temperature=temperature)
    logprobs, entropy = (x.reshape(U, R, C) for x in both)
    return logprobs, entropy, trunk_ULD


@partial(jax.jit, static_argnames=("config", "num_completion", "temperature"))
def score(config: DecoderConfig, params, sequences: Sequences, *, num_completion: int, temperature: float):
    """Log-probabilities f32 [U, R, C] of completion tokens, for old and reference policies."""
    return completion_logprobs(config, params, sequences, num_completion, temperature)[0]


@partial(jax.jit, static_argnames=("config", "header_length", "bos_id"))
def direct_logprobs(config: DecoderConfig, params, batch: TaskBatch, *, header_length: int, bos_id: int | None):
    """The next-token law at every position from document tokens alone, no template: f32 [U, M, V], nats.

    Args:
        header_length: trunk tokens before the document, BOS included.
        bos_id: put before the document where the tokenizer has one.
    """
    tokens_UL = batch.trunk_tokens[:, header_length:]
    num_bos = 0 if bos_id is None else 1
    tokens_UL = jnp.pad(tokens_UL, ((0, 0), (num_bos, 0)), constant_values=bos_id or 0)
    hidden_ULD, _ = decoder.forward(config, params, decoder.empty_branches(tokens_UL))
    last_UM = jnp.clip(batch.cuts - header_length + num_bos - 1, 0, tokens_UL.shape[1] - 1)
    hidden_UMD = jnp.take_along_axis(hidden_ULD, last_UM[..., None], axis=1)
    logits = jnp.einsum(
        "umd,vd->umv",
        hidden_UMD,
        decoder.output_head(params).astype(hidden_UMD.dtype),
        preferred_element_type=jnp.float32,
    )
    return jax.nn.log_softmax(logits, axis=-1)
