"""Per-token terms of the policy objective, one equation each, on arrays of equal shape."""

import jax.numpy as jnp


def ppo(ratio, advantages, *, clip_eps_low: float, clip_eps_high: float):
    """Return min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token, to be maximised.

    Sources: PPO, arXiv:1707.06347 eq. 7; clip-higher: DAPO, arXiv:2503.14476 eq. 10.
    """
    clipped = jnp.clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
    return jnp.minimum(ratio * advantages, clipped * advantages)


def kl_term(name: str, logprobs, ref_logprobs):
    """Estimate KL(policy || reference) per token from the policy's samples, with delta = logprobs - ref_logprobs.

    k1 = delta; k2 = delta^2 / 2; k3 = exp(-delta) - 1 + delta (Schulman 2020). As a loss, k1 has zero mean gradient, k2
    the gradient of the reverse KL, and k3 on average that of the forward KL.

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
