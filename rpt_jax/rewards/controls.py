"""Control rewards: what RL teaches without the information that a reward carries.

Both log the real prefix reward as a metric.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from rpt_jax.rewards.prefix import prefix
from rpt_jax.types import Earned, Evidence


def random(evidence: Evidence) -> Earned:
    """Hand each group's prefix rewards to its rollouts in random order.

    A group has as many rewarded rollouts as with `prefix`, so the same groups teach, with advantages of the same size.
    But a rollout's expected advantage is 0, whatever it says. Source: the random rewards of arXiv:2506.10947, at the
    rate of each group instead of one rate.
    """
    earned, tasks, rollouts = prefix(evidence), evidence.tasks, evidence.rollouts
    U, M, _ = earned.rewards.shape
    # The order is a hash of the group's tokens: it repeats with them, and says nothing about them.
    weights = jnp.arange(1, rollouts.tokens.shape[-1] + 1)
    tokens_UM = (rollouts.tokens * rollouts.mask * weights).reshape(U, M, -1).sum(-1)

    def shuffled(rewards_G, task_id, tokens):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), task_id), tokens)
        return jax.random.permutation(key, rewards_G)

    shuffle = jax.vmap(jax.vmap(shuffled))
    rewards = shuffle(earned.rewards, tasks.references.task_ids, tokens_UM)
    return replace(earned, rewards=rewards, metrics={"prefix": earned.rewards})


def shuffled_targets(evidence: Evidence) -> Earned:
    """Compare each prediction with the continuation at another position of the batch.

    Real prompts are numbered in order, and half of their number lies between a prompt and its substitute; a single
    prompt keeps its own. The reward still wants a boxed text that could stand in the corpus, but not the right one.
    """
    tasks, mask_UM = evidence.tasks, evidence.tasks.prompts.prompt_mask
    flat = mask_UM.reshape(-1)
    num_real = jnp.maximum(1, flat.sum())
    order = jnp.argsort(~flat, stable=True)
    number = jnp.cumsum(flat) - 1
    other = order[(number + num_real // 2) % num_real].reshape(mask_UM.shape)

    references = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[other], tasks.references)
    earned = prefix(replace(evidence, tasks=replace(tasks, references=references)))
    return replace(earned, metrics={"prefix": prefix(evidence).rewards})
