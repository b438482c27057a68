"""DAPO's dynamic sampling with static shapes: sample further rounds until enough groups are informative.

Every round has the batch's [U, M, G] shape and the same parameters. The U trunks with the most informative groups are
kept; remaining degenerate groups are masked and counted.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.parallel.distributed import to_host
from rpt_jax.rl.advantages import degenerate_groups
from rpt_jax.types import Experience, TaskBatch


def collect(
    next_tasks: Callable[[], TaskBatch], roll_out: Callable[[TaskBatch, int], Experience], *, rounds: int
) -> tuple[Experience, list[Experience]]:
    """Collect the experience of one update.

    Source: dynamic sampling, arXiv:2503.14476 §3.2. Differs: at most `rounds` rounds, whole trunks are kept, nothing
    carries over to a later step.

    Args:
        next_tasks: returns tasks on the mesh.
        roll_out: (tasks, round number from 0) -> their experience.
        rounds: maximum; 1 keeps the batch as it is, with its degenerate groups.
    Returns:
        (experience of the update, experience of every round).
    """
    spent = []
    if rounds == 1:
        spent.append(roll_out(next_tasks(), 0))
        return spent[0], spent
    informative = np.zeros((0, 1), bool)
    for number in range(rounds):
        spent.append(roll_out(next_tasks(), number))
        mask = to_host(_informative(spent[-1]))
        informative = np.concatenate([informative, mask]) if number else mask
        if informative.any(-1).sum() >= len(mask):
            break
    best = np.argsort(-informative.sum(-1), kind="stable")[: len(mask)]
    packed = _pack(spent, best)
    return replace(packed, group_mask=_informative(packed)), spent


def _informative(experience: Experience):
    return experience.group_mask & ~degenerate_groups(experience.earned.rewards)


@jax.jit
def _pack(rounds: list[Experience], trunks) -> Experience:
    return jax.tree.map(lambda *leaves: jnp.take(jnp.concatenate(leaves), trunks, axis=0), *rounds)
