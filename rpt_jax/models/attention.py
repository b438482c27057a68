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
from rpt_jax.models.flash import CUDNN, FusedKernel, Part, bias_of, causal_flash, merged_flash
from rpt_jax.parallel.mesh import TRUNK_AXES, num_shards
from rpt_jax.types import record

# Finite, so that a row that sees nothing (padding) does not become NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Everything that depends on the platform."""

    default_dtype: str
    """Dtype of activations if the config leaves it open."""
    keys_transposed: bool
    """Store keys as [.., Q, S] instead of [.., S, Q], so that both products of decoding read contiguously."""
    flash: FusedKernel | None
    """Fused kernel for attention to trunks and stems, where it supports the dtype and head size."""
    max_scores: int
    """Maximum number of attention scores computed at once on a device without a fused kernel. More are computed in
    blocks, and again in the backward pass."""
    max_logits: int
    """Maximum number of logits computed at once on a device, but at least those of 64 tokens."""
    narrow_left: bool
    """Compute weight gradients with the narrower matrix on the left, so that it is the one transposed."""
    fused_decoding: str = ""
    """Attend by the kernels of `decode_kernel.py` while decoding: "triton", or "emulated" on any platform. Then caches
    have their full width from the start, because the kernels read only the columns that a row has."""
    join_projections: bool = False
    """Multiply queries, keys and values, and gate and up, in one product each while decoding."""


# CPU: measured by experiments/benchmarks/rollout.py and update.py. The others follow the layouts of the kernels.
KERNELS = {
    "cpu": Kernels(
        default_dtype="float32",
        keys_transposed=True,
        flash=None,
        max_scores=2**28,
        max_logits=2**21,
        narrow_left=True,
    ),
    "gpu": Kernels(
        default_dtype="bfloat16",
        keys_transposed=False,
        flash=CUDNN,
        max_scores=2**29,
        max_logits=2**28,
        narrow_left=False,
        fused_decoding="triton",
        join_projections=True,
    ),
    "tpu": Kernels(
        default_dtype="bfloat16",
        keys_transposed=False,
        flash=None,
        max_scores=2**29,
        max_logits=2**28,
        narrow_left=False,
    ),
}


def kernels_of(config: DecoderConfig) -> Kernels:
    """Return the kernels and layouts of config.platform, or of the platform at hand."""
    return KERNELS[config.platform or jax.default_backend()]


def default_dtype(config: DecoderConfig) -> str:
    """Return the dtype of activations: the config's, else the platform's. GPUs before the A100 have no bfloat16."""
    if config.activation_dtype:
        return config.activation_dtype
    is_old = not config.platform and jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8
    return "float32" if is_old else kernels_of(config).default_dtype


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


def flash_of(config: DecoderConfig) -> FusedKernel | None:
    """Return the fused kernel that the policy's attention takes; None: the plain path."""
    flash = kernels_of(config).flash
    return flash if flash is not None and flash.supports(config.activation_dtype, config.head_size) else None


def causal_attention(q_ULHQ, k_ULKQ, v_ULKQ, config: DecoderConfig, segments_UL=None):
    """Run causal self-attention with grouped heads. Right-padded trunks need no mask.

    Args:
        q_ULHQ: queries.
        k_ULKQ, v_ULKQ: keys and values.
        config: of the policy.
        segments_UL: i32, tokens attend within their segment only; None: a row is one sequence.
    Returns:
        [U, L, H, Q] in the queries' dtype.
    """
    U, L, H, _ = q_ULHQ.shape
    if flash := flash_of(config):
        mask_ULS = None if segments_UL is None else segments_UL[:, :, None] == segments_UL[:, None, :]
        return causal_flash(flash, q_ULHQ, k_ULKQ, v_ULKQ, mask_ULS)

    def attend(q, columns):
        mask = columns[:, None] >= jnp.arange(L)
        if segments_UL is not None:
            mask = mask & (segments_UL[:, columns, None] == segments_UL[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k_ULKQ, v_ULKQ, mask=mask if mask.ndim == 4 else mask[None, None])

    _, queries = _at_once(1, L, _on_each_device(U, H) * L, kernels_of(config).max_scores)
    if queries == L:
        return attend(q_ULHQ, jnp.arange(L))
    blocks, columns = _query_blocks((q_ULHQ,), queries)
    attended = jax.lax.map(jax.checkpoint(lambda b: attend(b[0][0], jnp.minimum(b[1], L - 1))), (blocks, columns))
    return _whole(attended, L)


def _on_each_device(num_trunks: int, num_heads: int) -> int:
    """Return the number of heads of all trunks on one device."""
    return max(1, num_trunks * num_heads // num_shards(*TRUNK_AXES, "tensor"))


def _at_once(num_lanes: int, num_queries: int, per_query: int, limit: int) -> tuple[int, int]:
    """Return how many lanes, and queries of a lane, have at most `limit` scores together, if any have that few.

    Lanes divide num_lanes. Blocks of queries are as equal as possible: fewer places than blocks are padding.
    """
    fitting = max(1, limit // per_query)
    if fitting < num_queries:
        num_blocks = -(-num_queries // fitting)
        return 1, -(-num_queries // num_blocks)
    return max(n for n in range(1, num_lanes + 1) if num_lanes % n == 0 and n * num_queries <= fitting), num_queries


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


def branch_biases(visibility: Visibility, dtype):
    """Return what the fused kernel adds to the scores of stem and lanes; see `flash.bias_of`."""
    stem_mask_URTP = stem_mask_of(visibility)
    U, R, T, P = stem_mask_URTP.shape
    columns_T = jnp.arange(T)
    own_mask_URTS = (columns_T <= columns_T[:, None]) & (columns_T >= visibility.first[..., None])
    own = bias_of(own_mask_URTS.reshape(U * R, T, T), dtype)
    stem_mask_URTP = jnp.pad(stem_mask_URTP, [(0, 0), (0, 0), (0, own.shape[2] - T), (0, 0)])
    return bias_of(stem_mask_URTP.reshape(U, -1, P), dtype), own


def branch_attention(q_URTHQ, stem_kv, own_kv, visibility: Visibility, biases, config: DecoderConfig):
    """Attend from lanes of branch tokens to their stem and, within a completion, to earlier tokens.

    Args:
        q_URTHQ: queries.
        stem_kv: keys and values of the stem [U, P, K, Q].
        own_kv: keys and values of the lanes [U, R, T, K, Q].
        visibility: what each token sees.
        biases: from `branch_biases` if the policy's attention is fused (`flash_of`), else None.
        config: of the policy.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    if biases is not None:
        return fused_attention(q_URTHQ, stem_kv, own_kv, biases, config)
    kernels, (U, R, T, H, _) = kernels_of(config), q_URTHQ.shape
    stem_kv, own_kv = to_cache_layout(*stem_kv, kernels), to_cache_layout(*own_kv, kernels)
    P = visibility.stem_layout.shape[-1]
    columns_T = jnp.arange(T)

    def attend(q, own_kv, cuts, prompts, first, columns):
        mask_URTS = (columns_T <= columns[:, None]) & (columns_T >= first[..., None])
        seen = stem_mask_of(Visibility(cuts=cuts, prompts=prompts, first=first, stem_layout=visibility.stem_layout))
        return merged_attention(q, stem_kv, seen, own_kv, mask_URTS, kernels)

    of_tokens = (q_URTHQ, visibility.cuts, visibility.prompts, visibility.first)
    lanes, queries = _at_once(R, T, _on_each_device(U, H) * (P + T), kernels.max_scores)
    if (lanes, queries) == (R, T):
        q, *rest = of_tokens
        return attend(q, own_kv, *rest, columns_T)

    def some_lanes(block):
        own_kv, *of_tokens = block

        @jax.checkpoint
        def some_queries(block):
            (q, *rest), columns = block
            return attend(q, own_kv, *rest, columns)

        if queries == T:
            return some_queries((of_tokens, columns_T))
        # One lane, [U, 1, ...].
        blocks, columns = _query_blocks([x[:, 0] for x in of_tokens], queries)
        attended = jax.lax.map(some_queries, ([x[:, :, None] for x in blocks], columns))
        return _whole(attended[:, :, 0], T)[:, None]

    blocks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(U, -1, lanes, *x.shape[2:]), 1, 0), (own_kv, *of_tokens))
    return jnp.moveaxis(jax.lax.map(some_lanes, blocks), 0, 1).reshape(q_URTHQ.shape)


def fused_attention(q_URTHQ, stem_kv, own_kv, biases, config: DecoderConfig):
    """Attend to stems [U, P, K, Q] and lanes [U, R, T, K, Q] with the fused kernel, as `branch_attention`."""
    (stem_k, stem_v), (stem_bias, own_bias) = stem_kv, biases
    own_k, own_v = (x.reshape(-1, *x.shape[2:]) for x in own_kv)
    stem = Part(keys=stem_k, values=stem_v, bias=stem_bias)
    return merged_flash(flash_of(config), q_URTHQ, stem, Part(keys=own_k, values=own_v, bias=own_bias))


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
