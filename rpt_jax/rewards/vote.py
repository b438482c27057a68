"""Rewards by vote: no truth is used; the group's most frequent prediction stands in for it."""

from dataclasses import replace

import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.types import Earned, Evidence


def majority(same_UMGG, is_vote_UMG):
    """Return the votes for each rollout's prediction, and whether it is the winner.

    Args:
        same_UMGG: bool, whether two predictions of a group are equal; reflexive and symmetric.
        is_vote_UMG: bool, rollouts that vote.
    Returns:
        (f32 [U, M, G], 1 for votes equal to the most frequent one, else 0; i32 [U, M, G], votes for each prediction).
        The first seen wins a tie. Without a vote, nothing wins.
    """
    votes = jnp.sum(same_UMGG & is_vote_UMG[..., None, :], axis=-1) * is_vote_UMG
    winner = jnp.argmax(votes, axis=-1)  # the first of the most frequent ones
    is_winner = jnp.take_along_axis(same_UMGG, winner[..., None, None], axis=-2)[..., 0, :]
    return (is_winner & is_vote_UMG).astype(jnp.float32), votes


def ttrl(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward the prediction that most rollouts of the group make, byte for byte. Source: TTRL, arXiv:2504.16084 §3.

    All G rollouts vote; with reward.vote_train n > 0, the first n are trained on. Rollouts without a prediction do not
    vote. Differs: an empty prediction does not vote either (it can win in the authors' code), and all G count in the
    baseline of the n that are trained on.
    """
    texts, lengths, is_vote = _votes(evidence)
    same = jnp.all(texts[..., :, None, :] == texts[..., None, :, :], axis=-1)
    same &= lengths[..., :, None] == lengths[..., None, :]
    return _elected(same, is_vote, options)


def ttrl_judged(evidence: Evidence, same_UMGG, faults_UMG, options: RewardConfig) -> Earned:
    """Reward like `ttrl`, with predictions that a judge takes for equal: 1/2 and 0.5 are one vote.

    Args:
        evidence: of the batch.
        same_UMGG, faults_UMG: from `host.make_equivalence_fn`. A failed comparison is logged; it counts as unequal.
        options: of the reward.
    """
    earned = _elected(same_UMGG, _votes(evidence)[2], options)
    return replace(earned, metrics=earned.metrics | {"comparison_fault": faults_UMG.astype(jnp.float32)})


def _votes(evidence: Evidence):
    """Return (texts u8 [U, M, G, X], padding 0; their lengths i32 [U, M, G]; rollouts that vote bool [U, M, G])."""
    predictions, shape = evidence.predictions, evidence.tasks.prompts.row_ids.shape
    texts = predictions.bytes.reshape(*shape, -1)
    lengths, found = predictions.lengths.reshape(shape), predictions.found.reshape(shape)
    # A prediction longer than what was read cannot be compared.
    is_vote = found & (lengths > 0) & (lengths <= texts.shape[-1])
    inside = jnp.arange(texts.shape[-1]) < lengths[..., None]
    return jnp.where(inside, texts, 0), lengths, is_vote


def _elected(same_UMGG, is_vote_UMG, options: RewardConfig) -> Earned:
    shape = is_vote_UMG.shape
    rewards, votes = majority(same_UMGG, is_vote_UMG)
    ratio = votes.max(-1, keepdims=True) / shape[-1]
    trained = jnp.arange(shape[-1]) < (options.vote_train or shape[-1])
    return Earned(
        rewards=rewards,
        faults=jnp.zeros(shape, bool),
        metrics={"majority_ratio": jnp.broadcast_to(ratio, shape)},
        row_mask=jnp.broadcast_to(trained, shape) if options.vote_train else None,
    )
