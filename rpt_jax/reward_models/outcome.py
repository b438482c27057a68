"""Outcome models: the probability that a completion is right, read at its last real token (arXiv:2110.14168)."""

import jax
import jax.numpy as jnp


def outcome(scores, labels):
    """Return the cross-entropy of each score's sigmoid with its label; its mean is the loss.

    Args:
        scores: f32, logits.
        labels: f32 in [0, 1]; 1 is right. Soft labels are shares of right continuations.
    """
    return -(labels * jax.nn.log_sigmoid(scores) + (1 - labels) * jax.nn.log_sigmoid(-scores))


def probability(scores):
    """Return the probability that a completion is right."""
    return jax.nn.sigmoid(jnp.asarray(scores))
