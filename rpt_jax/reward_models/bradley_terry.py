"""Bradley-Terry: P(a is better than b) = sigmoid(score a - score b). Source: arXiv:2203.02155 eq. 1."""

import jax
import jax.numpy as jnp


def bradley_terry(chosen, rejected, *, margin=0.0, centering: float = 0.0):
    """Return -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2 of each pair.

    Its mean over pairs is the loss of TRL's RewardTrainer and, without the second term, of OpenRLHF. Scores have no
    absolute level without `centering`, which pulls pairs to 0 (TRL recommends 0.01; arXiv:2312.09244).

    Args:
        chosen, rejected: f32, scores.
        margin: f32, by how much the chosen score should exceed the other.
        centering: weight of the second term.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def k_way(scores_UK, ranks_UK, mask_UK, *, margin_U=0.0, centering: float = 0.0):
    """Return the mean of `bradley_terry` over all pairs of each prompt whose ranks differ, f32 [U]; 0 without a pair.

    Args:
        scores_UK: f32, scores of the completions of each prompt.
        ranks_UK: f32, the better the higher.
        mask_UK: bool, real completions.
        margin_U: f32, of each prompt's pairs.
        centering: see `bradley_terry`.
    """
    is_pair = (ranks_UK[:, :, None] > ranks_UK[:, None]) & mask_UK[:, :, None] & mask_UK[:, None]
    margin = jnp.broadcast_to(jnp.asarray(margin_U), scores_UK.shape[:1])[:, None, None]
    terms = bradley_terry(scores_UK[:, :, None], scores_UK[:, None], margin=margin, centering=centering)
    total = jnp.sum(jnp.where(is_pair, terms, 0.0), axis=(1, 2))
    return total / jnp.maximum(1, is_pair.sum((1, 2)))
