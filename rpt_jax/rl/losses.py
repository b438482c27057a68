"""The terms of the policy-gradient loss, each one equation. Arrays and scalars only.

Token arrays are [U, R, C], or lanes [U, R, T]; `mask` is True for completion tokens up to and including the stop token.
"""

import jax.numpy as jnp


def clipped_surrogate(ratio, advantages, *, clip_eps_low: float, clip_eps_high: float):
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token (PPO, arXiv:1707.06347 eq. 7; clip-higher:
    DAPO, arXiv:2503.14476 eq. 10). To be maximised. Arrays of one shape."""
    clipped = jnp.clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
    return jnp.minimum(ratio * advantages, clipped * advantages)


def kl_term(name: str, logprobs, ref_logprobs):
    """Per-token estimate of KL(policy || reference) from the policy's samples, delta = logprobs - ref_logprobs.

    k1 = delta; k2 = delta^2 / 2; k3 = exp(-delta) - 1 + delta (Schulman 2020). As a loss k1 has zero mean gradient,
    k2 the reverse-KL gradient, k3 on average the forward-KL gradient.

    Raises:
        ValueError: unknown name.
    """
    delta = logprobs - ref_logprobs
    if name == "k1":
        return delta
    if name == "k2":
        return delta**2 / 2
    if name == "k3":
        return jnp.exp(-delta) - 1 + delta
    raise ValueError(f"unknown KL estimator {name!r}")


def aggregation_weights(name: str, mask_URC, row_mask_UR):
    """Weight of each token's term, so that loss = -(weights * terms).sum().

    seq_mean: mean over rollouts of the mean over their tokens (GRPO, arXiv:2402.03300 eq. 3).
    token_mean: mean over all tokens of the batch (DAPO, arXiv:2503.14476 eq. 8).
    constant: sum over tokens / (rollouts * C) (Dr. GRPO, arXiv:2503.20783).

    Args:
        mask_URC: bool. row_mask_UR: bool, rollouts that count; the batch is the whole global one.
    Returns:
        f32 [U, R, C]; all zero where nothing counts.
    Raises:
        ValueError: unknown name.
    """
    mask = (mask_URC & row_mask_UR[..., None]).astype(jnp.float32)
    num_rows = jnp.maximum(jnp.sum(row_mask_UR), 1)
    if name == "seq_mean":
        return mask / jnp.maximum(mask.sum(-1, keepdims=True), 1) / num_rows
    if name == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1)
    if name == "constant":
        return mask / (num_rows * mask_URC.shape[-1])
    raise ValueError(f"unknown aggregation {name!r}")
