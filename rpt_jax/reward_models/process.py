"""Process models: a score at the end of each step (arXiv:2305.20050), and what rewards make of the scores."""

import jax.numpy as jnp

from rpt_jax.reward_models.outcome import outcome

AGGREGATIONS = ("min", "prod", "last", "mean")


def process(scores, labels):
    """Return the cross-entropy of each step's score; its mean over labelled steps is the loss.

    With two logits per step, as TRL's PRMTrainer has them, the score is their difference.

    Args:
        scores: f32, logits at the ends of steps.
        labels: f32 in [0, 1]: hard ones (right or wrong), or the share of right continuations (arXiv:2312.08935).
    """
    return outcome(scores, labels)


def aggregate(probabilities, mask, how: str):
    """Return one probability per completion from those of its steps; 0 without steps.

    Codes differ: min (arXiv:2305.20050 also prod, which favours few steps), last (search-and-learn).

    Args:
        probabilities: f32 [..., S].
        mask: bool [..., S], ends of steps.
        how: min, prod, last or mean.
    Raises:
        ValueError: unknown `how`.
    """
    p, has_any = jnp.asarray(probabilities), mask.any(-1)
    if how == "min":
        found = jnp.min(jnp.where(mask, p, 1.0), axis=-1)
    elif how == "prod":
        found = jnp.prod(jnp.where(mask, p, 1.0), axis=-1)
    elif how == "last":
        last = p.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
        found = jnp.take_along_axis(p, last[..., None], axis=-1)[..., 0]
    elif how == "mean":
        found = jnp.mean(p, axis=-1, where=mask)
    else:
        raise ValueError(f"aggregation {how!r}; it must be one of {', '.join(AGGREGATIONS)}")
    return jnp.where(has_any, found, 0.0)


def normalized_steps(rewards_UMGC, ends_UMGC):
    """Standardise the step rewards of each group over all steps of all its rollouts; 0 elsewhere.

    Sigmoid scores are positive, so without this every further step would pay. Source: arXiv:2402.03300 §4.1.3.

    Args:
        rewards_UMGC: f32, at the ends of steps.
        ends_UMGC: bool.
    """
    axes = (-2, -1)
    count = jnp.maximum(1, ends_UMGC.sum(axes, keepdims=True))
    mean = jnp.sum(jnp.where(ends_UMGC, rewards_UMGC, 0.0), axis=axes, keepdims=True) / count
    centered = jnp.where(ends_UMGC, rewards_UMGC - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(centered**2, axis=axes, keepdims=True) / count)
    return centered / (deviation + 1e-6)


def step_advantages(rewards_UMGC, ends_UMGC):
    """Return for each token the sum of the normalised rewards of its own and later steps (arXiv:2402.03300 §4.1.3)."""
    normalized = normalized_steps(rewards_UMGC, ends_UMGC)
    return jnp.flip(jnp.cumsum(jnp.flip(normalized, -1), axis=-1), -1)


def consistent(scores_UMG, is_right_UMG, *, keep: float):
    """Return which rollouts PROF keeps, bool: among the right ones those with the best scores, among the wrong ones
    those with the worst, the same share of both; at least one of each kind that a group has.

    Source: PROF, arXiv:2509.03403: a process model only filters, so that it cannot be exploited.

    Args:
        scores_UMG: f32, aggregated step scores.
        is_right_UMG: bool.
        keep: share to keep, in (0, 1].
    """

    def best_of(members, scores):
        number = jnp.ceil(keep * members.sum(-1, keepdims=True) - 1e-6)
        order = jnp.argsort(jnp.argsort(-jnp.where(members, scores, -jnp.inf), axis=-1, stable=True), axis=-1)
        return members & (order < number)

    return best_of(is_right_UMG, scores_UMG) | best_of(~is_right_UMG, -scores_UMG)
