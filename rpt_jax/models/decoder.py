"""The one model graph: the Qwen2 / Qwen3 / Llama block over stems and their branches.

A stem is a trunk followed by the tails of its prompts. A column is an index along the key axis. `forward` serves the
update and the scorer: one scan over stacked layers, each running the stem and then the branches against that layer's
stem keys and values. The sampler runs the same block token by token (`decoding.py`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig
from rpt_jax.models.attention import (
    PADDING,
    TRUNK,
    Visibility,
    branch_attention,
    branch_biases,
    causal_attention,
    flash_of,
    fused_attention,
    kernels_of,
    merged_attention,
    to_cache_layout,
)
from rpt_jax.models.flash import bias_of
from rpt_jax.models.vocabulary_head import next_logits
from rpt_jax.parallel import mesh as mesh_lib
from rpt_jax.parallel.mesh import TRUNK_AXES, constrain
from rpt_jax.sequences import trunks_alone
from rpt_jax.types import Sequences, record


def rope_angles(config: DecoderConfig, positions_T):
    """Return rotary cosines and sines, f32 [..., T, Q / 2]. Source: arXiv:2104.09864 §3.4.2."""
    angles = positions_T[..., None].astype(jnp.float32) * rope_frequencies(config).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Return radians per position, f64 [Q / 2], scaled by config.rope_scaling.

    Source: meta-llama/llama-models models/llama3/model.py apply_scaling.
    """
    half, scaling = config.head_size // 2, config.rope_scaling
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if scaling.factor == 1:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * np.pi)  # rotations over the original length
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _rotate(x_THQ, rope):
    """Rotate the two halves of each head (the layout of Hugging Face checkpoints)."""
    half = x_THQ.shape[-1] // 2
    cos, sin = (jnp.concatenate([r, r], axis=-1)[..., None, :] for r in rope)
    x32 = x_THQ.astype(jnp.float32)
    # Rolling instead of splitting and joining makes decoding a twelfth faster on XLA's CPU backend.
    crossed = jnp.roll(x32, half, axis=-1) * jnp.where(jnp.arange(2 * half) < half, -1.0, 1.0)
    return (x32 * cos + crossed * sin).astype(x_THQ.dtype)


def _rms_norm(x_D, scale_D, eps: float):
    x32 = x_D.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale_D).astype(x_D.dtype)


@jax.custom_vjp
def _product(x_BI, weight_IO):
    """Return x @ weight; its weight gradient has the narrower matrix on the left (`Kernels.narrow_left`)."""
    return x_BI @ weight_IO


def _product_bwd(residuals, cotangent_BO):
    x_BI, weight_IO = residuals
    if x_BI.shape[1] <= cotangent_BO.shape[1]:
        weight_gradient_IO = x_BI.T @ cotangent_BO
    else:
        # The barrier keeps the compiler from undoing the swap.
        weight_gradient_IO = jax.lax.optimization_barrier(cotangent_BO.T @ x_BI).T
    return cotangent_BO @ weight_IO.T, weight_gradient_IO


_product.defvjp(lambda x_BI, weight_IO: (_product(x_BI, weight_IO), (x_BI, weight_IO)), _product_bwd)


# Projections of one input that decoding may run as one product: name of each -> name of the product.
JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


class Block(nn.Module):
    """One decoder layer: `project` and `finish` surround attention, and `__call__` is the scanned form."""

    config: DecoderConfig
    return_stem_kv: bool = False

    def setup(self):
        c = self.config
        depth_scale = (2 * c.num_layers) ** -0.5

        def weight(name, shape, axes, fan_in, scale=1.0):
            return vector(name, shape, axes, nn.initializers.normal(scale * fan_in**-0.5))

        def vector(name, shape, axes, init=nn.initializers.ones):
            part, _, kind = name.rpartition("_")
            if self.has_variable("params", f"{JOINED.get(part)}_{kind}"):
                return None
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
        for name in {f"{whole}_{kind}" for whole in JOINED.values() for kind in ("proj", "bias")}:
            if self.has_variable("params", name):
                setattr(self, name, self.get_variable("params", name))

    def linear(self, name: str, x, num_input_axes: int = 1):
        """Multiply x by the weight `<name>_proj`, with its low-rank adapter and bias if the tree has them."""

        def product(x_BI, weight):
            """Multiply two matrices: with several token axes, gradients run at half the speed on XLA's CPU backend."""
            matrix_IO = weight.astype(x.dtype).reshape(x_BI.shape[1], -1)
            return multiply(x_BI, matrix_IO).reshape(x_BI.shape[0], *weight.shape[num_input_axes:])

        multiply = _product if kernels_of(self.config).narrow_left else jnp.matmul
        tokens, weight = x.shape[: x.ndim - num_input_axes], getattr(self, f"{name}_proj")
        x_BI = x.reshape(int(np.prod(tokens)), -1)
        y = product(x_BI, weight)
        if self.has_variable("params", f"{name}_proj_lora_a"):
            a, b = (self.get_variable("params", f"{name}_proj_lora_{part}") for part in "ab")
            y = y + jnp.tensordot(product(x_BI, a), b.astype(x.dtype), 1)
        y = y.reshape(*tokens, *y.shape[1:])
        bias = getattr(self, f"{name}_bias", None)
        return y if bias is None else y + bias.astype(y.dtype)

    def project(self, x_TD, rope):
        """Return rotated queries [..., T, H, Q], rotated keys and values [..., T, K, Q]."""
        c = self.config
        x_TD = constrain(_rms_norm(x_TD, self.attention_norm, c.norm_eps), TRUNK_AXES)
        q, k, v = self._queries_keys_values(x_TD)
        if c.qk_norm:
            q, k = _rms_norm(q, self.q_norm, c.norm_eps), _rms_norm(k, self.k_norm, c.norm_eps)
        q, k = _rotate(q, rope), _rotate(k, rope)
        return tuple(constrain(x, TRUNK_AXES, *(None,) * (x.ndim - 3), "tensor") for x in (q, k, v))

    def _queries_keys_values(self, x_TD):
        c = self.config
        if not self.has_variable("params", "qkv_proj"):
            return (self.linear(name, x_TD) for name in "qkv")
        heads = self.linear("qkv", x_TD).reshape(*x_TD.shape[:-1], -1, c.head_size)
        return jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=-2)

    def _gate_up(self, x_TD):
        if not self.has_variable("params", "gate_up_proj"):
            return self.linear("gate", x_TD), self.linear("up", x_TD)
        return jnp.split(self.linear("gate_up", x_TD), 2, axis=-1)

    def finish(self, x_TD, attended_THQ):
        """Add the output projection and the SwiGLU MLP to the residual stream."""
        x_TD = x_TD + self.linear("o", attended_THQ, 2)
        gate, up = self._gate_up(constrain(_rms_norm(x_TD, self.mlp_norm, self.config.norm_eps), TRUNK_AXES))
        return x_TD + self.linear("down", nn.silu(gate) * up)

    def __call__(self, streams, geometry: "Geometry"):
        stem_UPD, branch_URTD = streams
        q, *stem_kv = self.project(stem_UPD, geometry.stem_rope)
        stem_UPD = self.finish(stem_UPD, _stem_attention(q, *stem_kv, geometry, self.config))
        if branch_URTD is not None:
            q, *own_kv = self.project(branch_URTD, geometry.branch_rope)
            attended = branch_attention(q, stem_kv, own_kv, geometry.visibility, geometry.branch_biases, self.config)
            branch_URTD = self.finish(branch_URTD, attended)
        kept = split_by_heads(to_cache_layout(*stem_kv, kernels_of(self.config))) if self.return_stem_kv else None
        return _between_layers((stem_UPD, branch_URTD)), kept


def split_by_heads(kv):
    """Shard cached keys and values [U, ..., K, ., .] by trunk and head."""
    return tuple(constrain(x, TRUNK_AXES, *(None,) * (x.ndim - 4), "tensor") for x in kv)


def _between_layers(streams):
    """Lay out residual streams for the backward pass: splitting their width avoids storing copies."""
    return jax.tree.map(lambda x: constrain(x, TRUNK_AXES, *(None,) * (x.ndim - 2), "tensor"), streams)


def _stem_attention(q_UPHQ, k_UPKQ, v_UPKQ, geometry: "Geometry", config: DecoderConfig):
    """Attend from the trunk to itself, and from a prompt's tail to the trunk up to its cut and to itself."""
    if geometry.tail_mask_UMEE is None:
        return causal_attention(q_UPHQ, k_UPKQ, v_UPKQ, config, geometry.segments)
    U, M, E, _ = geometry.tail_mask_UMEE.shape
    L = q_UPHQ.shape[1] - M * E
    (q, q_tail), (k, k_tail), (v, v_tail) = (jnp.split(x, [L], axis=1) for x in (q_UPHQ, k_UPKQ, v_UPKQ))
    trunk_ULHQ = causal_attention(q, k, v, config)
    q_tail, k_tail, v_tail = (x.reshape(U, M, E, *x.shape[2:]) for x in (q_tail, k_tail, v_tail))
    if geometry.tail_biases is not None:
        tails_UMEHQ = fused_attention(q_tail, (k, v), (k_tail, v_tail), geometry.tail_biases, config)
    else:
        kernels = kernels_of(config)
        trunk_mask_UMEL = _trunk_mask_of_tails(geometry.cuts, L, E)
        trunk_kv, tail_kv = to_cache_layout(k, v, kernels), to_cache_layout(k_tail, v_tail, kernels)
        tails_UMEHQ = merged_attention(q_tail, trunk_kv, trunk_mask_UMEL, tail_kv, geometry.tail_mask_UMEE, kernels)
    return jnp.concatenate([trunk_ULHQ, tails_UMEHQ.reshape(U, M * E, *tails_UMEHQ.shape[3:])], axis=1)


def _trunk_mask_of_tails(cuts_UM, num_trunk: int, num_tail: int):
    """Return the trunk columns that each tail token sees, bool [U, M, E, L]."""
    mask_UM1L = (jnp.arange(num_trunk) < cuts_UM[..., None])[:, :, None]
    return jnp.broadcast_to(mask_UM1L, (*cuts_UM.shape, num_tail, num_trunk))


@record
class Geometry:
    """Positions and visibility of all tokens, the same in every layer. Fields are None without tails or branches."""

    stem_rope: Any  # (cosines, sines), each f32 [U or 1, P, Q / 2]
    segments: Any  # i32 [U, L] or None, as Sequences.trunk_segments
    cuts: Any  # i32 [U, M], trunk tokens that each prompt sees
    tail_mask_UMEE: Any  # bool [U, M, E, E], tail tokens that each tail token sees
    branch_rope: Any  # (cosines, sines), each f32 [U, R, T, Q / 2]
    visibility: Any  # attention.Visibility of the branch tokens
    tail_biases: Any  # what the fused kernel adds to scores of tails, as `branch_biases`; None: the plain path
    branch_biases: Any  # from `attention.branch_biases`; None: the plain path


def geometry_of(config: DecoderConfig, sequences: Sequences) -> Geometry:
    """Compute rotary angles and visibility of stems [U, P] and branches [U, R, T].

    Raises:
        ValueError: prompts or branches on a trunk of packed sequences.
    """
    s = sequences
    U, M, E = s.tail_tokens.shape
    L, R = s.trunk_tokens.shape[1], s.branch_tokens.shape[1]
    if s.trunk_segments is not None and (M or R):
        raise ValueError("a trunk of packed sequences cannot have prompts; use trunk_segments=None")
    positions_UP, tail_mask = trunk_positions(L, s.trunk_segments), None
    if M and E:
        tails_UP = tail_positions(s.cuts, s.tail_lengths, E).reshape(U, M * E)
        positions_UP = jnp.concatenate([jnp.broadcast_to(positions_UP, (U, L)), tails_UP], axis=1)
        columns_E = jnp.arange(E)
        is_real_UME = columns_E >= E - s.tail_lengths[..., None]
        tail_mask = (columns_E <= columns_E[:, None]) & is_real_UME[:, :, None, :]
    branch_rope = visibility = of_tails = of_branches = None
    if tail_mask is not None and flash_of(config):
        own = bias_of(tail_mask.reshape(U * M, E, E), config.activation_dtype)
        seen = jnp.pad(_trunk_mask_of_tails(s.cuts, L, E), [(0, 0), (0, 0), (0, own.shape[2] - E), (0, 0)])
        of_tails = bias_of(seen.reshape(U, -1, L), config.activation_dtype), own
    if R:
        starts_UM = s.cuts + s.tail_lengths
        branch_rope = rope_angles(config, _of_prompt(starts_UM, s.branch_prompts) + s.branch_index)
        visibility = Visibility(
            cuts=_of_prompt(s.cuts, s.branch_prompts),
            prompts=s.branch_prompts,
            first=jnp.arange(s.branch_index.shape[-1]) - s.branch_index,
            stem_layout=stem_layout(L, s.tail_lengths, E),
        )
        of_branches = branch_biases(visibility, config.activation_dtype) if flash_of(config) else None
    return Geometry(
        stem_rope=rope_angles(config, positions_UP),
        segments=s.trunk_segments,
        cuts=s.cuts,
        tail_mask_UMEE=tail_mask,
        branch_rope=branch_rope,
        visibility=visibility,
        tail_biases=of_tails,
        branch_biases=of_branches,
    )


def _of_prompt(values_UM, prompts_URT):
    """Look up the value of each token's prompt: [U, R, T]."""
    U = prompts_URT.shape[0]
    return jnp.take_along_axis(values_UM, prompts_URT.reshape(U, -1), axis=1).reshape(prompts_URT.shape)


def stem_layout(num_trunk: int, tail_lengths_UM, num_tail: int):
    """Return the prompt whose tail each stem column belongs to, i32 [U, P]; TRUNK, or PADDING before short tails."""
    U, M = tail_lengths_UM.shape
    is_real_UME = jnp.arange(num_tail) >= num_tail - tail_lengths_UM[..., None]
    tails = jnp.where(is_real_UME, jnp.arange(M)[:, None], PADDING).reshape(U, M * num_tail)
    return jnp.concatenate([jnp.full((U, num_trunk), TRUNK), tails], axis=1)


class Decoder(nn.Module):
    """Embedding, scanned blocks and final norm."""

    config: DecoderConfig
    return_stem_kv: bool = False

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
        )(c, self.return_stem_kv)

    def __call__(self, sequences: Sequences):
        s, geometry = sequences, geometry_of(self.config, sequences)
        U = s.trunk_tokens.shape[0]
        stem_UPD = self.embed(jnp.concatenate([s.trunk_tokens, s.tail_tokens.reshape(U, -1)], axis=1))
        branch_URTD = self.embed(s.branch_tokens) if s.branch_tokens.shape[1] else None
        (stem_UPD, branch_URTD), stem_kv = self.layers(_between_layers((stem_UPD, branch_URTD)), geometry)
        stem_UPD = self.normalize(stem_UPD)
        branch_URTD = None if branch_URTD is None else self.normalize(branch_URTD)
        return stem_UPD, branch_URTD, stem_kv

    def embed(self, tokens):
        # Each shard looks up its part of the width for all entries.
        embedding_VD = constrain(self.embedding.astype(self.config.activation_dtype), None, "tensor")
        return jnp.take(embedding_VD, tokens, axis=0)

    def normalize(self, x):
        return constrain(_rms_norm(x, self.final_norm, self.config.norm_eps), TRUNK_AXES)


def trunk_positions(length: int, segments_UL=None):
    """Return rotary positions i32 [1 or U, L], which restart at 0 where a segment begins."""
    columns = jnp.arange(length)[None]
    if segments_UL is None:
        return columns
    begins = jnp.pad(jnp.diff(segments_UL, axis=1) != 0, ((0, 0), (1, 0)))
    return columns - jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)


def prompt_ends(stem_UPD, sequences: Sequences):
    """Return the states that predict the first completion tokens, [U, M, D]: at the last tail token of each prompt, or
    without tails (E = 0) at the last trunk token that it sees."""
    (_, M, E), (U, P, D) = sequences.tail_tokens.shape, stem_UPD.shape
    if not E:
        return jnp.take_along_axis(stem_UPD, sequences.cuts[..., None] - 1, axis=1)
    return stem_UPD[:, P - M * E :].reshape(U, M, E, D)[:, :, -1]


def tail_positions(cuts_UM, tail_lengths_UM, num_tail: int):
    """Return rotary positions i32 [U, M, E] of right-aligned tails, which continue from the cut."""
    return (cuts_UM + tail_lengths_UM)[..., None] - num_tail + jnp.arange(num_tail)


def init_params(config: DecoderConfig, mesh: Mesh, key) -> Any:
    """Create random float32 parameters, sharded on the mesh."""
    shardings = jax.tree.map(lambda p: p.sharding, abstract_params(config, mesh))
    return jax.jit(partial(_init, config), out_shardings=shardings)(key)


def abstract_params(config: DecoderConfig, mesh: Mesh) -> Any:
    """Return shapes, dtype f32 and shardings of the parameters, without allocating them."""
    boxed = jax.eval_shape(partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        nn.unbox(boxed),
        mesh_lib.param_shardings(mesh, boxed),
    )


def _init_boxed(config: DecoderConfig, key):
    return Decoder(config).init(key, trunks_alone(jnp.zeros((1, 2), jnp.int32)))["params"]


def _init(config: DecoderConfig, key):
    return nn.unbox(_init_boxed(config, key))


def forward(config: DecoderConfig, params, sequences: Sequences):
    """Return final hidden states of stems [U, P, D] and branches [U, R, T, D] (None if R = 0)."""
    stem_UPD, branch_URTD, _ = Decoder(config).apply({"params": params}, sequences)
    return stem_UPD, branch_URTD


def logits(config: DecoderConfig, params, tokens_BT):
    """Return all logits f32 [B, T, V] of plain sequences i32 [B, T]; for small inputs and tests."""
    return next_logits(params, forward(config, params, trunks_alone(tokens_BT))[0])
