"""Many rows until all are done: trunks prefilled once, branches' caches hold their own tokens only.

The tail of a prompt is run once per prompt and its keys and values are handed to the G rollouts. One jitted
`while_loop` then samples a token a row; it ends when every row has stopped.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.rollout.sampling import row_keys, sample
from rpt_jax.types import Rollouts, Sequences, TaskBatch


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
    S = E + C
    layers = decoder.unstack_layers(config, params)
    head_VD = decoder.output_head(params)
    trunk_kv = decoder.prefill(config, params, batch.trunk_tokens)
    keys_UR = row_keys(key, batch.row_ids.reshape(U, R))

    def next_token(hidden_URD, token_index):
        logits_URV = jnp.einsum(
            "urd,vd->urv", hidden_URD, head_VD.astype(hidden_URD.dtype), preferred_element_type=jnp.float32
        )
        logits_URV = jnp.where(jnp.arange(logits_URV.shape[-1]) < vocab_size, logits_URV, -jnp.inf)
        return sample(logits_URV, keys_UR, token_index, temperature=temperature, top_p=top_p, top_k=top_k)

    # The tail, once per prompt.
    tail_mask_UME = jnp.arange(E) >= E - batch.tail_lengths[..., None]
    hidden_UMED, cache = decoder.extend(
        config,
        params,
        layers,
        batch.tail_tokens,
        decoder.branch_positions(batch.cuts, tail_mask_UME),
        trunk_kv,
        batch.cuts,
        decoder.empty_cache(config, U, M, S),
        0,
        jnp.pad(decoder.own_mask(tail_mask_UME), ((0, 0), (0, 0), (0, 0), (0, C))),
    )
    cache = jax.tree.map(lambda a: jnp.repeat(a, G, axis=1), cache)
    cuts_UR, tail_lengths_UR = (jnp.repeat(a, G, axis=1) for a in (batch.cuts, batch.tail_lengths))
    tail_visible_URS = jnp.pad(jnp.repeat(tail_mask_UME, G, axis=1), ((0, 0), (0, 0), (0, C)))

    # Rows of padded positions are done from the start.
    padded_UR = ~jnp.repeat(batch.position_mask, G, axis=1)
    token, logprob, rejected = next_token(jnp.repeat(hidden_UMED[:, :, -1], G, axis=1), 0)
    empty = jnp.zeros((U, R, C))
    carry = dict(
        index=jnp.int32(0),
        token=token,
        logprob=logprob,
        rejected=rejected,
        done=padded_UR,
        tokens=empty.astype(jnp.int32),
        mask=empty.astype(bool),
        logprobs=empty.astype(jnp.float32),
        num_rejected=jnp.zeros((U, R), jnp.int32),
        cache=cache,
    )

    def write(array_URC, value_UR, index):
        return jax.lax.dynamic_update_index_in_dim(array_URC, value_UR, index, axis=2)

    def keep(c):
        """Record the token in hand for the rows that are still alive."""
        alive = ~c["done"]
        return c | dict(
            tokens=write(c["tokens"], jnp.where(alive, c["token"], 0), c["index"]),
            mask=write(c["mask"], alive, c["index"]),
            logprobs=write(c["logprobs"], jnp.where(alive, c["logprob"], 0.0), c["index"]),
            num_rejected=c["num_rejected"] + (alive & c["rejected"]),
            done=c["done"] | (c["token"] == eos_id),
        )

    def body(c):
        """Feed the token in hand, draw the next one, record it."""
        slot = E + c["index"]
        own_slots = (jnp.arange(S) >= E) & (jnp.arange(S) <= slot)
        hidden_UR1D, cache = decoder.extend(
            config,
            params,
            layers,
            c["token"][..., None],
            (cuts_UR + tail_lengths_UR + c["index"])[..., None],
            trunk_kv,
            cuts_UR,
            c["cache"],
            slot,
            (tail_visible_URS | own_slots)[:, :, None, :],
        )
        index = c["index"] + 1
        token, logprob, rejected = next_token(hidden_UR1D[:, :, 0], index)
        return keep(c | dict(index=index, token=token, logprob=logprob, rejected=rejected, cache=cache))

    end = jax.lax.while_loop(lambda c: (c["index"] < C - 1) & ~jnp.all(c["done"]), body, keep(carry))
    return Rollouts(
        tokens=end["tokens"],
        mask=end["mask"],
        sampler_logprobs=end["logprobs"],
        truncated=~end["done"],
        num_rejected=end["num_rejected"],
    )


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
