"""Rewards by trained reward models: of whole completions, and of their steps.

Their scores are in the models' units: probabilities, values in (-1, 1), or scores without a level (bradley_terry).
"""

import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.reward_models.process import aggregate, consistent, step_advantages
from rpt_jax.scoring.requests import Request
from rpt_jax.types import Earned, Evidence

AT_END = Request(name="reward_model", policy="reward_model", keep="nothing", target="completion", readout="end")
AT_STEPS = Request(name="process_model", policy="process_model", keep="nothing", target="completion", readout="steps")


def reward_model(evidence: Evidence) -> Earned:
    """Reward each completion by the score behind its last token; a policy cheats with whatever the model likes."""
    scores = evidence.scores[AT_END.name]
    rewards = scores.values[..., 0].reshape(evidence.tasks.prompts.row_ids.shape)
    return Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={})


def process_model(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward the steps of each completion, in one of three ways (`reward.models.process_use`).

    The reward itself is 0 except with "reward", so that the outcome's advantage stays what it is.
    """
    settings, scores = options.models, evidence.scores[AT_STEPS.name]
    U, M, G = shape = evidence.tasks.prompts.row_ids.shape
    whole = aggregate(scores.values, scores.mask, settings.aggregation).reshape(shape)
    rewards, token_advantages, row_mask = jnp.zeros(shape), None, None
    if settings.process_use == "reward":
        rewards = whole
    elif settings.process_use == "steps":
        grouped = (x.reshape(U, M, G, -1) for x in (scores.values, scores.mask))
        token_advantages = step_advantages(*grouped).reshape(scores.values.shape)
    else:
        row_mask = consistent(whole, evidence.outcome == 1, keep=settings.keep)
    return Earned(
        rewards=rewards,
        faults=jnp.zeros(shape, bool),
        metrics={"score": whole, "steps": scores.mask.sum(-1).reshape(shape).astype(jnp.float32)},
        row_mask=row_mask,
        token_advantages=token_advantages,
    )
