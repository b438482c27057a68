"""What the phases of a step ask of each chip, counted by hand: arithmetic, memory, the least traffic."""

from dataclasses import dataclass

from rpt_jax.config import Config
from rpt_jax.work import Shape, update_flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one phase of a step asks of each chip; every rollout of full length."""

    name: str
    flops: float
    bytes: float
    """Read and written in the chip's memory: weights, caches and what is kept for the backward pass, each once."""
    least_traffic: float
    """Bytes that this layout of parameters and activations has to send, however it is scheduled."""


def count_work(config: Config, num_tail: int) -> list[Work]:
    """The phases of a step, counted by hand: products of the matrices, attention, and the head."""
    m, r, mesh = config.model, config.rollout, config.mesh
    U, M, G, L, E = r.num_trunks, r.prompts_per_trunk, r.group_size, config.data.trunk_length, num_tail
    C, B, chips = r.max_completion_tokens, U * M * G, mesh.num_devices
    D, size, shape = m.width, 2 if m.activation_dtype == "bfloat16" else 4, Shape(m)
    layer, head, num = shape.layer, shape.head, m.num_layers
    kv = 2 * num * m.num_kv_heads * m.head_size * size  # bytes of a token
    stems, completions = U * (L + M * E), B * C
    stem_pairs = U * (L * L / 2 + M * E * (L + E / 2))
    pairs = B * C * (L + E + C / 2)
    tensor_share, fsdp_share = (mesh.tensor - 1) / mesh.tensor, (mesh.fsdp - 1) / mesh.fsdp
    weights = shape.stored * size
    slots = min(r.slots_per_trunk or M * G, M * G)
    waves, rows = M * G / slots, U / mesh.trunk_shards * slots
    columns = _columns_read(C, waves)

    def reduced(tokens: float, products: float) -> float:
        """Bytes sent for activations that are summed over tensor (or gathered and scattered: a half each), per chip."""
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
    micro = U / (config.mesh.microbatch_trunks or U // config.loss.num_minibatches)
    # Two for the forward pass, twice that backward, or once where weights have no gradients of their own; and what is
    # made anew for it, all but a layer's last product.
    products = (2 + (2 if config.lora.rank else 4)) * layer + (2 * (layer - D * m.mlp_width) if m.remat else 0)
    attention = (4 if m.remat else 3) * shape.attention_flops(stem_pairs + pairs)
    trained = weights / size * 4 / mesh.tensor * (0 if config.lora.rank else 1)
    update_work = Work(
        name="update",
        flops=(products * num * (stems + completions) + update_flops(head, completions, has_adapters=False) + attention)
        / chips,
        bytes=micro * 3 * weights / mesh.tensor + 2 * num * (stems + completions) / chips * D * size,
        # Layers are gathered forward and backward, embedding and head once; gradients are scattered to their shards and
        # met over data.
        least_traffic=micro * (gathered * (1 + num * layer * size / weights) + trained * fsdp_share)
        + 2 * trained / mesh.fsdp * (mesh.data - 1) / mesh.data
        + reduced(stems + completions, 5.5 if m.remat else 4),
    )
    return [prefill, decode, update_work]


def _columns_read(limit: int, waves: float) -> float:
    """Columns of a slot's cache that are read in all: windows double while a row grows to its limit.

    Caches that are wide once stay so: the waves behind the first read all columns at every step.
    """
    columns, width, fed = 0.0, 64, 0
    while fed < limit:
        width = min(width, limit)
        columns, fed, width = columns + (width - fed) * width, width, 2 * width
    return columns + (waves - 1) * limit * limit
