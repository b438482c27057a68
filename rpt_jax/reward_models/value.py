"""Value models: the expected outcome from the end of each step on (arXiv:2501.11223 §5)."""

import jax
import jax.numpy as jnp

from rpt_jax.reward_models.outcome import outcome


def scaled_sigmoid(scores):
    """Return 2 sigmoid(score) - 1, in (-1, 1): outcomes are -1 and 1 (spcl/x1)."""
    return 2 * jax.nn.sigmoid(jnp.asarray(scores)) - 1


def value(scores, labels, *, loss: str = "squared"):
    """Return the loss of each value; its mean over labelled places is the loss.

    squared: (scaled_sigmoid - label)^2 (x1). cross_entropy: of the probability (value + 1) / 2.

    Args:
        scores: f32, before the sigmoid.
        labels: f32 in [-1, 1].
        loss: squared or cross_entropy.
    Raises:
        ValueError: unknown `loss`.
    """
    if loss == "squared":
        return (scaled_sigmoid(scores) - labels) ** 2
    if loss == "cross_entropy":
        return outcome(scores, (labels + 1) / 2)
    raise ValueError(f"value loss {loss!r}; it must be squared or cross_entropy")
