"""Attention of trunks to themselves, and of branches to the stem they share and to themselves.

A stem is a trunk with the tails of its prompts behind it. All branches of a trunk meet the stem's keys in one matrix
product; those keys are never repeated per branch. Scores and softmax are float32 whatever the activations are.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.parallel.mesh import TRUNK_AXES, num_shards
from rpt_jax.types import record

# Finite, so that a row with no visible slot (padding) yields numbers rather than NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What depends on the machine, and nothing else does."""

    keys_transposed: bool
    """Keys are kept [.., Q, S] instead of [.., S, Q]: both products of decoding then read contiguously."""
    flash_attention: bool
    """A trunk in 16-bit activations attends to itself by cuDNN's kernel."""
    max_scores: int
    """Attention scores (numbers) made at once on a device; more are made block by block, and once more in the backward
    pass."""
    max_logits: int
    """Logits (numbers) made at once on a device; but always those of 64 tokens."""
    narrow_left: bool
    """Weight gradients are products with the narrower matrix on the left, which is the one that is transposed."""


# CPU: measured, experiments/benchmarks/rollout.py and update.py. The others follow the kernels' own layouts.
KERNELS = {
    "cpu": Kernels(keys_transposed=True, flash_attention=False, max_scores=2**28, max_logits=2**21, narrow_left=True),
    "gpu": Kernels(keys_transposed=False, flash_attention=True, max_scores=2**29, max_logits=2**28, narrow_left=False),
    "tpu": Kernels(keys_transposed=False, flash_attention=False, max_scores=2**29, max_logits=2**28, narrow_left=False),
}


def kernels_of(config: DecoderConfig) -> Kernels:
    """Kernels and layouts for config.platform, or for the machine at hand."""
    return KERNELS[config.platform or jax.default_backend()]


@record
class Visibility:
    """What each branch token sees of its stem and of its lane."""

    cuts: Any  # i32 [U, R, T], trunk columns below it are visible
    prompts: Any  # i32 [U, R, T], tail columns of this prompt are visible
    first: Any  # i32 [U, R, T], column of the lane at which the token's own completion begins
    stem_layout: Any  # i32 [U, P], prompt of each stem column; TRUNK in the trunk, PADDING where nothing is


TRUNK, PADDING = -1, -2


def stem_mask_of(visibility: Visibility):
    """bool [U, R, T, P]."""
    columns_UP = visibility.stem_layout[:, None, None, :]
    index_P = jnp.arange(columns_UP.shape[-1])
    in_trunk = (columns_UP == TRUNK) & (index_P < visibility.cuts[..., None])
    return in_trunk | (columns_UP == visibility.prompts[..., None])


def causal_attention(q_ULHQ, k_ULKQ, v_ULKQ, kernels: Kernels, segments_UL=None):
    """Plain causal self-attention with grouped heads: [U, L, H, Q]. Right padding of trunks needs no mask.

    segments_UL: i32, tokens see those of their own segment only; None: a row is one sequence.
    """
    U, L, H, Q = q_ULHQ.shape
    if segments_UL is None and kernels.flash_attention and q_ULHQ.dtype.itemsize == 2 and Q % 8 == 0 and Q <= 128:
        return jax.nn.dot_product_attention(q_ULHQ, k_ULKQ, v_ULKQ, is_causal=True, implementation="cudnn")

    def attend(q, columns):
        mask = columns[:, None] >= jnp.arange(L)
        if segments_UL is not None:
            mask = mask & (segments_UL[:, columns, None] == segments_UL[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k_ULKQ, v_ULKQ, mask=mask if mask.ndim == 4 else mask[None, None])

    per_query = _on_each_device(U, H) * L
    if per_query * L <= kernels.max_scores:
        return attend(q_ULHQ, jnp.arange(L))
    blocks, columns = _query_blocks((q_ULHQ,), max(1, kernels.max_scores // per_query))
    attended = jax.lax.map(jax.checkpoint(lambda b: attend(b[0][0], jnp.minimum(b[1], L - 1))), (blocks, columns))
    return _whole(attended, L)


def _on_each_device(num_trunks: int, num_heads: int) -> int:
    """Heads of all trunks, a device's share."""
    return max(1, num_trunks * num_heads // num_shards(*TRUNK_AXES, "tensor"))


def _query_blocks(arrays, size: int):
    """Arrays [U, T, ...] as [blocks, U, size, ...], the last block padded; and the queries' columns [blocks, size]."""
    T = arrays[0].shape[1]
    num_blocks = -(-T // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, num_blocks * size - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    return tuple(map(split, arrays)), jnp.arange(num_blocks * size).reshape(num_blocks, size)


def _whole(blocks, num_queries: int):
    """The inverse of `_query_blocks` for one result [blocks, U, size, ...]."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]


def branch_attention(q_URTHQ, stem_kv, own_kv, visibility: Visibility, kernels: Kernels):
    """Attention of lanes of branch tokens to their stem and, within a completion, to the tokens before them.

    Args:
        q_URTHQ: queries.
        stem_kv, own_kv: from `to_cache_layout`: of the stem [U, K, ., .], and of the lanes themselves [U, R, K, ., .].
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    U, R, T, H, _ = q_URTHQ.shape
    P = visibility.stem_layout.shape[-1]
    columns_T = jnp.arange(T)

    def attend(q, own_kv, cuts, prompts, first, columns):
        mask_URTS = (columns_T <= columns[:, None]) & (columns_T >= first[..., None])
        seen = stem_mask_of(Visibility(cuts=cuts, prompts=prompts, first=first, stem_layout=visibility.stem_layout))
        return merged_attention(q, stem_kv, seen, own_kv, mask_URTS, kernels)

    of_tokens = (q_URTHQ, visibility.cuts, visibility.prompts, visibility.first)
    per_query = _on_each_device(U, H) * (P + T)
    if per_query * R * T <= kernels.max_scores:
        q, *rest = of_tokens
        return attend(q, own_kv, *rest, columns_T)

    # A lane at a time, and of it as many queries as are allowed.
    def one_lane(lane):
        lane_kv, *tokens = lane
        lane_kv = jax.tree.map(lambda x: x[:, None], lane_kv)

        @jax.checkpoint
        def one_block(block):
            tokens, columns = block
            return attend(tokens[0][:, None], lane_kv, *(x[:, None] for x in tokens[1:]), columns)[:, 0]

        return _whole(jax.lax.map(one_block, _query_blocks(tokens, max(1, kernels.max_scores // per_query))), T)

    lanes = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (own_kv, *of_tokens))
    return jnp.moveaxis(jax.lax.map(one_lane, lanes), 0, 1)


def merged_attention(q_URTHQ, stem_kv, stem_mask_URTP, own_kv, own_mask_URTS, kernels: Kernels):
    """One softmax over two parts, merged by their maxima and denominators: no concatenated score array is built.

    Args:
        q_URTHQ: queries.
        stem_kv: keys and values that all branches of a trunk share, as `to_cache_layout` leaves them.
        stem_mask_URTP: bool, what each query sees of them.
        own_kv: keys and values of each branch. own_mask_URTS: bool, what each query sees of its own branch's.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    U, R, T, H, Q = q_URTHQ.shape
    K = stem_kv[1].shape[1]
    J = H // K
    q_URTKJQ = q_URTHQ.reshape(U, R, T, K, J, Q) * Q**-0.5
    # Few and large dimensions: with one for each letter XLA's CPU backend takes twice as long to decode.
    of_stem = jnp.moveaxis(q_URTKJQ, 3, 1).reshape(U, K, R * T, J, Q)
    of_own = jnp.moveaxis(q_URTKJQ, 3, 2).reshape(U, R, K, T, J, Q)
    stem = _one_part(of_stem, stem_kv, stem_mask_URTP.reshape(U, 1, R * T, 1, -1), kernels)
    own = _one_part(of_own, own_kv, own_mask_URTS[:, :, None, :, None], kernels)
    stem = [jnp.moveaxis(x.reshape(U, K, R, T, J, -1), 1, 2) for x in stem]

    (stem_sum, stem_total, stem_peak), (own_sum, own_total, own_peak) = stem, own
    peak = jnp.maximum(stem_peak, own_peak)
    stem_scale, own_scale = jnp.exp(stem_peak - peak), jnp.exp(own_peak - peak)
    attended = (stem_sum * stem_scale + own_sum * own_scale) / (stem_total * stem_scale + own_total * own_scale)
    return jnp.moveaxis(attended, 2, 3).astype(q_URTHQ.dtype).reshape(U, R, T, H, Q)


def _one_part(q_TJQ, kv, mask_T1S, kernels: Kernels):
    """Softmax attention undivided: weighted values f32 [..., T, J, Q], sums of weights and peaks [..., T, J, 1]."""
    *lead, T, J, Q = q_TJQ.shape
    k, v_SQ = kv
    q_XQ = q_TJQ.reshape(*lead, T * J, Q)
    key = "...qs" if kernels.keys_transposed else "...sq"
    scores_XS = jnp.einsum(f"...xq,{key}->...xs", q_XQ, k, preferred_element_type=jnp.float32)
    scores_TJS = jnp.where(mask_T1S, scores_XS.reshape(*lead, T, J, -1), _MASKED)
    peak_TJ1 = jax.lax.stop_gradient(scores_TJS.max(-1, keepdims=True))
    weights_TJS = jnp.exp(scores_TJS - peak_TJ1)
    weights_XS = weights_TJS.reshape(scores_XS.shape).astype(v_SQ.dtype)
    sums_XQ = jnp.einsum("...xs,...sq->...xq", weights_XS, v_SQ, preferred_element_type=jnp.float32)
    return sums_XQ.reshape(q_TJQ.shape), weights_TJS.sum(-1, keepdims=True), peak_TJ1


def to_cache_layout(k_SKQ, v_SKQ, kernels: Kernels):
    """[..., S, K, Q] keys and values as they are kept: keys [..., K, Q, S] or [..., K, S, Q], values [..., K, S, Q]."""
    k = jnp.moveaxis(k_SKQ, -3, -1) if kernels.keys_transposed else jnp.moveaxis(k_SKQ, -3, -2)
    return k, jnp.moveaxis(v_SKQ, -3, -2)
