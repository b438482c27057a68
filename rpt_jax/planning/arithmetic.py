"""Work of each phase of a step per chip, counted by hand: arithmetic, memory traffic, least link traffic."""

from dataclasses import dataclass

from rpt_jax.config import Config
from rpt_jax.models.decode_kernel import COLUMNS
from rpt_jax.models.decoding import has_fused_attention
from rpt_jax.work import Shape, update_flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one phase of a step on each chip, if every rollout has full length."""

    name: str
    """prefill, decode or update."""
    flops: float
    """Floating-point operations."""
    bytes: float
    """Bytes read and written in the chip's memory: weights, caches and activations kept for the backward pass, each
    once per pass."""
    least_traffic: float
    """Bytes that this layout of parameters and activations has to send under any schedule."""


def count_work(config: Config, num_tail: int) -> list[Work]:
    """Count the prefill, decode and update of a step: matrix products, attention and the head.

    Args:
        config: with a mesh that fits the slice.
        num_tail: tokens of the prompt after the text.
    """
    m, r, mesh = config.model, config.rollout, config.mesh
    U, M, G, L, E = r.num_trunks, r.prompts_per_trunk, r.group_size, config.data.trunk_length, num_tail
    C, B, chips = r.max_completion_tokens, U * M * G, mesh.num_devices
    D, size, shape = m.width, 2 if m.activation_dtype == "bfloat16" else 4, Shape(m)
    layer, head, num = shape.layer, shape.head, m.num_layers
    kv = 2 * num * m.num_kv_heads * m.head_size * size  # bytes per token
    stems, completions = U * (L + M * E), B * C
    stem_pairs = U * (L * L / 2 + M * E * (L + E / 2))
    pairs = B * C * (L + E + C / 2)
    tensor_share, fsdp_share = (mesh.tensor - 1) / mesh.tensor, (mesh.fsdp - 1) / mesh.fsdp
    weights = shape.stored * size
    slots = min(r.slots_per_trunk or M * G, M * G)
    waves, rows = M * G / slots, U / mesh.trunk_shards * slots
    columns = waves * C * (C + COLUMNS) / 2 if has_fused_attention(m) else _columns_read(C, waves)

    def reduced(tokens: float, products: float) -> float:
        """Return bytes sent per chip to sum activations over tensor after `products` products of each layer.

        A gather or a scatter alone counts as half a product.
        """
        return 2 * tensor_share * products * num * tokens / mesh.trunk_shards * D * size

    gathered = weights / mesh.tensor * fsdp_share
    prefill = Work(
        name="prefill",
        flops=shape.forward_flops(stems, 0, stem_pairs) / chips,
        bytes=(weights / mesh.tensor + stems / mesh.trunk_shards * kv / mesh.tensor),
        least_traffic=2 * gathered + reduced(stems, 2),
    )
    decode = Work(
        name="decode",
        flops=shape.forward_flops(completions, completions, pairs) / chips,
        bytes=waves * C * weights / mesh.tensor
        + (rows * columns + waves * C * stems / mesh.trunk_shards) * kv / mesh.tensor,
        least_traffic=reduced(completions, 2),
    )
    micro = U / config.microbatch_trunks
    # FLOPs per token of one layer's products: 2 per parameter forward, and 4 backward, or 2 if weights have no
    # gradients. With remat, the backward pass recomputes all but a layer's last product.
    products = (2 + (2 if config.lora.rank else 4)) * layer + (2 * (layer - D * m.mlp_width) if m.remat else 0)
    attention = (4 if m.remat else 3) * shape.attention_flops(stem_pairs + pairs)
    trained = weights / size * 4 / mesh.tensor * (0 if config.lora.rank else 1)
    update_work = Work(
        name="update",
        flops=(products * num * (stems + completions) + update_flops(head, completions, has_adapters=False) + attention)
        / chips,
        bytes=micro * 3 * weights / mesh.tensor + 2 * num * (stems + completions) / chips * D * size,
        # Layers are gathered forward and backward, embedding and head once. Gradients are scattered to their shards and
        # summed over data.
        least_traffic=micro * (gathered * (1 + num * layer * size / weights) + trained * fsdp_share)
        + 2 * trained / mesh.fsdp * (mesh.data - 1) / mesh.data
        + reduced(stems + completions, 5.5 if m.remat else 4),
    )
    return [prefill, decode, update_work]


def _columns_read(limit: int, waves: float) -> float:
    """Return the total number of cache columns (entries along the key axis) that one slot reads.

    The window doubles while rows grow to the limit. It never narrows, so all waves after the first read every column at
    each step.
    """
    columns, width, fed = 0.0, 64, 0
    while fed < limit:
        width = min(width, limit)
        columns, fed, width = columns + (width - fed) * width, width, 2 * width
    return columns + (waves - 1) * limit * limit
