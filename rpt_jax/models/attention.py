"""Attention of trunks to themselves, and of branches to their trunk and to themselves.

Keys are kept transposed ([.., Q, S]) beside untransposed values: both products of decoding then read contiguously.
Scores and softmax are float32 whatever the activations are.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row with no visible slot (padding) yields numbers rather than NaN.
_MASKED = -1e30


def causal_attention(q_ULHQ, k_ULKQ, v_ULKQ, segments_UL=None):
    """Plain causal self-attention with grouped heads: [U, L, H, Q]. Right padding of trunks needs no mask.

    segments_UL: i32, tokens see those of their own segment only; None: a row is one sequence.
    """
    mask = None if segments_UL is None else (segments_UL[:, :, None] == segments_UL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_ULHQ, k_ULKQ, v_ULKQ, mask=mask, is_causal=True)


def branch_attention(q_URTHQ, trunk_kv, cuts_UR, own_kv, own_mask_URTS):
    """One softmax over two parts: the trunk up to the branch's cut, and the branch's own slots.

    All branches of a trunk meet its keys in one matrix product; the keys are never repeated per branch. The parts
    are merged by their maxima and denominators, so no concatenated score array is built.

    Args:
        q_URTHQ: queries.
        trunk_kv: (k [U, K, Q, L], v [U, K, L, Q]).
        cuts_UR: i32, trunk slots 0 .. cut - 1 are visible to the branch.
        own_kv: (k [U, R, K, Q, S], v [U, R, K, S, Q]).
        own_mask_URTS: bool, own slots that each query sees.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    trunk_k_UKQL, trunk_v_UKLQ = trunk_kv
    own_k_URKQS, own_v_URKSQ = own_kv
    U, R, T, H, Q = q_URTHQ.shape
    K, L = trunk_k_UKQL.shape[1], trunk_k_UKQL.shape[3]
    q = q_URTHQ.reshape(U, R, T, K, H // K, Q) * Q**-0.5

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    visible_URL = jnp.arange(L)[None, None] < cuts_UR[..., None]
    trunk_scores = product("urtkjq,ukql->ukrtjl", q, trunk_k_UKQL)
    trunk_scores = jnp.where(visible_URL[:, None, :, None, None, :], trunk_scores, _MASKED)
    own_scores = product("urtkjq,urkqs->urktjs", q, own_k_URKQS)
    own_scores = jnp.where(own_mask_URTS[:, :, None, :, None, :], own_scores, _MASKED)

    trunk_max = jnp.swapaxes(trunk_scores.max(-1), 1, 2)  # [U, R, K, T, J]
    peak = jax.lax.stop_gradient(jnp.maximum(trunk_max, own_scores.max(-1)))
    trunk_weights = jnp.exp(trunk_scores - jnp.swapaxes(peak, 1, 2)[..., None])
    own_weights = jnp.exp(own_scores - peak[..., None])
    total = jnp.swapaxes(trunk_weights.sum(-1), 1, 2) + own_weights.sum(-1)

    dtype = q.dtype
    from_trunk = product("ukrtjl,uklq->urtkjq", trunk_weights.astype(dtype), trunk_v_UKLQ)
    from_own = product("urktjs,urksq->urtkjq", own_weights.astype(dtype), own_v_URKSQ)
    total = jnp.swapaxes(total, 2, 3)[..., None]
    return ((from_trunk + from_own) / total).astype(dtype).reshape(U, R, T, H, Q)


def cache_layout(k_SKQ, v_SKQ):
    """[..., S, K, Q] keys and values -> the kept layout ([..., K, Q, S], [..., K, S, Q])."""
    return jnp.moveaxis(k_SKQ, -3, -1), jnp.moveaxis(v_SKQ, -3, -2)
