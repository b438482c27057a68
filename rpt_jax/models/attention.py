"""Attention of trunks to themselves, and of branches to their shared stem and to themselves.

A stem is a trunk followed by the tails of its prompts. All branches of a trunk attend to the stem's keys in one matrix
product; the keys are never repeated per branch. A column is an index along the key axis. Scores and softmax are
float32 for any activation dtype.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.parallel.mesh import TRUNK_AXES, num_shards
from rpt_jax.types import record

# Finite, so that a row that sees nothing (padding) does not become NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Everything that depends on the platform."""

    keys_transposed: bool
    """Store keys as [.., Q, S] instead of [.., S, Q], so that both products of decoding read contiguously."""
    flash_attention: bool
    """Use cuDNN's kernel for trunks in 16-bit activations."""
    max_scores: int
    """Maximum number of attention scores computed at once on a device. More are computed in blocks, and again in the
    backward pass."""
    max_logits: int
    """Maximum number of logits computed at once on a device, but at least those of 64 tokens."""
    narrow_left: bool
    """Compute weight gradients with the narrower matrix on the left, so that it is the one transposed."""


# CPU: measured by experiments/benchmarks/rollout.py and update.py. The others follow the layouts of the kernels.
KERNELS = {
    "cpu": Kernels(keys_transposed=True, flash_attention=False, max_scores=2**28, max_logits=2**21, narrow_left=True),
    "gpu": Kernels(keys_transposed=False, flash_attention=True, max_scores=2**29, max_logits=2**28, narrow_left=False),
    "tpu": Kernels(keys_transposed=False, flash_attention=False, max_scores=2**29, max_logits=2**28, narrow_left=False),
}


def kernels_of(config: DecoderConfig) -> Kernels:
    """Return the kernels and layouts of config.platform, or of the platform at hand."""
    return KERNELS[config.platform or jax.default_backend()]


@record
class Visibility:
    """The part of its stem and lane that each branch token attends to."""

    cuts: Any  # i32 [U, R, T], trunk columns below this are visible
    prompts: Any  # i32 [U, R, T], tail columns of this prompt are visible
    first: Any  # i32 [U, R, T], lane column at which the token's completion begins; None: no lanes
    stem_layout: Any  # i32 [U, P], prompt whose tail a stem column belongs to; TRUNK, or PADDING


TRUNK, PADDING = -1, -2


def stem_mask_of(visibility: Visibility):
    """Return the stem columns that each branch token sees, bool [U, R, T, P]."""
    columns_UP = visibility.stem_layout[:, None, None, :]
    index_P = jnp.arange(columns_UP.shape[-1])
    in_trunk = (columns_UP == TRUNK) & (index_P < visibility.cuts[..., None])
    return in_trunk | (columns_UP == visibility.prompts[..., None])


def causal_attention(q_ULHQ, k_ULKQ, v_ULKQ, kernels: Kernels, segments_UL=None):
    """Run causal self-attention with grouped heads. Right-padded trunks need no mask.

    Args:
        q_ULHQ: queries.
        k_ULKQ, v_ULKQ: keys and values.
        segments_UL: i32, tokens attend within their segment only; None: a row is one sequence.
    Returns:
        [U, L, H, Q] in the queries' dtype.
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
    """Return the number of heads of all trunks on one device."""
    return max(1, num_trunks * num_heads // num_shards(*TRUNK_AXES, "tensor"))


def _query_blocks(arrays, size: int):
    """Split arrays [U, T, ...] into [blocks, U, size, ...], the last one padded, with their columns [blocks, size]."""
    T = arrays[0].shape[1]
    num_blocks = -(-T // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, num_blocks * size - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    return tuple(map(split, arrays)), jnp.arange(num_blocks * size).reshape(num_blocks, size)


def _whole(blocks, num_queries: int):
    """Invert `_query_blocks` for one result [blocks, U, size, ...]."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]


def branch_attention(q_URTHQ, stem_kv, own_kv, visibility: Visibility, kernels: Kernels):
    """Attend from lanes of branch tokens to their stem and, within a completion, to earlier tokens.

    Args:
        q_URTHQ: queries.
        stem_kv: keys and values of the stem [U, K, ., .], from `to_cache_layout`.
        own_kv: keys and values of the lanes [U, R, K, ., .], from `to_cache_layout`.
        visibility: what each token sees.
        kernels: of the platform.
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

    # One lane at a time, in blocks of as many queries as the limit allows.
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
    """Compute one softmax over two parts, merged by their maxima and denominators, without concatenating scores.

    Args:
        q_URTHQ: queries.
        stem_kv: keys and values [U, K, ., .] that all branches of a trunk share, from `to_cache_layout`.
        stem_mask_URTP: bool, stem columns that each query sees.
        own_kv: keys and values [U, R, K, ., .] of each branch, from `to_cache_layout`.
        own_mask_URTS: bool, columns of its branch that each query sees.
        kernels: of the platform.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    U, R, T, H, Q = q_URTHQ.shape
    K = stem_kv[1].shape[1]
    J = H // K
    q_URTKJQ = q_URTHQ.reshape(U, R, T, K, J, Q) * Q**-0.5
    # Few, large dimensions: with one per letter, decoding takes twice as long on XLA's CPU backend.
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
    """Compute unnormalised attention: weighted values f32 [..., T, J, Q], weight sums and maxima [..., T, J, 1]."""
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
    """Move keys and values [..., S, K, Q] to cache layout: [..., K, Q, S] or [..., K, S, Q], and [..., K, S, Q]."""
    k = jnp.moveaxis(k_SKQ, -3, -1) if kernels.keys_transposed else jnp.moveaxis(k_SKQ, -3, -2)
    return k, jnp.moveaxis(v_SKQ, -3, -2)
