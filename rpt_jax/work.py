"""The one FLOP model: compute counted from tokens that are run. The loop, the plan and the benchmarks count with it.

A forward pass costs 2 per parameter and token, an update 6: forward, and backward to activations and to weights. Where
only adapters are trained it costs 4, for the weights' own gradients are never formed. A trunk counts once however many
branches leave it; padding is not counted. Runs compare compute in these terms. Where attention matters, as on a
roofline, it adds 4 per attended pair, layer and unit of the heads' width; the head then meets only tokens that it
predicts from, and the embedding is looked up (`Shape`).
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
    """Numbers in a tree of arrays."""
    return sum(p.size for p in jax.tree.leaves(params))


@jax.jit
def count_tokens(experience: Experience) -> dict[str, jax.Array]:
    """Tokens of one rollout batch: prefilled, sampled, run to score rewards, and prompts repeated for comparison."""
    prompts, rollouts = experience.tasks.prompts, experience.rollouts
    G = prompts.row_ids.shape[-1]
    trunks = jnp.sum(jnp.where(prompts.prompt_mask.any(-1), prompts.trunk_lengths, 0))
    tails = jnp.sum(jnp.where(prompts.prompt_mask, prompts.tail_lengths, 0))
    repeated = jnp.sum(jnp.where(prompts.prompt_mask, prompts.cuts + prompts.tail_lengths, 0))
    sampled = rollouts.mask.sum()
    return {
        "tokens_trunks": trunks,
        "tokens_prefilled": trunks + tails,
        "tokens_sampled": sampled,
        "tokens_scored": experience.tokens_scored.sum(),
        "tokens_if_prompts_repeated": G * repeated + sampled,
    }


def forward_flops(num_params: int, num_tokens: float) -> float:
    """Of passes that score or sample."""
    return FORWARD_FLOPS_PER_PARAMETER * num_params * num_tokens


def update_flops(num_params: int, num_tokens: float, *, has_adapters: bool) -> float:
    """Of an update's forward and backward passes."""
    return (
        (ADAPTER_UPDATE_FLOPS_PER_PARAMETER if has_adapters else UPDATE_FLOPS_PER_PARAMETER) * num_params * num_tokens
    )


def step_flops(
    num_params: int, rounds: list[dict], tokens_updated: float, *, has_adapters: bool, num_scorings: int
) -> float:
    """FLOPs of one step of RL: every round's rollouts and scoring passes, the update.

    Args:
        rounds: `count_tokens` of every rollout round, as floats.
        num_scorings: passes over the update's tokens for old and reference log-probabilities.
    """
    forward = sum(r["tokens_prefilled"] + r["tokens_sampled"] + r["tokens_scored"] for r in rounds)
    forward += tokens_updated * num_scorings
    return forward_flops(num_params, forward) + update_flops(num_params, tokens_updated, has_adapters=has_adapters)


@dataclass(frozen=True)
class Shape:
    """A model's matrices, as its arithmetic meets them."""

    config: DecoderConfig

    @property
    def heads_width(self) -> int:
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
        """Parameters of matrices that are kept: layers, head, and an embedding of its own."""
        return self.body + self.head * (1 if self.config.tie_embeddings else 2)

    def attention_flops(self, num_pairs: float) -> float:
        """Of one pass over so many pairs of a query and a key that it sees, in all layers."""
        return 2 * FORWARD_FLOPS_PER_PARAMETER * self.config.num_layers * self.heads_width * num_pairs

    def forward_flops(self, num_tokens: float, num_predicted: float, num_pairs: float) -> float:
        """Of a forward pass.

        Args:
            num_tokens: through the layers. num_predicted: through the head. num_pairs: attended.
        """
        products = forward_flops(self.body, num_tokens) + forward_flops(self.head, num_predicted)
        return products + self.attention_flops(num_pairs)
