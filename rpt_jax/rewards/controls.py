"""Control rewards: what RL teaches without the information that a reward carries.

They log the real prefix reward as a metric.
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
    earned = prefix(evidence)
    rewards = jax.vmap(jax.vmap(jax.random.permutation))(_keys(evidence), earned.rewards)
    return replace(earned, rewards=rewards, metrics={"prefix": earned.rewards})


def random_lengths(evidence: Evidence) -> Earned:
    """Reward as many rollouts of each group as `prefix`, chosen by their lengths alone.

    A completion is chosen with odds that are the share of right ones among the batch's completions of its length. So
    rewarded completions are as long as right ones, and rewards follow the lengths that `prefix` would teach.
    """
    earned, tasks, rollouts = prefix(evidence), evidence.tasks, evidence.rollouts
    U, M, G = earned.rewards.shape
    lengths = rollouts.mask.sum(-1).reshape(U, M, G)
    real = jnp.broadcast_to(tasks.prompts.prompt_mask[..., None], lengths.shape).astype(jnp.float32)
    counts = jnp.zeros((2, rollouts.mask.shape[-1] + 1))
    number, right = counts.at[:, lengths].add(jnp.stack([real, real * earned.rewards]))
    odds = jnp.log(right[lengths]) - jnp.log(number[lengths])
    # The best of log odds + Gumbel noise are a draw without replacement.
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (G,))))(_keys(evidence))
    rank = jnp.argsort(jnp.argsort(-(odds + noise), axis=-1), axis=-1)
    rewards = (rank < earned.rewards.sum(-1, keepdims=True)).astype(jnp.float32)
    return replace(earned, rewards=rewards, metrics={"prefix": earned.rewards})


def _keys(evidence: Evidence):
    """Return a key for each group, [U, M]: a hash of its tokens, which says nothing about them."""
    task_ids_UM, rollouts = evidence.tasks.references.task_ids, evidence.rollouts
    weights = jnp.arange(1, rollouts.tokens.shape[-1] + 1)
    tokens_UM = (rollouts.tokens * rollouts.mask * weights).reshape(*task_ids_UM.shape, -1).sum(-1)

    def key(task_id, tokens):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), task_id), tokens)

    return jax.vmap(jax.vmap(key))(task_ids_UM, tokens_UM)


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
