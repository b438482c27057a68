"""The reward of RPT: is the prediction a byte prefix of the true continuation that ends at a token boundary?

Array programs over whole batches; `tests/oracles.py` holds the plain-Python definition they are checked against.
"""

import jax
import jax.numpy as jnp


@jax.jit
def prefix_match_reward(prediction_BX, prediction_lengths_B, continuation_BY, boundary_mask_BY):
    """1 iff X[0:l] = Y and l is a boundary length, else 0. Source: arXiv:2506.08007 eq. 3.

    Args:
        prediction_BX: u8, bytes of the prediction; those past its length are arbitrary.
        prediction_lengths_B: i32, bytes l of the prediction; more than X counts as no match.
        continuation_BY: u8, true bytes from the position on; those past its end are arbitrary.
        boundary_mask_BY: bool, True at j iff j + 1 bytes end at a token boundary; padding False.
    Returns:
        f32 [B], 0 or 1. An empty prediction is 0.
    Raises:
        ValueError: batch sizes or continuation widths differ.
    """
    B, X = prediction_BX.shape
    Y = continuation_BY.shape[1]
    if continuation_BY.shape != boundary_mask_BY.shape or continuation_BY.shape[0] != B:
        raise ValueError(
            f"prediction {prediction_BX.shape}, continuation {continuation_BY.shape} and boundary mask "
            f"{boundary_mask_BY.shape} must share B, and the last two Y"
        )
    width = min(X, Y)
    lengths = prediction_lengths_B[:, None]
    differs = prediction_BX[:, :width] != continuation_BY[:, :width]
    is_prefix = ~jnp.any(differs & (jnp.arange(width) < lengths), axis=1)
    at_boundary = jnp.any(boundary_mask_BY[:, :width] & (jnp.arange(width) == lengths - 1), axis=1)
    return (is_prefix & at_boundary).astype(jnp.float32)


@jax.jit
def first_token_reward(prediction_BX, prediction_lengths_B, continuation_BY, boundary_mask_BY):
    """1 iff the first true token's bytes are a prefix of the prediction. Source: arXiv:2506.08007 appendix A.

    Differs: the paper compares the prediction's first token; bytes make it independent of how it is tokenised.
    Arguments and result as in `prefix_match_reward`.
    """
    width = min(prediction_BX.shape[1], continuation_BY.shape[1])
    first = jnp.argmax(boundary_mask_BY, axis=1) + 1
    differs = prediction_BX[:, :width] != continuation_BY[:, :width]
    agrees = ~jnp.any(differs & (jnp.arange(width) < first[:, None]), axis=1)
    reaches = (prediction_lengths_B >= first) & (first <= width) & jnp.any(boundary_mask_BY, axis=1)
    return (agrees & reaches).astype(jnp.float32)
