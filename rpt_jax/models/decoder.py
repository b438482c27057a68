"""The one model graph: the Qwen2 / Qwen3 / Llama block over trunks and the branches that leave them.

`forward` is the update's and the scorer's path: one scan over stacked layers, each running the trunk and then the
branches against that layer's fresh trunk keys and values. `prefill` and `extend` are the sampler's path over the same
block and the same parameters: layers unrolled, caches updated in place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig
from rpt_jax.models.attention import branch_attention, cache_layout, causal_attention
from rpt_jax.parallel import mesh as mesh_lib
from rpt_jax.types import Sequences


def rope_angles(config: DecoderConfig, positions_T):
    """Cosines and sines f32 [..., T, Q / 2] of rotary position embedding. Source: arXiv:2104.09864 §3.4.2."""
    angles = positions_T[..., None].astype(jnp.float32) * rope_frequencies(config).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position f64 [Q / 2], stretched where config.rope_scaling says so.

    Source: meta-llama/llama-models models/llama3/model.py apply_scaling.
    """
    half, scaling = config.head_size // 2, config.rope_scaling
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if scaling.factor == 1:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * np.pi)  # over the original length
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _rotate(x_THQ, rope):
    """Rotate the two halves of each head (the layout of Hugging Face checkpoints)."""
    cos, sin = (r[..., None, :] for r in rope)
    first, second = jnp.split(x_THQ.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_THQ.dtype)


def _rms_norm(x_D, scale_D, eps: float):
    x32 = x_D.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale_D).astype(x_D.dtype)


class Block(nn.Module):
    """One decoder layer. `project` and `finish` are its two halves around attention; `__call__` is the scanned form."""

    config: DecoderConfig
    keep_trunk_kv: bool = False

    def setup(self):
        c = self.config
        depth_scale = (2 * c.num_layers) ** -0.5

        def weight(name, shape, axes, fan_in, scale=1.0):
            init = nn.initializers.normal(scale * fan_in**-0.5)
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        def vector(name, shape, axes, init=nn.initializers.ones):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        D, F, H, K, Q = c.width, c.mlp_width, c.num_heads, c.num_kv_heads, c.head_size
        self.attention_norm = vector("attention_norm", (D,), (None,))
        self.q_proj = weight("q_proj", (D, H, Q), ("width", "heads", "head_size"), D)
        self.k_proj = weight("k_proj", (D, K, Q), ("width", "kv_heads", "head_size"), D)
        self.v_proj = weight("v_proj", (D, K, Q), ("width", "kv_heads", "head_size"), D)
        self.o_proj = weight("o_proj", (H, Q, D), ("heads", "head_size", "width"), H * Q, depth_scale)
        self.mlp_norm = vector("mlp_norm", (D,), (None,))
        self.gate_proj = weight("gate_proj", (D, F), ("width", "mlp"), D)
        self.up_proj = weight("up_proj", (D, F), ("width", "mlp"), D)
        self.down_proj = weight("down_proj", (F, D), ("mlp", "width"), F, depth_scale)
        if c.qk_norm:
            self.q_norm = vector("q_norm", (Q,), (None,))
            self.k_norm = vector("k_norm", (Q,), (None,))
        zeros = nn.initializers.zeros
        if c.qkv_bias:
            self.q_bias = vector("q_bias", (H, Q), ("heads", "head_size"), zeros)
            self.k_bias = vector("k_bias", (K, Q), ("kv_heads", "head_size"), zeros)
            self.v_bias = vector("v_bias", (K, Q), ("kv_heads", "head_size"), zeros)
        if c.o_bias:
            self.o_bias = vector("o_bias", (D,), ("width",), zeros)
        if c.mlp_bias:
            self.gate_bias = vector("gate_bias", (F,), ("mlp",), zeros)
            self.up_bias = vector("up_bias", (F,), ("mlp",), zeros)
            self.down_bias = vector("down_bias", (D,), ("width",), zeros)

    def linear(self, name: str, x, num_input_axes: int = 1):
        """x contracted with the weight `<name>_proj`, its low-rank adapter and bias added where the tree has them."""

        y = jnp.tensordot(x, getattr(self, f"{name}_proj").astype(x.dtype), num_input_axes)
        if self.has_variable("params", f"{name}_proj_lora_a"):
            a, b = (self.get_variable("params", f"{name}_proj_lora_{part}").astype(y.dtype) for part in "ab")
            y = y + jnp.tensordot(jnp.tensordot(x, a, num_input_axes), b, 1)
        bias = getattr(self, f"{name}_bias", None)
        return y if bias is None else y + bias.astype(y.dtype)

    def project(self, x_TD, rope):
        """Rotated queries [..., T, H, Q] and keys, and values [..., T, K, Q]."""
        c = self.config
        x_TD = _rms_norm(x_TD, self.attention_norm, c.norm_eps)
        q, k, v = (self.linear(name, x_TD) for name in "qkv")
        if c.qk_norm:
            q, k = _rms_norm(q, self.q_norm, c.norm_eps), _rms_norm(k, self.k_norm, c.norm_eps)
        return _rotate(q, rope), _rotate(k, rope), v

    def finish(self, x_TD, attended_THQ):
        """Output projection and SwiGLU, each added to the residual stream."""
        x_TD = x_TD + self.linear("o", attended_THQ, 2)
        y_TD = _rms_norm(x_TD, self.mlp_norm, self.config.norm_eps)
        return x_TD + self.linear("down", nn.silu(self.linear("gate", y_TD)) * self.linear("up", y_TD))

    def __call__(self, streams, trunk_rope, segments_UL, branch_rope, cuts_UR, own_mask_URTS):
        trunk_ULD, branch_URTD = streams
        q, k, v = self.project(trunk_ULD, trunk_rope)
        trunk_ULD = self.finish(trunk_ULD, causal_attention(q, k, v, segments_UL))
        trunk_kv = cache_layout(k, v)
        if branch_URTD is not None:
            q, k, v = self.project(branch_URTD, branch_rope)
            attended = branch_attention(q, trunk_kv, cuts_UR, cache_layout(k, v), own_mask_URTS)
            branch_URTD = self.finish(branch_URTD, attended)
        return (trunk_ULD, branch_URTD), (trunk_kv if self.keep_trunk_kv else None)


class Decoder(nn.Module):
    """Embedding, scanned blocks, final norm."""

    config: DecoderConfig
    keep_trunk_kv: bool = False

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), ("vocab", "width"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
        if not c.tie_embeddings:
            self.head = self.param("head", init, (c.vocab_size, c.width))
        self.final_norm = self.param(
            "final_norm", nn.with_logical_partitioning(nn.initializers.ones, (None,)), (c.width,)
        )
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.keep_trunk_kv)

    def __call__(self, sequences: Sequences):
        c = self.config
        segments_UL = sequences.trunk_segments
        trunk_rope = rope_angles(c, trunk_positions(sequences.trunk_tokens.shape[1], segments_UL))
        trunk_ULD, branch_URTD = self.embed(sequences.trunk_tokens), None
        branch_rope = own_mask_URTS = None
        if sequences.branch_tokens.shape[1]:
            if segments_UL is not None:
                raise ValueError("branches cannot leave a trunk of packed sequences; give trunk_segments=None")
            branch_URTD = self.embed(sequences.branch_tokens)
            branch_rope = rope_angles(c, branch_positions(sequences.cuts, sequences.branch_mask))
            own_mask_URTS = own_mask(sequences.branch_mask)
        (trunk_ULD, branch_URTD), trunk_kv = self.layers(
            (trunk_ULD, branch_URTD), trunk_rope, segments_UL, branch_rope, sequences.cuts, own_mask_URTS
        )
        trunk_ULD = self.normalize(trunk_ULD)
        branch_URTD = None if branch_URTD is None else self.normalize(branch_URTD)
        return trunk_ULD, branch_URTD, trunk_kv

    def embed(self, tokens):
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.activation_dtype)

    def normalize(self, x):
        return _rms_norm(x, self.final_norm, self.config.norm_eps)


def trunk_positions(length: int, segments_UL=None):
    """Rotary positions i32 [1 or U, L]: from 0, and from 0 again where a segment begins."""
    columns = jnp.arange(length)[None]
    if segments_UL is None:
        return columns
    begins = jnp.pad(jnp.diff(segments_UL, axis=1) != 0, ((0, 0), (1, 0)))
    return columns - jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)


def branch_positions(cuts_UR, branch_mask_URT):
    """Rotary positions i32 [U, R, T]: they run on from the cut, counting real tokens only."""
    return cuts_UR[..., None] + jnp.cumsum(branch_mask_URT, axis=-1) - 1


def own_mask(branch_mask_URT):
    """bool [U, R, T, S]: query t sees real own slots up to its own."""
    T = branch_mask_URT.shape[-1]
    return jnp.tril(jnp.ones((T, T), bool))[None, None] & branch_mask_URT[:, :, None, :]


def init_params(config: DecoderConfig, mesh: Mesh, key) -> Any:
    """Random parameters, f32, created on the mesh in their own shards."""
    shardings = jax.tree.map(lambda p: p.sharding, abstract_params(config, mesh))
    return jax.jit(partial(_init, config), out_shardings=shardings)(key)


def abstract_params(config: DecoderConfig, mesh: Mesh) -> Any:
    """Shapes, f32 and shardings of the parameters, nothing allocated."""
    boxed = jax.eval_shape(partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        nn.unbox(boxed),
        mesh_lib.param_shardings(mesh, boxed),
    )


def _init_boxed(config: DecoderConfig, key):
    return Decoder(config).init(key, empty_branches(jnp.zeros((1, 2), jnp.int32)))["params"]


def _init(config: DecoderConfig, key):
    return nn.unbox(_init_boxed(config, key))


def empty_branches(trunk_tokens_UL) -> Sequences:
    """Sequences of trunks alone."""
    U = trunk_tokens_UL.shape[0]
    return Sequences(
        trunk_tokens=trunk_tokens_UL,
        cuts=jnp.zeros((U, 0), jnp.int32),
        branch_tokens=jnp.zeros((U, 0, 1), jnp.int32),
        branch_mask=jnp.zeros((U, 0, 1), bool),
    )


def forward(config: DecoderConfig, params, sequences: Sequences):
    """Final hidden states of trunks [U, L, D] and branches [U, R, T, D] (None when R = 0)."""
    trunk_ULD, branch_URTD, _ = Decoder(config).apply({"params": params}, sequences)
    return trunk_ULD, branch_URTD


def logits(config: DecoderConfig, params, tokens_BT):
    """Whole logits f32 [B, T, V] of plain sequences; for small inputs and tests."""
    hidden_BTD, _ = forward(config, params, empty_branches(tokens_BT))
    return jnp.einsum("btd,vd->btv", hidden_BTD, output_head(params), preferred_element_type=jnp.float32)


def output_head(params):
    """The head's matrix [V, D], its low-rank adapter added; the embedding where the two are tied."""
    head_VD = params["head"] if "head" in params else params["embedding"]
    if "head_lora_a" in params:
        return head_VD + (params["head_lora_a"] @ params["head_lora_b"]).T.astype(head_VD.dtype)
    return head_VD


# --- The sampler's path -------------------------------------------------------------------------------------------


def prefill(config: DecoderConfig, params, trunk_tokens_UL) -> list:
    """Run each trunk once; a (k [U, K, Q, L], v [U, K, L, Q]) pair per layer."""
    _, _, (k, v) = Decoder(config, keep_trunk_kv=True).apply({"params": params}, empty_branches(trunk_tokens_UL))
    return [(k[i], v[i]) for i in range(config.num_layers)]


def unstack_layers(config: DecoderConfig, params) -> list:
    """Per-layer parameter trees. Slice outside the decode loop: a slice inside would copy weights at every token."""
    return [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(config.num_layers)]


def empty_cache(config: DecoderConfig, num_trunks: int, num_branches: int, num_slots: int) -> list:
    """Zeroed own caches of branches, a (k [U, R, K, Q, S], v [U, R, K, S, Q]) pair per layer."""
    lead, dtype = (num_trunks, num_branches, config.num_kv_heads), config.activation_dtype
    k_shape, v_shape = (*lead, config.head_size, num_slots), (*lead, num_slots, config.head_size)
    return [(jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype)) for _ in range(config.num_layers)]


def extend(config: DecoderConfig, params, layers, tokens_URT, positions_URT, trunk_kv, cuts_UR, cache, slot, mask_URTS):
    """Feed T further tokens to every branch and append their keys and values at `slot`.

    Args:
        layers: from `unstack_layers`.
        tokens_URT, positions_URT: i32.
        trunk_kv: from `prefill`.
        cache: own caches, from `empty_cache` or an earlier call.
        slot: i32 scalar, where the first of the T tokens goes.
        mask_URTS: bool, own slots each token sees (its own among them).
    Returns:
        hidden states of the tokens [U, R, T, D] after the final norm, and the caches.
    """
    variables = {"params": params}
    model, block = Decoder(config), Block(config)
    x = model.apply(variables, tokens_URT, method=Decoder.embed)
    rope = rope_angles(config, positions_URT)
    new_cache = []
    for layer, layer_trunk_kv, (cache_k, cache_v) in zip(layers, trunk_kv, cache, strict=True):
        q, k, v = block.apply({"params": layer}, x, rope, method=Block.project)
        new_k, new_v = cache_layout(k, v)
        cache_k = jax.lax.dynamic_update_slice_in_dim(cache_k, new_k, slot, axis=4)
        cache_v = jax.lax.dynamic_update_slice_in_dim(cache_v, new_v, slot, axis=3)
        attended = branch_attention(q, layer_trunk_kv, cuts_UR, (cache_k, cache_v), mask_URTS)
        x = block.apply({"params": layer}, x, attended, method=Block.finish)
        new_cache.append((cache_k, cache_v))
    return model.apply(variables, x, method=Decoder.normalize), new_cache


# --- Log-probabilities without a [rows, tokens, vocabulary] array ---------------------------------------------------

# Logits of one chunk hold at most so many numbers (128 MiB of float32).
_CHUNK_LOGITS = 2**25


@partial(jax.jit, static_argnames=("temperature",))
def token_logprobs(head_VD, hidden_UND, targets_UN, *, temperature: float):
    """Log-probability of each target and entropy of its law, softmax(logits / temperature).

    Chunks of the token dimension are scanned with their logits recomputed in the backward pass.

    Args:
        head_VD: output head.
        hidden_UND: hidden states after the final norm, any token dimension N.
        targets_UN: i32.
        temperature: > 0.
    Returns:
        (logprobs f32 [U, N], entropy f32 [U, N]), nats.
    """
    U, n, _ = hidden_UND.shape
    chunk = max(1, min(n, _CHUNK_LOGITS // (U * head_VD.shape[0])))
    num_chunks = -(-n // chunk)
    pad = num_chunks * chunk - n

    def chunked(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(U, num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_logprobs(hidden_UnD, targets_Un):
        logits_UnV = jnp.einsum(
            "und,vd->unv", hidden_UnD, head_VD.astype(hidden_UnD.dtype), preferred_element_type=jnp.float32
        )
        log_law = jax.nn.log_softmax(logits_UnV / temperature, axis=-1)
        chosen = jnp.take_along_axis(log_law, targets_Un[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_law) * log_law, axis=-1)
        return chosen, jax.lax.stop_gradient(entropy)

    logprobs, entropy = jax.lax.map(lambda xs: chunk_logprobs(*xs), (chunked(hidden_UND), chunked(targets_UN)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(U, -1)[:, :n] for x in (logprobs, entropy))
