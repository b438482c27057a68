"""From rewards to advantages. Arrays and scalars only.

Most are relative to the group of rollouts of one prompt, and one number per rollout. `reinforce_pp` and `gae` are per
token.
"""

import jax
import jax.numpy as jnp

EPS = 1e-6
# Advantages of single tokens.
TOKEN_ADVANTAGES = ("reinforce_pp", "gae")
# These learn from groups whose rewards are all equal.
WITHOUT_GROUP = ("anchor", *TOKEN_ADVANTAGES)


def centered(rewards_UMG):
    """Return r - mean of the group (Dr. GRPO, arXiv:2503.20783 §3), f32 [U, M, G]; sums to 0 over G."""
    return rewards_UMG - rewards_UMG.mean(-1, keepdims=True)


def grpo(rewards_UMG, *, ddof: int = 0, eps: float = EPS):
    """Return (r - mean) / (deviation + eps) of the group; zero if all rewards are equal.

    Source: GRPO, arXiv:2402.03300 §4.1. With ddof 0 the deviation divides by G, with 1 by G - 1. Codes differ in both:
    TRL 1 and 1e-4, verl 1 and 1e-6.
    """
    return centered(rewards_UMG) / (rewards_UMG.std(-1, keepdims=True, ddof=ddof) + eps)


def rloo(rewards_UMG):
    """Return r - mean of the group's other rewards (RLOO, arXiv:2402.14740): G / (G - 1) * (r - mean)."""
    G = rewards_UMG.shape[-1]
    return G / (G - 1) * centered(rewards_UMG)


def batch_std(rewards_UMG, mask_UMG, *, ddof: int = 0, eps: float = EPS):
    """Return (r - mean of the group) / (deviation over the whole batch + eps) (Lite PPO, arXiv:2508.08221)."""
    deviation = jnp.sqrt(_variance(rewards_UMG, mask_UMG.astype(jnp.float32), ddof))
    return centered(rewards_UMG) / (deviation + eps)


def opo(rewards_UMG, lengths_UMG):
    """Return r - length-weighted mean of the group, the variance-optimal baseline (OPO, arXiv:2505.23585 eq. 9).

    Args:
        rewards_UMG: f32.
        lengths_UMG: completion tokens, any real dtype, at least 1 for rollouts that count.
    """
    weights = lengths_UMG.astype(rewards_UMG.dtype)
    baseline = (weights * rewards_UMG).sum(-1, keepdims=True) / jnp.maximum(weights.sum(-1, keepdims=True), 1)
    return rewards_UMG - baseline


def anchor(rewards_UMG, *, ddof: int = 0, eps: float = EPS):
    """Return `grpo` of the group with a virtual reward of 0 in it, so that a group that is all right still teaches."""
    with_zero = jnp.pad(rewards_UMG, ((0, 0), (0, 0), (0, 1)))
    deviation = with_zero.std(-1, keepdims=True, ddof=ddof) + eps
    return (rewards_UMG - with_zero.mean(-1, keepdims=True)) / deviation


def max_gap(rewards_UMG, *, ddof: int = 0, eps: float = EPS):
    """Return the best reward's lead over the second, over the deviation, for the best rollout; 0 for the others.

    Of equal ones, the first is best. It serves pass@k. Source: arXiv:2503.19595, as in verl.
    """
    top, places = jax.lax.top_k(rewards_UMG, 2)
    gap = (top[..., :1] - top[..., 1:]) / (rewards_UMG.std(-1, keepdims=True, ddof=ddof) + eps)
    return jnp.where(jnp.arange(rewards_UMG.shape[-1]) == places[..., :1], gap, 0.0)


def gpg(rewards_UMG, mask_UMG):
    """Return (r - mean of the group) * rollouts / rewards that are not 0, both counted (GPG, arXiv:2504.02546)."""
    return centered(rewards_UMG) * mask_UMG.sum() / jnp.maximum(1, (mask_UMG & (rewards_UMG != 0)).sum())


def reinforce_pp_baseline(rewards_UMG, lengths_UMG, mask_UMG):
    """Return r - mean of the group, standardised over all tokens of the batch.

    Source: REINFORCE++ with baseline, arXiv:2501.03262; the variance divides by n - 1 and has 1e-8 added, as in verl.
    """
    return standardized(centered(rewards_UMG), (lengths_UMG * mask_UMG).astype(jnp.float32))


def standardized(values, weights):
    """Return (x - mean) / sqrt(variance + 1e-8), moments over entries with their weights; the variance has n - 1."""
    mean = jnp.sum(weights * values) / jnp.maximum(1, weights.sum())
    return (values - mean) * jax.lax.rsqrt(_variance(values, weights, 1) + 1e-8)


def _variance(values, weights, ddof: int):
    number = weights.sum()
    mean = jnp.sum(weights * values) / jnp.maximum(1, number)
    return jnp.sum(weights * (values - mean) ** 2) / jnp.maximum(1, number - ddof)


def compute_advantages(name: str, rewards_UMG, lengths_UMG, position_mask_UM, row_mask_UMG=None, *, ddof: int = 0):
    """Compute the advantage `name` (config `loss.advantage`); exactly 0 for padded positions and degenerate groups.

    Args:
        name: one of a rollout, that is none of TOKEN_ADVANTAGES.
        rewards_UMG: f32, G >= 2.
        lengths_UMG: i32, completion tokens.
        position_mask_UM: bool, real positions.
        row_mask_UMG: bool, rollouts with a loss term, which moments over the batch are of; None: all. The others count
            in their group.
        ddof: of deviations of a group or of the batch.
    Returns:
        f32 [U, M, G].
    Raises:
        ValueError: rewards_UMG is not 3-D, G < 2, or the name is unknown.
    """
    if rewards_UMG.ndim != 3 or rewards_UMG.shape[-1] < 2:
        raise ValueError(f"rewards have shape {rewards_UMG.shape}; groups need [U, M, G] with G >= 2")
    mask_UMG = jnp.broadcast_to(position_mask_UM[..., None], rewards_UMG.shape)
    mask_UMG = mask_UMG if row_mask_UMG is None else mask_UMG & row_mask_UMG
    functions = {
        "grpo": lambda: grpo(rewards_UMG, ddof=ddof),
        "mean": lambda: centered(rewards_UMG),
        "rloo": lambda: rloo(rewards_UMG),
        "batch_std": lambda: batch_std(rewards_UMG, mask_UMG, ddof=ddof),
        "opo": lambda: opo(rewards_UMG, lengths_UMG),
        "anchor": lambda: anchor(rewards_UMG, ddof=ddof),
        "max_gap": lambda: max_gap(rewards_UMG, ddof=ddof),
        "gpg": lambda: gpg(rewards_UMG, mask_UMG),
        "reinforce_pp_baseline": lambda: reinforce_pp_baseline(rewards_UMG, lengths_UMG, mask_UMG),
    }
    if name not in functions:
        raise ValueError(f"unknown advantage {name!r}")
    # The mean of equal rewards may differ from them by rounding, and grpo would divide that by 1e-6.
    teaches_UM = position_mask_UM if name == "anchor" else position_mask_UM & ~degenerate_groups(rewards_UMG)
    return jnp.where(teaches_UM[..., None], functions[name](), 0.0)


def degenerate_groups(rewards_UMG):
    """Return groups whose rewards are all equal, bool [U, M]; they have no gradient (DAPO, arXiv:2503.14476 §3.2)."""
    return rewards_UMG.max(-1) == rewards_UMG.min(-1)


# --- Per token ----------------------------------------------------------------------------------------------------


def token_rewards(rewards_UR, penalties_URC, mask_URC):
    """Return the reward at each completion's last token, less the penalty of every token; f32 [U, R, C].

    Args:
        rewards_UR: f32, of whole completions.
        penalties_URC: f32, such as kl_coef * KL.
        mask_URC: bool, completion tokens; True up to the last one.
    """
    is_last = mask_URC & ~jnp.pad(mask_URC[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return jnp.where(is_last, rewards_UR[..., None], 0.0) - jnp.where(mask_URC, penalties_URC, 0.0)


def reinforce_pp(token_rewards_URC, mask_URC, *, gamma: float = 1.0):
    """Return (the discounted reward to go, standardised over all tokens of the batch; the reward to go itself).

    Source: REINFORCE++, arXiv:2501.03262. No group: prompts share one baseline.
    """
    returns = _backwards(lambda later, now: now + gamma * later, token_rewards_URC)
    return jnp.where(mask_URC, standardized(returns, mask_URC.astype(jnp.float32)), 0.0), returns


def gae(token_rewards_URC, values_URC, mask_URC, *, gamma: float, lam: float):
    """Return (advantages, standardised over all tokens of the batch; returns, which values are fitted to), [U, R, C].

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token; A_t = sum_k (gamma lam)^k delta_{t+k}; the
    return is A_t + V_t. Source: arXiv:1506.02438 eq. 16.

    Args:
        token_rewards_URC: f32, 0 outside the mask.
        values_URC: f32, V of the state before each token.
        mask_URC: bool, completion tokens; True up to the last one.
    """
    values = jnp.where(mask_URC, values_URC, 0.0)
    following = jnp.pad(values[..., 1:], ((0, 0), (0, 0), (0, 1)))
    deltas = jnp.where(mask_URC, token_rewards_URC + gamma * following - values, 0.0)
    advantages = _backwards(lambda later, now: now + gamma * lam * later, deltas)
    weights = mask_URC.astype(jnp.float32)
    return jnp.where(mask_URC, standardized(advantages, weights), 0.0), jnp.where(mask_URC, advantages + values, 0.0)


def _backwards(step, x_URC):
    """Return the running result of step(later, now) from the last column to the first."""

    def one(later, now):
        result = step(later, now)
        return result, result

    columns = jnp.moveaxis(x_URC, -1, 0)
    _, found = jax.lax.scan(one, jnp.zeros_like(columns[0]), columns, reverse=True)
    return jnp.moveaxis(found, 0, -1)
