"""Compute counted as tokens actually run: 2N per token sampled or prefilled, 6N per token of the update.

N is the number of parameters; where only adapters are trained the update takes 4N, for their weights' own gradients are
never formed. A trunk counts once however many branches leave it; what prompts repeated for every
rollout would have cost is counted beside it. Padding is not counted.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import Config
from rpt_jax.types import Experience

FORWARD_FLOPS_PER_PARAMETER = 2
UPDATE_FLOPS_PER_PARAMETER = 6
ADAPTER_UPDATE_FLOPS_PER_PARAMETER = 4


def num_parameters(params: Any) -> int:
    return sum(p.size for p in jax.tree.leaves(params))


@jax.jit
def count_tokens(experience: Experience) -> dict[str, jax.Array]:
    """Tokens of one rollout batch: prefilled, sampled, and the same with prompts repeated."""
    tasks, rollouts = experience.tasks, experience.rollouts
    G = tasks.row_ids.shape[-1]
    trunks = jnp.sum(jnp.where(tasks.position_mask.any(-1), tasks.trunk_lengths, 0))
    tails = jnp.sum(jnp.where(tasks.position_mask, tasks.tail_lengths, 0))
    prompts = jnp.sum(jnp.where(tasks.position_mask, tasks.cuts + tasks.tail_lengths, 0))
    sampled = rollouts.mask.sum()
    return {
        "tokens_trunks": trunks,
        "tokens_prefilled": trunks + tails,
        "tokens_sampled": sampled,
        "tokens_if_prompts_repeated": G * prompts + sampled,
    }


@jax.jit
def _checksum(params):
    """Two u32 sums over the bits of all numbers, each weighted by its place: the same on any mesh."""
    total = jnp.zeros(2, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
        place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) * jnp.uint32(2654435761) + number
        mixed = (bits.astype(jnp.uint32) ^ place) * jnp.uint32(2246822519)
        total = total + jnp.stack([jnp.sum(mixed), jnp.sum(mixed ^ (mixed >> 15))])
    return total


def fingerprint(params: Any) -> str:
    """What tells one set of parameters from another; a checksum, no proof against intent."""
    return "-".join(f"{int(part):08x}" for part in _checksum(params))


def update_flops(config: Config, num_params: int, num_tokens: float) -> float:
    each = ADAPTER_UPDATE_FLOPS_PER_PARAMETER if config.lora.rank else UPDATE_FLOPS_PER_PARAMETER
    return each * num_params * num_tokens


def step_flops(config: Config, num_params: int, rounds: list[dict], tokens_updated: float) -> float:
    """FLOPs of one step: every round's rollouts, the passes that score, the update.

    Args:
        rounds: `count_tokens` of every rollout round, as floats.
    """
    forward = sum(r["tokens_prefilled"] + r["tokens_sampled"] for r in rounds)
    # Reference and old log-probabilities each run the update's tokens forward; dense rewards run the trunks again.
    forward += tokens_updated * ((config.loss.kl_coef > 0) + (config.loss.num_minibatches > 1))
    if "dense" in config.reward.name:
        forward += sum(r["tokens_trunks"] for r in rounds)
    return FORWARD_FLOPS_PER_PARAMETER * num_params * forward + update_flops(config, num_params, tokens_updated)
