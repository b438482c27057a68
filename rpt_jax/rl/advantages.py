"""From rewards to advantages, relative to the group of rollouts of one prompt. Arrays and scalars only."""

import jax.numpy as jnp

EPS = 1e-6


def centered(rewards_UMG):
    """Return r - mean of the group (Dr. GRPO, arXiv:2503.20783 §3), f32 [U, M, G]; sums to 0 over G."""
    return rewards_UMG - rewards_UMG.mean(-1, keepdims=True)


def grpo(rewards_UMG):
    """Return (r - mean) / (population deviation + 1e-6) of the group; zero if all rewards are equal.

    Source: GRPO, arXiv:2402.03300 §4.1. Differs: the deviation divides by G, and 1e-6 is added to it.
    """
    return centered(rewards_UMG) / (rewards_UMG.std(-1, keepdims=True) + EPS)


def rloo(rewards_UMG):
    """Return r - mean of the group's other rewards (RLOO, arXiv:2402.14740): G / (G - 1) * (r - mean)."""
    G = rewards_UMG.shape[-1]
    return G / (G - 1) * centered(rewards_UMG)


def batch_std(rewards_UMG, position_mask_UM):
    """Return (r - mean of the group) / (deviation over the whole batch + 1e-6) (Lite PPO, arXiv:2508.08221)."""
    mask = jnp.broadcast_to(position_mask_UM[..., None], rewards_UMG.shape)
    mean = jnp.mean(rewards_UMG, where=mask)
    deviation = jnp.sqrt(jnp.mean((rewards_UMG - mean) ** 2, where=mask))
    return centered(rewards_UMG) / (deviation + EPS)


def opo(rewards_UMG, lengths_UMG):
    """Return r - length-weighted mean of the group, the variance-optimal baseline (OPO, arXiv:2505.23585 eq. 9).

    Args:
        rewards_UMG: f32.
        lengths_UMG: completion tokens, any real dtype, at least 1 for rollouts that count.
    """
    weights = lengths_UMG.astype(rewards_UMG.dtype)
    baseline = (weights * rewards_UMG).sum(-1, keepdims=True) / jnp.maximum(weights.sum(-1, keepdims=True), 1)
    return rewards_UMG - baseline


def compute_advantages(name: str, rewards_UMG, lengths_UMG, position_mask_UM):
    """Compute the advantage `name` (config `loss.advantage`); exactly 0 for padded positions and degenerate groups.

    Args:
        name: grpo, mean, rloo, batch_std or opo.
        rewards_UMG: f32, G >= 2.
        lengths_UMG: i32, completion tokens.
        position_mask_UM: bool, real positions.
    Returns:
        f32 [U, M, G].
    Raises:
        ValueError: rewards_UMG is not 3-D, G < 2, or the name is unknown.
    """
    if rewards_UMG.ndim != 3 or rewards_UMG.shape[-1] < 2:
        raise ValueError(f"rewards have shape {rewards_UMG.shape}; groups need [U, M, G] with G >= 2")
    if name == "grpo":
        advantages = grpo(rewards_UMG)
    elif name == "mean":
        advantages = centered(rewards_UMG)
    elif name == "rloo":
        advantages = rloo(rewards_UMG)
    elif name == "batch_std":
        advantages = batch_std(rewards_UMG, position_mask_UM)
    elif name == "opo":
        advantages = opo(rewards_UMG, lengths_UMG)
    else:
        raise ValueError(f"unknown advantage {name!r}")
    # The mean of equal rewards may differ from them by rounding, and grpo would divide that by 1e-6.
    teaches_UM = position_mask_UM & ~degenerate_groups(rewards_UMG)
    return jnp.where(teaches_UM[..., None], advantages, 0.0)


def degenerate_groups(rewards_UMG):
    """Return groups whose rewards are all equal, bool [U, M]; they have no gradient (DAPO, arXiv:2503.14476 §3.2)."""
    return rewards_UMG.max(-1) == rewards_UMG.min(-1)
