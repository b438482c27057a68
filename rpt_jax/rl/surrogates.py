"""Per-token terms of the policy objective, each one equation. Arrays and scalars only, of any one shape."""

import jax.numpy as jnp


def ppo(ratio, advantages, *, clip_eps_low: float, clip_eps_high: float):
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
