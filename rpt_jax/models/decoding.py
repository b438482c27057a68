"""Decoding: the model graph's block, token by token, against caches that are updated in place.

`prefill` scans over the stems once. `extend` runs unrolled layers, whose weights are laid out before the loop.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decode_kernel
from rpt_jax.models.attention import Kernels, flash_of, kernels_of, merged_attention, to_cache_layout
from rpt_jax.models.decode_kernel import Spans
from rpt_jax.models.decoder import JOINED, Block, Decoder, rope_angles, split_by_heads
from rpt_jax.models.vocabulary_head import output_head
from rpt_jax.parallel.mesh import TRUNK_AXES, constrain, num_shards, on_mesh_of, spec_without
from rpt_jax.types import Sequences


def decoding_weights(config: DecoderConfig, params) -> dict:
    """Return the parameters in `extend`'s layout, {"layers": one tree per layer, "rest": others}, activation dtype.

    On a mesh they are gathered over fsdp once, because one token is too little work to gather them again.
    """
    with on_mesh_of(params):
        return lay_out_for_decoding(
            config, params, specs=tuple(spec_without(p, "fsdp") for p in jax.tree.leaves(params))
        )


@partial(jax.jit, static_argnames=("config", "specs"))
def lay_out_for_decoding(config: DecoderConfig, params, *, specs: tuple) -> dict:
    """Unstack the layers, because slicing inside the decode loop would copy weights at every token.

    Args:
        specs: PartitionSpec of each leaf of `params`, in tree order.
    """

    def cast(path, p):
        # Norms are computed in float32.
        return p if path[-1].key.endswith("norm") else p.astype(config.activation_dtype)

    leaves, tree = jax.tree.flatten(jax.tree_util.tree_map_with_path(cast, params))
    params = tree.unflatten(constrain(leaf, *spec) for leaf, spec in zip(leaves, specs, strict=True))
    if kernels_of(config).join_projections and num_shards("tensor") == 1:
        params |= {"layers": _joined(params["layers"])}
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(config.num_layers)]
    rest = {k: v for k, v in params.items() if k != "layers" and not k.startswith("head_lora")}
    if "head_lora_a" in params:
        rest["head"] = output_head(params)  # merged once, not at every token
    if num_shards("tensor") > 1:
        # The lookup is split by width, the product by vocabulary: two layouts, even if the matrix is tied.
        rest |= {"head": output_head(params), "embedding": constrain(rest["embedding"], None, "tensor")}
    return {"layers": layers, "rest": rest}


def _joined(layers: dict) -> dict:
    """Join projections of one input along their outputs, [N, D, all outputs]; those with adapters stay apart."""
    joined = dict(layers)
    for whole in dict.fromkeys(JOINED.values()):
        parts = [part for part in JOINED if JOINED[part] == whole]
        if any(f"{part}_proj_lora_a" in layers for part in parts):
            continue
        for kind, num_inputs in (("proj", 2), ("bias", 1)):
            names = [f"{part}_{kind}" for part in parts]
            if names[0] in layers:
                flat = [joined.pop(name) for name in names]
                flat = [x.reshape(*x.shape[:num_inputs], -1) for x in flat]
                joined[f"{whole}_{kind}"] = jnp.concatenate(flat, axis=-1)
    return joined


def has_fused_attention(config: DecoderConfig) -> bool:
    """Return whether decoding attends by the kernels of `decode_kernel.py`."""
    kind, queries_per_key = kernels_of(config).fused_decoding, config.num_heads // config.num_kv_heads
    if kind == "emulated":
        return True
    return kind == "triton" and decode_kernel.supports(config.activation_dtype, config.head_size, queries_per_key)


def describe_attention(config: DecoderConfig) -> str:
    """Return which kernels attend in updates and in decoding."""
    update = "cuDNN's fused kernels" if flash_of(config) else "plain products"
    decoding = "fused Triton kernels" if has_fused_attention(config) else "plain products"
    return f"{update} in updates, {decoding} in decoding"


def num_columns(config: DecoderConfig, columns: int) -> int:
    """Return the number of columns that a stem or cache of at least this many has."""
    return decode_kernel.rounded_up(columns) if has_fused_attention(config) else columns


def prefill(config: DecoderConfig, params, stems: Sequences):
    """Run each stem once; return hidden states [U, P, D] after the final norm, and (keys, values) per layer.

    Keys and values have `num_columns` of P columns.
    """
    stem_UPD, _, kv = Decoder(config, return_stem_kv=True).apply({"params": params}, stems)
    more = num_columns(config, stem_UPD.shape[1]) - stem_UPD.shape[1]
    k, v = (_padded(x, axis, more) for x, axis in zip(kv, cache_axes(kernels_of(config)), strict=True))
    return stem_UPD, [(k[i], v[i]) for i in range(config.num_layers)]


def _padded(x, axis: int, more: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths)


def widened(config: DecoderConfig, cache: list, more: int) -> list:
    """Append empty columns to (keys, values) per layer."""
    axes = cache_axes(kernels_of(config))
    return [tuple(_padded(x, axis, more) for x, axis in zip(kv, axes, strict=True)) for kv in cache]


def empty_cache(config: DecoderConfig, num_trunks: int, num_branches: int, num_columns: int) -> list:
    """Return zeroed (keys, values) of branches per layer, in cache layout [U, R, K, ., .]."""
    zeros = jnp.zeros(
        (num_trunks, num_branches, num_columns, config.num_kv_heads, config.head_size), config.activation_dtype
    )
    return [split_by_heads(to_cache_layout(zeros, zeros, kernels_of(config))) for _ in range(config.num_layers)]


def cache_axes(kernels: Kernels) -> tuple[int, int]:
    """Return the column axis of cached keys and of cached values."""
    return (-1 if kernels.keys_transposed else -2), -2


def attend_plain(config: DecoderConfig, stem_mask, own_mask, column) -> Callable:
    """Return attention for `extend` in plain products.

    Args:
        stem_mask: bool [U, R, T, P], stem columns that each token sees.
        own_mask: bool [U, R, T, S], columns of its branch that each token sees, including its own.
        column: i32 scalar, cache column of the first of the T tokens.
    """
    kernels = kernels_of(config)

    def attend(q, k, v, stem_kv, own_kv):
        own_kv = split_by_heads(
            jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=old.ndim + axis)
            for old, new, axis in zip(own_kv, to_cache_layout(k, v, kernels), cache_axes(kernels), strict=True)
        )
        return merged_attention(q, stem_kv, stem_mask, own_kv, own_mask, kernels), own_kv

    return attend


def attend_fused(config: DecoderConfig, spans: Spans, lengths_US, column) -> Callable:
    """Return attention for `extend` by two kernels, for T = 1; arguments as in `decode_kernel.decode_attention`."""
    interpret = kernels_of(config).fused_decoding == "emulated"

    def attend(q, k, v, stem_kv, own_kv):
        new = (x[:, :, 0] for x in (q, k, v))
        attended, own_kv = decode_kernel.decode_attention(
            *new, stem_kv, spans, own_kv, column, lengths_US, interpret=interpret
        )
        return attended[:, :, None], own_kv

    return attend


def extend(config: DecoderConfig, weights, tokens_URT, positions_URT, stem_kv, cache, attend: Callable):
    """Feed T more tokens to every branch and write their keys and values into the caches.

    Args:
        weights: from `decoding_weights`.
        tokens_URT, positions_URT: i32.
        stem_kv: from `prefill`.
        cache: keys and values of the branches, from `empty_cache` or an earlier call.
        attend: from `attend_plain` or `attend_fused`: (queries, keys, values, stem_kv and cache of a layer) ->
            (attended values, cache).
    Returns:
        hidden states of the tokens [U, R, T, D] after the final norm, and the updated caches.
    """
    variables = {"params": weights["rest"]}
    model, block = Decoder(config), Block(config)
    x = model.apply(variables, tokens_URT, method=Decoder.embed)
    rope = rope_angles(config, positions_URT)

    @jax.jit  # traced and lowered once, not for every layer
    def run_layer(layer, x, layer_stem_kv, own_kv):
        q, k, v = block.apply({"params": layer}, x, rope, method=Block.project)
        attended, own_kv = attend(q, k, v, layer_stem_kv, own_kv)
        return constrain(block.apply({"params": layer}, x, attended, method=Block.finish), TRUNK_AXES), own_kv

    new_cache = []
    for layer, layer_stem_kv, own_kv in zip(weights["layers"], stem_kv, cache, strict=True):
        x, own_kv = run_layer(layer, x, layer_stem_kv, own_kv)
        new_cache.append(own_kv)
    return model.apply(variables, x, method=Decoder.normalize), new_cache
