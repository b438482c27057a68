"""The FLOP model that the loop, the plan and the benchmarks share. It counts tokens that are actually run.

A forward pass costs 2 FLOPs per parameter and token. An update costs 6: forward, and backward to activations and to
weights. An update of adapters costs 4, because gradients of the frozen weights are never formed. A trunk counts once,
however many branches it has, and padding does not count. Rooflines use `Shape`. It also counts attention (4 FLOPs per
attended pair, layer and unit of the heads' width). It counts the head only for tokens that predict, and the embedding
lookup as free.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.types import Experience

FORWARD_FLOPS_PER_PARAMETER = 2
UPDATE_FLOPS_PER_PARAMETER = 6
ADAPTER_UPDATE_FLOPS_PER_PARAMETER = 4


def num_parameters(params: Any) -> int:
    """Return the number of scalars in a tree of arrays."""
    return sum(p.size for p in jax.tree.leaves(params))


@jax.jit
def count_tokens(experience: Experience) -> dict[str, jax.Array]:
    """Count the tokens of one rollout batch: prefilled, sampled, scored for rewards, and with repeated prompts.

    Given tokens of rows that go on count as prefilled, also of rows that had ended and only wait for their group.
    """
    prompts, rollouts = experience.tasks.prompts, experience.rollouts
    G = prompts.row_ids.shape[-1]
    mask = prompts.prompt_mask if experience.sampled_mask is None else experience.sampled_mask
    trunks = jnp.sum(jnp.where(mask.any(-1), prompts.trunk_lengths, 0))
    tails = jnp.sum(jnp.where(mask, prompts.tail_lengths, 0))
    repeated = jnp.sum(jnp.where(mask, prompts.cuts + prompts.tail_lengths, 0))
    sampled, given = rollouts.mask.sum(), jnp.int32(0)
    if prompts.prefix_lengths is not None:
        given = jnp.sum(jnp.where(mask[..., None], prompts.prefix_lengths, 0))
        sampled = sampled - given
    return {
        "tokens_trunks": trunks,
        "tokens_prefilled": trunks + tails + given,
        "tokens_sampled": sampled,
        "tokens_scored": experience.tokens_scored.sum(),
        "tokens_if_prompts_repeated": G * repeated + sampled,
    }


def forward_flops(num_params: int, num_tokens: float) -> float:
    """Return the FLOPs of passes that score or sample."""
    return FORWARD_FLOPS_PER_PARAMETER * num_params * num_tokens


def update_flops(num_params: int, num_tokens: float, *, has_adapters: bool) -> float:
    """Return the FLOPs of an update's forward and backward passes."""
    return (
        (ADAPTER_UPDATE_FLOPS_PER_PARAMETER if has_adapters else UPDATE_FLOPS_PER_PARAMETER) * num_params * num_tokens
    )


def step_flops(
    num_params: int, rounds: list[dict], tokens_updated: float, *, has_adapters: bool, num_scorings: int
) -> float:
    """Return the FLOPs of one RL step: rollouts and scoring passes of every round, and the update.

    Args:
        rounds: `count_tokens` of every rollout round, as floats.
        num_scorings: passes over the update's tokens that compute old and reference log-probabilities.
    """
    forward = sum(r["tokens_prefilled"] + r["tokens_sampled"] + r["tokens_scored"] for r in rounds)
    forward += tokens_updated * num_scorings
    return forward_flops(num_params, forward) + update_flops(num_params, tokens_updated, has_adapters=has_adapters)


@dataclass(frozen=True)
class Shape:
    """Parameter and FLOP counts of a model's matrices."""

    config: DecoderConfig

    @property
    def heads_width(self) -> int:
        """Width of all query heads together."""
        return self.config.num_heads * self.config.head_size

    @property
    def layer(self) -> int:
        """Parameters of one layer's matrices."""
        c = self.config
        return c.width * (2 * self.heads_width + 2 * c.num_kv_heads * c.head_size) + 3 * c.width * c.mlp_width

    @property
    def body(self) -> int:
        """Parameters of all layers' matrices."""
        return self.config.num_layers * self.layer

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.config.vocab_size * self.config.width

    @property
    def stored(self) -> int:
        """Parameters of all stored matrices: layers, head, and the embedding unless it is tied."""
        return self.body + self.head * (1 if self.config.tie_embeddings else 2)

    def attention_flops(self, num_pairs: float) -> float:
        """Return the attention FLOPs of one pass over `num_pairs` visible query-key pairs, in all layers."""
        return 2 * FORWARD_FLOPS_PER_PARAMETER * self.config.num_layers * self.heads_width * num_pairs

    def forward_flops(self, num_tokens: float, num_predicted: float, num_pairs: float) -> float:
        """Return the FLOPs of a forward pass.

        Args:
            num_tokens: tokens that run through the layers.
            num_predicted: tokens that run through the head.
            num_pairs: visible query-key pairs.
        """
        products = forward_flops(self.body, num_tokens) + forward_flops(self.head, num_predicted)
        return products + self.attention_flops(num_pairs)
