"""Many rows until all are done: trunks prefilled once, branches' caches hold their own tokens only.

The tail of a prompt is run once per prompt and its keys and values are handed to the G rollouts. One jitted
`while_loop` then samples a token a row; it ends when every row has stopped.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.rollout.sampling import row_keys, sample
from rpt_jax.types import Rollouts, Sequences, TaskBatch, record


def rollout_key(seed: int, step: int, round_number: int = 0):
    """The key of one rollout batch: a function of the run's seed, the step and the dynamic-sampling round."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, round_number)


@partial(
    jax.jit,
    static_argnames=("config", "max_completion_tokens", "temperature", "top_p", "top_k", "eos_id", "vocab_size"),
)
def generate(
    config: DecoderConfig,
    params,
    batch: TaskBatch,
    key,
    *,
    max_completion_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    eos_id: int,
    vocab_size: int,
) -> Rollouts:
    """Sample G completions for every prompt of the batch.

    Args:
        key: `rollout_key(...)`.
        max_completion_tokens: C.
        temperature, top_p, top_k: see `sampling.sample`.
        eos_id: a row stops after this token.
        vocab_size: the tokenizer's ids; larger model vocabularies have unused entries that are never sampled.
    """
    U, M, G = batch.row_ids.shape
    R, C, E = M * G, max_completion_tokens, batch.tail_tokens.shape[-1]
    layers = decoder.unstack_layers(config, params)
    head_VD = decoder.output_head(params)
    keys_UR = row_keys(key, batch.row_ids.reshape(U, R))
    cuts_UR, tail_lengths_UR = (jnp.repeat(a, G, axis=1) for a in (batch.cuts, batch.tail_lengths))
    slots = jnp.arange(E + C)

    def draw(hidden_URD, index) -> dict:
        logits_URV = jnp.einsum(
            "urd,vd->urv", hidden_URD, head_VD.astype(hidden_URD.dtype), preferred_element_type=jnp.float32
        )
        logits_URV = jnp.where(jnp.arange(logits_URV.shape[-1]) < vocab_size, logits_URV, -jnp.inf)
        drawn = sample(logits_URV, keys_UR, index, temperature=temperature, top_p=top_p, top_k=top_k)
        return dict(index=index, **dict(zip(("token", "logprob", "rejected"), drawn, strict=True)))

    def feed_and_draw(rows: _Rows) -> _Rows:
        """Feed the token in hand, draw the next one, record it."""
        slot = E + rows.index
        visible_URS = (slots >= E - tail_lengths_UR[..., None]) & (slots <= slot)
        hidden_UR1D, cache = decoder.extend(
            config,
            params,
            layers,
            rows.token[..., None],
            (cuts_UR + tail_lengths_UR + rows.index)[..., None],
            trunk_kv,
            cuts_UR,
            rows.cache,
            slot,
            visible_URS[:, :, None, :],
        )
        return _record_token(replace(rows, cache=cache, **draw(hidden_UR1D[:, :, 0], rows.index + 1)), eos_id)

    trunk_kv = decoder.prefill(config, params, batch.trunk_tokens)
    hidden_URD, cache = _run_tails(config, params, layers, batch, trunk_kv, C)
    rows = _Rows(
        **draw(hidden_URD, jnp.int32(0)),
        # Rows of padded positions are done from the start.
        done=~jnp.repeat(batch.position_mask, G, axis=1),
        tokens=jnp.zeros((U, R, C), jnp.int32),
        mask=jnp.zeros((U, R, C), bool),
        logprobs=jnp.zeros((U, R, C), jnp.float32),
        num_rejected=jnp.zeros((U, R), jnp.int32),
        cache=cache,
    )
    rows = jax.lax.while_loop(
        lambda r: (r.index < C - 1) & ~jnp.all(r.done), feed_and_draw, _record_token(rows, eos_id)
    )
    return Rollouts(
        tokens=rows.tokens,
        mask=rows.mask,
        sampler_logprobs=rows.logprobs,
        truncated=~rows.done,
        num_rejected=rows.num_rejected,
    )


@record
class _Rows:
    """All rows of a batch in flight. The token in hand is drawn but not yet fed."""

    index: Any  # i32 [], completion tokens before the one in hand
    token: Any  # i32 [U, R], in hand
    logprob: Any  # f32 [U, R], of the token in hand
    rejected: Any  # bool [U, R], its first draw was refused
    done: Any  # bool [U, R]
    tokens: Any  # i32 [U, R, C], recorded so far
    mask: Any  # bool [U, R, C]
    logprobs: Any  # f32 [U, R, C]
    num_rejected: Any  # i32 [U, R]
    cache: Any  # own keys and values per layer


def _record_token(rows: _Rows, eos_id: int) -> _Rows:
    """Write the token in hand into the rows that are not done; a stop token is written and ends its row."""
    alive = ~rows.done

    def write(array_URC, value_UR):
        return jax.lax.dynamic_update_index_in_dim(array_URC, value_UR, rows.index, axis=2)

    return replace(
        rows,
        tokens=write(rows.tokens, jnp.where(alive, rows.token, 0)),
        mask=write(rows.mask, alive),
        logprobs=write(rows.logprobs, jnp.where(alive, rows.logprob, 0.0)),
        num_rejected=rows.num_rejected + (alive & rows.rejected),
        done=rows.done | (rows.token == eos_id),
    )


def _run_tails(config: DecoderConfig, params, layers, batch: TaskBatch, trunk_kv, num_completion: int):
    """Run each prompt's tail once; (last hidden state [U, R, D], caches with room for completions), per rollout."""
    U, M, G = batch.row_ids.shape
    E = batch.tail_tokens.shape[-1]
    mask_UME = jnp.arange(E) >= E - batch.tail_lengths[..., None]
    hidden_UMED, cache = decoder.extend(
        config,
        params,
        layers,
        batch.tail_tokens,
        decoder.branch_positions(batch.cuts, mask_UME),
        trunk_kv,
        batch.cuts,
        decoder.empty_cache(config, U, M, E + num_completion),
        0,
        jnp.pad(decoder.own_mask(mask_UME), ((0, 0), (0, 0), (0, 0), (0, num_completion))),
    )
    return jax.tree.map(lambda a: jnp.repeat(a, G, axis=1), (hidden_UMED[:, :, -1], cache))


def to_sequences(batch: TaskBatch, tokens_URC, mask_URC) -> Sequences:
    """Trunks, and branches of tail + completion, as the update and the scorer read them."""
    G = batch.row_ids.shape[-1]
    E = batch.tail_tokens.shape[-1]
    tail_mask = jnp.arange(E) >= E - batch.tail_lengths[..., None]
    tails, tail_mask, cuts = (jnp.repeat(a, G, axis=1) for a in (batch.tail_tokens, tail_mask, batch.cuts))
    return Sequences(
        trunk_tokens=batch.trunk_tokens,
        cuts=cuts,
        branch_tokens=jnp.concatenate([tails, tokens_URC], axis=-1),
        branch_mask=jnp.concatenate([tail_mask, mask_URC], axis=-1),
    )
