"""Shaping rewards of lengths, on the devices; those that read text are in `text.py` and are re-exported here.

A shaping term stands after the reward that it shapes: `--reward.terms prefix 0.2*kimi_length`. The first term's reward
is its `Evidence.outcome`; 1 is correct.
"""

import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.rewards.text import format, language, repeated_window, repetition, syntax
from rpt_jax.types import Earned, Evidence

__all__ = [
    "cosine_length", "format", "kimi_length", "language", "repeated_window", "repetition", "soft_overlong", "syntax",
]  # fmt: skip


def kimi_length(lengths_UMG, is_right_UMG):
    """Return the length reward of a group: lambda if right, min(0, lambda) if wrong; 0 if all lengths are equal.

    lambda = 1/2 - (length - shortest) / (longest - shortest). Source: Kimi k1.5, arXiv:2501.12599 §2.3.3; in tokens, as
    there (open-r1 counts characters).

    Args:
        lengths_UMG: tokens of completions, any real dtype.
        is_right_UMG: bool.
    Returns:
        f32, in [-1/2, 1/2].
    """
    lengths = lengths_UMG.astype(jnp.float32)
    shortest, longest = lengths.min(-1, keepdims=True), lengths.max(-1, keepdims=True)
    reward = 0.5 - (lengths - shortest) / jnp.maximum(longest - shortest, 1)
    reward = jnp.where(is_right_UMG, reward, jnp.minimum(0.0, reward))
    return jnp.where(longest > shortest, reward, 0.0)


def cosine_length(
    lengths, is_right, *, max_length: int, right: tuple[float, float], wrong: tuple[float, float], clamp: bool = True
):
    """Return end + (start - end) * (1 + cos(pi * length / max_length)) / 2 with (start, end) of right or wrong.

    start is the reward of length 0, end that of max_length. With right (1, .5) and wrong (-1, -.5), right answers are
    best short and wrong ones long. Source: arXiv:2502.03373 §4.2, as TRL and open-r1 compute it.

    Args:
        lengths: tokens of completions.
        is_right: bool, the same shape.
        max_length: tokens.
        right, wrong: (start, end).
        clamp: longer completions count as max_length (TRL); without, the cosine turns back (open-r1).
    """
    progress = lengths.astype(jnp.float32) / max_length
    progress = jnp.minimum(progress, 1.0) if clamp else progress
    start, end = (jnp.where(is_right, a, b) for a, b in zip(right, wrong, strict=True))
    return end + (start - end) * (1 + jnp.cos(jnp.pi * progress)) / 2


def soft_overlong(lengths, *, max_length: int, cache: int, factor: float = 1.0):
    """Return 0 up to max_length - cache tokens, then falling linearly to -factor at max_length, and -factor beyond.

    Source: DAPO, arXiv:2503.14476 eq. 13. Lengths are those of completions, without their prompts.

    Args:
        lengths: tokens of completions.
        max_length: tokens.
        cache: tokens over which the penalty grows, at least 1.
        factor: the largest penalty.
    """
    return -factor * jnp.clip((lengths.astype(jnp.float32) - (max_length - cache)) / cache, 0.0, 1.0)


# --- Rewards of evidence ------------------------------------------------------------------------------------------


def kimi_length_reward(evidence: Evidence) -> Earned:
    """Return `kimi_length` of the completions."""
    return _earned(kimi_length(_lengths(evidence), evidence.outcome == 1))


def cosine_length_reward(evidence: Evidence, options: RewardConfig) -> Earned:
    """Return `cosine_length` of the completions."""
    reward = cosine_length(
        _lengths(evidence), evidence.outcome == 1, max_length=_limit(evidence), right=options.shaping.cosine_right,
        wrong=options.shaping.cosine_wrong,
    )  # fmt: skip
    return _earned(reward)


def soft_overlong_reward(evidence: Evidence, options: RewardConfig) -> Earned:
    """Return `soft_overlong` of the completions."""
    limit = _limit(evidence)
    cache = max(1, round(options.shaping.overlong_fraction * limit))
    return _earned(soft_overlong(_lengths(evidence), max_length=limit, cache=cache))


def overlong_filter(evidence: Evidence) -> Earned:
    """Leave truncated completions out of the update; they count in their group's baseline.

    Source: overlong filtering of DAPO, arXiv:2503.14476 §3.4.
    """
    zero, rollouts = jnp.zeros(evidence.tasks.prompts.row_ids.shape, jnp.float32), evidence.rollouts
    return Earned(
        rewards=zero, faults=zero > 0, metrics={}, row_mask=~rollouts.truncated.reshape(zero.shape),
        token_mask=jnp.zeros_like(rollouts.mask),
    )  # fmt: skip


def _lengths(evidence: Evidence):
    """Return the tokens of the completions, i32 [U, M, G]."""
    return evidence.rollouts.mask.sum(-1).reshape(evidence.tasks.prompts.row_ids.shape)


def _limit(evidence: Evidence) -> int:
    """Return C: rollout.max_completion_tokens."""
    return evidence.rollouts.tokens.shape[-1]


def _earned(rewards_UMG) -> Earned:
    return Earned(rewards=rewards_UMG, faults=jnp.zeros(rewards_UMG.shape, bool), metrics={})
