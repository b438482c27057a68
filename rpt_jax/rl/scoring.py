"""Teacher-forced log-probabilities through the model's one graph: of completions, and of direct next-token laws."""

from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.vocabulary_head import next_logits, token_logprobs
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.types import Sequences, TaskBatch


def predictors(config: DecoderConfig, params, sequences: Sequences):
    """The hidden states that predict: branch tokens [U, R, T, D], and whole trunks [U, L, D].

    A completion's first token is predicted by its prompt's tail, the others by the token before.
    """
    s = sequences
    stem_UPD, branch_URTD = decoder.forward(config, params, s)
    trunk_ULD = stem_UPD[:, : s.trunk_tokens.shape[1]]
    if branch_URTD is None:
        return jnp.zeros((*s.branch_tokens.shape, stem_UPD.shape[-1]), stem_UPD.dtype), trunk_ULD
    U, R, T, D = branch_URTD.shape
    ends_UMD = decoder.tail_ends(stem_UPD, *s.tail_tokens.shape[1:])
    first = jnp.take_along_axis(ends_UMD, s.branch_prompts.reshape(U, R * T, 1), axis=1).reshape(U, R, T, D)
    before = jnp.pad(branch_URTD[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    return jnp.where((s.branch_index == 0)[..., None], first, before), trunk_ULD


def score(config: DecoderConfig, params, sequences: Sequences, *, temperature: float, trunks_at_once: int = 0):
    """Teacher-forced log-probabilities f32 [U, R, T] of branch tokens.

    Args:
        temperature: of the law that is scored; > 0.
        trunks_at_once: a divisor of U that the mesh divides, to need less memory; 0: all.
    """
    with on_mesh_of(params):
        return _score(config, params, sequences, temperature=temperature, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "temperature", "trunks_at_once"))
def _score(config: DecoderConfig, params, sequences: Sequences, *, temperature: float, trunks_at_once: int):
    U = len(sequences.trunk_tokens)
    n = trunks_at_once or U

    def of_some(some: Sequences):
        hidden_nRTD, _ = predictors(config, params, some)
        _, R, T, D = hidden_nRTD.shape
        hidden_nND, targets_nN = hidden_nRTD.reshape(n, R * T, D), some.branch_tokens.reshape(n, R * T)
        logprobs, _ = token_logprobs(config, params, hidden_nND, targets_nN, temperature=temperature)
        return logprobs.reshape(n, R, T)

    # A round's trunks lie U // n apart: each shard then has its part in every round.
    rounds = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(n, U // n, *x.shape[1:]), 1, 0), sequences)
    logprobs = jax.lax.map(of_some, rounds)
    return jnp.moveaxis(logprobs, 0, 1).reshape(U, *logprobs.shape[2:])


def direct_logprobs(config: DecoderConfig, params, batch: TaskBatch, *, header_length: int, bos_id: int | None):
    """The next-token law at every position from document tokens alone, no template: f32 [U, M, V], nats.

    Args:
        header_length: trunk tokens before the document, BOS included.
        bos_id: put before the document where the tokenizer has one.
    """
    with on_mesh_of(params):
        return _direct_logprobs(config, params, batch, header_length=header_length, bos_id=bos_id)


@partial(jax.jit, static_argnames=("config", "header_length", "bos_id"))
def _direct_logprobs(config: DecoderConfig, params, batch: TaskBatch, *, header_length: int, bos_id: int | None):
    tokens_UL = batch.trunk_tokens[:, header_length:]
    num_bos = 0 if bos_id is None else 1
    tokens_UL = jnp.pad(tokens_UL, ((0, 0), (num_bos, 0)), constant_values=bos_id or 0)
    hidden_ULD, _ = decoder.forward(config, params, decoder.trunks_alone(tokens_UL))
    last_UM = jnp.clip(batch.cuts - header_length + num_bos - 1, 0, tokens_UL.shape[1] - 1)
    hidden_UMD = jnp.take_along_axis(hidden_ULD, last_UM[..., None], axis=1)
    return jax.nn.log_softmax(next_logits(params, hidden_UMD), axis=-1)
