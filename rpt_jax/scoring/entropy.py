"""Direct predictions, without a thought: entropy over the 16 most likely tokens, argmax, log-probability of the true
token. Those of the proxy model select positions; those of the policy are the baseline for thinking.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.vocabulary_head import output_head, without_unused
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.sequences import trunks_alone

NUM_TOP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """The model whose entropies select positions.

    Attributes:
        config: the model's shape.
        params: its parameters.
        mesh: that holds them.
        bos_id: id that starts every sequence, or None.
        batch_trunks: windows per batch.
        renormalize: divide the 16 probabilities by their sum first.
    """

    config: DecoderConfig
    params: Any
    mesh: Mesh
    bos_id: int | None
    batch_trunks: int
    renormalize: bool


def direct_statistics(config: DecoderConfig, params, tokens_UL, *, renormalize: bool):
    """Compute entropy, argmax and log-probability of each token's distribution given the tokens before it.

    Source: top-16 entropy, arXiv:2506.08007 §3.3. The paper does not say whether the 16 are renormalised.

    Args:
        config, params: of the model.
        tokens_UL: i32; token l is predicted from the tokens before it, so nothing predicts token 0.
        renormalize: divide the 16 probabilities by their sum first.
    Returns:
        (entropy f32 [U, L] in nats, argmax i32 [U, L], log-probability f32 [U, L] in nats); all 0 for token 0.
    """
    with on_mesh_of(params):
        return _direct_statistics(config, params, tokens_UL, renormalize=renormalize)


@partial(jax.jit, static_argnames=("config", "renormalize"))
def _direct_statistics(config: DecoderConfig, params, tokens_UL, *, renormalize: bool):
    hidden_ULD, _ = decoder.forward(config, params, trunks_alone(tokens_UL))
    head_VD = output_head(params)
    num_top = min(NUM_TOP_TOKENS, head_VD.shape[0])

    def column(inputs):
        hidden_UD, target_U = inputs
        head = head_VD.astype(hidden_UD.dtype)
        logits_UV = jnp.einsum("ud,vd->uv", hidden_UD, head, preferred_element_type=jnp.float32)
        logits_UV = without_unused(config, logits_UV)
        total_U = jax.nn.logsumexp(logits_UV, axis=-1)
        top, ids = top_k(logits_UV, num_top)
        log_p = top - total_U[:, None]
        if renormalize:
            log_p = log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits_UV, target_U[:, None], axis=-1)[:, 0] - total_U
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), ids[:, 0], chosen

    # The logits of one token position at a time: [U, L, V] is never built.
    columns = jax.lax.map(column, (jnp.swapaxes(hidden_ULD, 0, 1)[:-1], tokens_UL.T[1:]))
    return tuple(jnp.pad(c.T, ((0, 0), (1, 0))) for c in columns)


_TOP_K_BLOCK = 32


def top_k(x_UV, k: int):
    """Return the k largest values of each row and their indices. Only the k blocks with the largest maxima are
    searched: a sixth of the time at 152 thousand entries."""
    U, V = x_UV.shape
    num_blocks = -(-V // _TOP_K_BLOCK)
    padding = ((0, 0), (0, num_blocks * _TOP_K_BLOCK - V))
    blocks = jnp.pad(x_UV, padding, constant_values=-jnp.inf).reshape(U, num_blocks, _TOP_K_BLOCK)

    def top(x, k):
        # The barrier keeps both results: if only one is used, XLA sorts whole rows on a CPU.
        return jax.lax.optimization_barrier(jax.lax.top_k(x, k))

    _, chosen = top(blocks.max(-1), min(k, num_blocks))
    values, places = top(jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(U, -1), k)
    ids = jnp.take_along_axis(chosen, places // _TOP_K_BLOCK, axis=1) * _TOP_K_BLOCK + places % _TOP_K_BLOCK
    return values, ids
