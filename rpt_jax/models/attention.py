"""Attention of trunks to themselves, and of branches to the stem they share and to themselves.

A stem is a trunk with the tails of its prompts behind it. All branches of a trunk meet the stem's keys in one matrix
product; those keys are never repeated per branch. Scores and softmax are float32 whatever the activations are.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.types import record

# Finite, so that a row with no visible slot (padding) yields numbers rather than NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What depends on the machine, and nothing else does."""

    keys_transposed: bool
    """Keys are kept [.., Q, S] instead of [.., S, Q]: both products of decoding then read contiguously."""
    trunk_attention: Literal["xla", "cudnn", "splash"]
    """Kernel of a trunk's attention to itself."""
    max_scores: int
    """Attention scores (numbers) of branches that are made at once; more are made block by block, twice in training."""
    max_logits: int
    """Logits (numbers) that are made at once."""


# CPU: measured, experiments/benchmarks/rollout.py and update.py. The others follow the kernels' own layouts.
KERNELS = {
    "cpu": Kernels(keys_transposed=True, trunk_attention="xla", max_scores=2**28, max_logits=2**23),
    "gpu": Kernels(keys_transposed=False, trunk_attention="cudnn", max_scores=2**29, max_logits=2**28),
    "tpu": Kernels(keys_transposed=False, trunk_attention="splash", max_scores=2**29, max_logits=2**28),
}


def kernels_of(config: DecoderConfig) -> Kernels:
    """Kernels and layouts for config.platform, or for the machine at hand."""
    return KERNELS[config.platform or jax.default_backend()]


@record
class Reach:
    """What each branch token sees of its stem and of its lane."""

    cuts: Any  # i32 [U, R, T], trunk columns below it are visible
    prompts: Any  # i32 [U, R, T], tail columns of this prompt are visible
    first: Any  # i32 [U, R, T], column of the lane at which the token's own completion begins
    columns: Any  # i32 [U, P], prompt of each stem column; TRUNK in the trunk, PADDING where nothing is


TRUNK, PADDING = -1, -2


def sees_stem(reach: Reach):
    """bool [U, R, T, P]."""
    columns_UP = reach.columns[:, None, None, :]
    index_P = jnp.arange(columns_UP.shape[-1])
    in_trunk = (columns_UP == TRUNK) & (index_P < reach.cuts[..., None])
    return in_trunk | (columns_UP == reach.prompts[..., None])


def causal_attention(q_ULHQ, k_ULKQ, v_ULKQ, segments_UL=None):
    """Plain causal self-attention with grouped heads: [U, L, H, Q]. Right padding of trunks needs no mask.

    segments_UL: i32, tokens see those of their own segment only; None: a row is one sequence.
    """
    mask = None if segments_UL is None else (segments_UL[:, :, None] == segments_UL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_ULHQ, k_ULKQ, v_ULKQ, mask=mask, is_causal=True)


def branch_attention(q_URTHQ, stem_kv, own_kv, reach: Reach, kernels: Kernels):
    """Attention of lanes of branch tokens to their stem and, within a completion, to the tokens before them.

    Args:
        q_URTHQ: queries.
        stem_kv, own_kv: from `keep`: of the stem [U, K, ., .], and of the lanes themselves [U, R, K, ., .].
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    U, R, T, H, Q = q_URTHQ.shape
    P = reach.columns.shape[-1]
    columns_T = jnp.arange(T)

    def attend(q, own_kv, cuts, prompts, first, columns):
        mask_URTS = (columns_T <= columns[:, None]) & (columns_T >= first[..., None])
        seen = sees_stem(Reach(cuts=cuts, prompts=prompts, first=first, columns=reach.columns))
        return merged_attention(q, stem_kv, seen, own_kv, mask_URTS, kernels)

    of_tokens = (q_URTHQ, reach.cuts, reach.prompts, reach.first)
    per_query = U * H * (P + T)
    if per_query * R * T <= kernels.max_scores:
        q, *rest = of_tokens
        return attend(q, own_kv, *rest, columns_T)

    # A lane at a time, and of it as many queries as are allowed.
    block = max(1, min(T, kernels.max_scores // per_query))
    num_blocks = -(-T // block)

    def split(x_UT):
        x = jnp.pad(x_UT, [(0, 0), (0, num_blocks * block - T)] + [(0, 0)] * (x_UT.ndim - 2))
        return jnp.moveaxis(x.reshape(U, num_blocks, block, *x.shape[2:]), 1, 0)[:, :, None]

    @jax.checkpoint
    def one_block(own_kv, q, cuts, prompts, first, columns):
        return attend(q, own_kv, cuts, prompts, first, columns)[:, 0]

    def one_lane(lane):
        own_kv, *tokens = lane
        own_kv = jax.tree.map(lambda x: x[:, None], own_kv)
        columns = jnp.arange(num_blocks * block).reshape(num_blocks, block)
        blocks = jax.lax.map(lambda b: one_block(own_kv, *b), (*map(split, tokens), columns))
        return jnp.moveaxis(blocks, 0, 1).reshape(U, num_blocks * block, H, Q)[:, :T]

    lanes = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (own_kv, *of_tokens))
    return jnp.moveaxis(jax.lax.map(one_lane, lanes), 0, 1)


def merged_attention(q_URTHQ, stem_kv, stem_mask_URTP, own_kv, own_mask_URTS, kernels: Kernels):
    """One softmax over two parts, merged by their maxima and denominators: no concatenated score array is built.

    Args:
        q_URTHQ: queries.
        stem_kv: keys and values that all branches of a trunk share, as `keep` leaves them.
        stem_mask_URTP: bool, what each query sees of them.
        own_kv: keys and values of each branch. own_mask_URTS: bool, what each query sees of its own branch's.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    (stem_k, stem_v), (own_k, own_v) = stem_kv, own_kv
    U, R, T, H, Q = q_URTHQ.shape
    K = stem_v.shape[1]
    q = q_URTHQ.reshape(U, R, T, K, H // K, Q) * Q**-0.5
    stem_key, own_key = ("ukqp", "urkqs") if kernels.keys_transposed else ("ukpq", "urksq")

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    stem_scores = product(f"urtkjq,{stem_key}->ukrtjp", q, stem_k)
    stem_scores = jnp.where(stem_mask_URTP[:, None, :, :, None, :], stem_scores, _MASKED)
    own_scores = product(f"urtkjq,{own_key}->urktjs", q, own_k)
    own_scores = jnp.where(own_mask_URTS[:, :, None, :, None, :], own_scores, _MASKED)

    stem_max = jnp.swapaxes(stem_scores.max(-1), 1, 2)  # [U, R, K, T, J]
    peak = jax.lax.stop_gradient(jnp.maximum(stem_max, own_scores.max(-1)))
    stem_weights = jnp.exp(stem_scores - jnp.swapaxes(peak, 1, 2)[..., None])
    own_weights = jnp.exp(own_scores - peak[..., None])
    total = jnp.swapaxes(stem_weights.sum(-1), 1, 2) + own_weights.sum(-1)

    dtype = q.dtype
    from_stem = product("ukrtjp,ukpq->urtkjq", stem_weights.astype(dtype), stem_v)
    from_own = product("urktjs,urksq->urtkjq", own_weights.astype(dtype), own_v)
    total = jnp.swapaxes(total, 2, 3)[..., None]
    return ((from_stem + from_own) / total).astype(dtype).reshape(U, R, T, H, Q)


def keep(k_SKQ, v_SKQ, kernels: Kernels):
    """[..., S, K, Q] keys and values as they are kept: keys [..., K, Q, S] or [..., K, S, Q], values [..., K, S, Q]."""
    k = jnp.moveaxis(k_SKQ, -3, -1) if kernels.keys_transposed else jnp.moveaxis(k_SKQ, -3, -2)
    return k, jnp.moveaxis(v_SKQ, -3, -2)
