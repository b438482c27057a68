"""The reward of RPT: is the prediction a byte prefix of the true continuation that ends at a token boundary?

Array programs over whole batches, four bytes at a time; `tests/oracles.py` holds the plain-Python definition they are
checked against.
"""

import jax
import jax.numpy as jnp

from rpt_jax.scoring.requests import Request
from rpt_jax.types import Earned, Evidence

# The policy's direct probability of the token that a prediction begins with.
DIRECT_PREDICTION = Request(name="direct_prediction", view="direct", keep="nothing", target="prediction")


@jax.jit
def prefix_match_reward(prediction_BX, prediction_lengths_B, continuation_BY, boundary_mask_BY):
    """Return 1 iff X[0:l] = Y and l is a boundary length, else 0. Source: arXiv:2506.08007 eq. 3.

    Args:
        prediction_BX: u8, bytes Y of the prediction; arbitrary past its length.
        prediction_lengths_B: i32, length l of the prediction in bytes; more than X is no match.
        continuation_BY: u8, true bytes X from the position on; arbitrary past their end.
        boundary_mask_BY: bool, True at j iff j + 1 bytes end at a token boundary; padding is False.
    Returns:
        f32 [B], 0 or 1; 0 for an empty prediction.
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
    prediction, continuation = _words(prediction_BX, width), _words(continuation_BY, width)
    differs = (prediction ^ continuation) & _first_bytes(prediction_lengths_B[:, None], prediction.shape[1])
    last = jnp.clip(prediction_lengths_B - 1, 0, width - 1)
    at_boundary = jnp.take_along_axis(boundary_mask_BY, last[:, None], axis=1)[:, 0]
    is_inside = (prediction_lengths_B >= 1) & (prediction_lengths_B <= width)
    # A maximum is faster than an any().
    return ((jnp.max(differs, axis=1) == 0) & at_boundary & is_inside).astype(jnp.float32)


def _words(bytes_BX, width: int):
    """View the first `width` bytes as u32 [B, width / 4]; the last word is padded with 0."""
    num_words = -(-width // 4)
    padded = jnp.pad(bytes_BX[:, :width], ((0, 0), (0, 4 * num_words - width)))
    return jax.lax.bitcast_convert_type(padded.reshape(-1, num_words, 4), jnp.uint32)


def _first_bytes(lengths_B1, num_words: int):
    """Return masks u32 [B, num_words] of each row's first `lengths` bytes; a word's first byte is its lowest bits."""
    left = jnp.clip(lengths_B1 - 4 * jnp.arange(num_words), 0, 4)
    some = (jnp.uint32(1) << (8 * jnp.minimum(left, 3)).astype(jnp.uint32)) - 1
    return jnp.where(left == 4, jnp.uint32(0xFFFFFFFF), some)


@jax.jit
def first_token_reward(prediction_BX, prediction_lengths_B, continuation_BY, boundary_mask_BY):
    """Return 1 iff the first true token's bytes are a prefix of the prediction. Source: arXiv:2506.08007 appendix A.

    Differs: the paper compares the prediction's first token; comparing bytes does not depend on its tokenisation.
    Arguments and result as in `prefix_match_reward`.
    """
    width = min(prediction_BX.shape[1], continuation_BY.shape[1])
    first = jnp.argmax(boundary_mask_BY, axis=1) + 1
    prediction, continuation = _words(prediction_BX, width), _words(continuation_BY, width)
    differs = (prediction ^ continuation) & _first_bytes(first[:, None], prediction.shape[1])
    reaches = (prediction_lengths_B >= first) & (first <= width) & jnp.any(boundary_mask_BY, axis=1)
    return ((jnp.max(differs, axis=1) == 0) & reaches).astype(jnp.float32)


# --- Rewards of evidence ------------------------------------------------------------------------------------------


def prefix(evidence: Evidence) -> Earned:
    """Reward a correct prefix, the paper's main reward. Source: arXiv:2506.08007 eq. 3."""
    return _earned(_matched(prefix_match_reward, evidence))


def first_token(evidence: Evidence) -> Earned:
    """Reward the first token only. Source: arXiv:2506.08007 appendix A."""
    return _earned(_matched(first_token_reward, evidence))


def dense(evidence: Evidence) -> Earned:
    """Reward 1 if the first token is correct, else the policy's direct probability of the token it chose.

    Source: arXiv:2506.08007 appendix A. Differs: the chosen token is the longest vocabulary entry that begins the
    prediction.
    """
    first_UMG = _matched(first_token_reward, evidence)
    scores = evidence.scores[DIRECT_PREDICTION.name]
    probability_UR = jnp.where(scores.mask, jnp.exp(scores.values), 0.0)[..., 0]
    return _earned(jnp.where(first_UMG > 0, 1.0, probability_UR.reshape(first_UMG.shape)))


def conditional_dense(evidence: Evidence) -> Earned:
    """Reward like `dense`, but 0 in groups without a correct rollout. Source: arXiv:2506.08007 appendix A."""
    is_any_right = _matched(first_token_reward, evidence).max(-1, keepdims=True) > 0
    return _earned(dense(evidence).rewards * is_any_right)


def _earned(rewards_UMG) -> Earned:
    return Earned(rewards=rewards_UMG, faults=jnp.zeros(rewards_UMG.shape, bool), metrics={})


def _matched(match, evidence: Evidence):
    """f32 [U, M, G]: `match` of the prediction as written, or unescaped where that is asked for."""
    references, shape = evidence.tasks.references, evidence.tasks.prompts.row_ids.shape
    # Continuations and boundaries, one for each rollout.
    truth = [
        jnp.repeat(a.reshape(-1, a.shape[-1]), shape[-1], axis=0) for a in (references.bytes, references.boundary_mask)
    ]

    def reward(predictions):
        X = predictions.bytes.shape[-1]
        return match(predictions.bytes.reshape(-1, X), predictions.lengths.reshape(-1), *truth)

    rewards_B = reward(evidence.predictions)
    if evidence.unescaped is not None:
        rewards_B = jnp.maximum(rewards_B, reward(evidence.unescaped))
    return rewards_B.reshape(shape)
