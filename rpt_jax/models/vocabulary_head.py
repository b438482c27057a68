"""Distributions over the vocabulary and their losses, without ever building a [rows, tokens, vocabulary] array."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models.attention import kernels_of
from rpt_jax.parallel.mesh import TRUNK_AXES, constrain, num_shards


def output_head(params):
    """Return the head's matrix [V, D] with its low-rank adapter added; the embedding if they are tied."""
    head_VD = params["head"] if "head" in params else params["embedding"]
    if "head_lora_a" in params:
        return head_VD + (params["head_lora_a"] @ params["head_lora_b"]).T.astype(head_VD.dtype)
    return head_VD


def next_logits(params, hidden_D):
    """Return logits f32 [..., V] of hidden states after the final norm."""
    head_VD = output_head(params).astype(hidden_D.dtype)
    logits_V = jnp.einsum("...d,vd->...v", hidden_D, head_VD, preferred_element_type=jnp.float32)
    return constrain(logits_V, TRUNK_AXES, *(None,) * (logits_V.ndim - 2), "tensor")


# Finite, so that its product with a probability of 0 is 0.
_UNUSED = -1e30


def without_unused(config: DecoderConfig, logits_V):
    """Mask the logits of vocabulary entries that no id of the tokenizer has: [..., V], of probability 0 from there."""
    V = logits_V.shape[-1]
    return logits_V if config.num_ids in (0, V) else jnp.where(jnp.arange(V) < config.num_ids, logits_V, _UNUSED)


def _head_for(params, hidden_D):
    """Return the head split by vocabulary only, gathered once for all chunks."""
    return constrain(output_head(params).astype(hidden_D.dtype), "tensor")


def _chunks(config: DecoderConfig, vocab_size: int, arrays):
    """Split arrays [U, N, ...] along N for a scan whose chunks respect max_logits; return them and N."""
    U, n = jax.tree.leaves(arrays)[0].shape[:2]
    trunks = max(1, U // num_shards(*TRUNK_AXES))
    logits = trunks * vocab_size // num_shards("tensor")  # logits per device for one token of every trunk
    chunk = min(n, max(1, 64 // trunks, kernels_of(config).max_logits // logits))
    num_chunks = -(-n // chunk)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk - n)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(U, num_chunks, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays), n


def _joined(chunks, n: int):
    """Invert `_chunks` for its results."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :n], chunks)


def _chunk_logprobs(config: DecoderConfig, head_VD, hidden_UnD, targets_Un, sharpness):
    """Return (log-probability of the targets [U, n], entropy [U, n], distribution [U, n, V]).

    sharpness: 1 / temperature, a scalar or f32 [U, n, 1].
    """
    logits_UnV = jnp.einsum("und,vd->unv", hidden_UnD, head_VD, preferred_element_type=jnp.float32) * sharpness
    logits_UnV = without_unused(config, constrain(logits_UnV, TRUNK_AXES, None, "tensor"))
    logits_UnV = logits_UnV - logits_UnV.max(-1, keepdims=True)
    weights_UnV = jnp.exp(logits_UnV)
    total_Un1 = weights_UnV.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits_UnV, targets_Un[..., None], axis=-1)
    logprobs = (chosen - jnp.log(total_Un1))[..., 0]
    entropy = (jnp.log(total_Un1) - jnp.sum(weights_UnV * logits_UnV, axis=-1, keepdims=True) / total_Un1)[..., 0]
    return logprobs, entropy, weights_UnV / total_Un1


@partial(jax.jit, static_argnames=("config", "temperature"))
def token_logprobs(config: DecoderConfig, params, hidden_UND, targets_UN, *, temperature: float):
    """Score each target under softmax(logits / temperature): its log-probability and the entropy.

    Args:
        hidden_UND: hidden states after the final norm, for any token dimension N.
        targets_UN: i32.
        temperature: > 0.
    Returns:
        (logprobs f32 [U, N], entropy f32 [U, N]), nats.
    """
    head_VD = _head_for(params, hidden_UND)
    chunks, n = _chunks(config, head_VD.shape[0], (hidden_UND, targets_UN))
    return _joined(jax.lax.map(lambda x: _chunk_logprobs(config, head_VD, *x, 1 / temperature)[:2], chunks), n)


def token_loss(config: DecoderConfig, term_fn, params, hidden_UND, targets_UN, inputs, *, temperature):
    """Sum a per-token loss that is a function of the token's log-probability; the gradient is computed in chunks.

    The logits of a chunk serve its loss and its gradient and are freed before the next chunk. There is no second
    product with the head and no [rows, tokens, vocabulary] array.

    Args:
        term_fn: (logprobs [U, n], inputs [U, n]) -> terms f32 [U, n], elementwise.
        params: the decoder's.
        hidden_UND, targets_UN: as in `token_logprobs`.
        inputs: tree of arrays [U, N], constants of the loss.
        temperature: of the distribution, a scalar or f32 [U, N]; > 0.
    Returns:
        (scalar loss, (logprobs f32 [U, N], entropy f32 [U, N])); the last two carry no gradient.
    """
    head_VD = _head_for(params, hidden_UND)
    sharpness_UN = jnp.broadcast_to(1 / jnp.asarray(temperature, jnp.float32), targets_UN.shape)
    return _token_loss(config, term_fn, head_VD, hidden_UND, targets_UN, inputs, sharpness_UN)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_loss(config, term_fn, head_VD, hidden_UND, targets_UN, inputs, sharpness_UN):
    chunks, n = _chunks(config, head_VD.shape[0], (hidden_UND, targets_UN, inputs, sharpness_UN))

    def one(chunk):
        hidden, targets, inputs, sharpness_Un = chunk
        logprobs, entropy, _ = _chunk_logprobs(config, head_VD, hidden, targets, sharpness_Un[..., None])
        return term_fn(logprobs, inputs).sum(), logprobs, entropy

    losses, *rest = jax.lax.map(one, chunks)
    return losses.sum(), _joined(tuple(rest), n)


def _token_loss_fwd(config, term_fn, head_VD, hidden_UND, targets_UN, inputs, sharpness_UN):
    chunks, n = _chunks(config, head_VD.shape[0], (hidden_UND, targets_UN, inputs, sharpness_UN))
    # Each shard of the trunks accumulates its own gradient: one reduction at the end, not one per chunk.
    shards = math.gcd(hidden_UND.shape[0], num_shards(*TRUNK_AXES))

    def by_shard(x_Und):
        return x_Und.reshape(shards, -1, x_Und.shape[-1])

    narrow_left = kernels_of(config).narrow_left

    def head_gradient_of(gradient_SnV, hidden_SnD):
        """Return [S, D, V] if the narrower matrix goes on the left, else [S, V, D]."""
        if narrow_left:
            return jnp.einsum("snd,snv->sdv", hidden_SnD, gradient_SnV, preferred_element_type=jnp.float32)
        return jnp.einsum("snv,snd->svd", gradient_SnV, hidden_SnD, preferred_element_type=jnp.float32)

    def laid_out(head_gradient):
        return constrain(head_gradient, TRUNK_AXES, *((None, "tensor") if narrow_left else ("tensor",)))

    def one(head_gradient, chunk):
        hidden, targets, inputs, sharpness_Un = chunk
        logprobs, entropy, probs_UnV = _chunk_logprobs(config, head_VD, hidden, targets, sharpness_Un[..., None])
        terms, pull = jax.vjp(lambda x: term_fn(x, inputs), logprobs)
        (slope_Un,) = pull(jnp.ones_like(terms))
        is_target = jnp.arange(probs_UnV.shape[-1]) == targets[..., None]
        gradient_UnV = (slope_Un * sharpness_Un)[..., None] * (is_target - probs_UnV)
        gradient_UnV = gradient_UnV.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("unv,vd->und", gradient_UnV, head_VD, preferred_element_type=jnp.float32)
        head_gradient = laid_out(head_gradient + head_gradient_of(by_shard(gradient_UnV), by_shard(hidden)))
        return head_gradient, (terms.sum(), logprobs, entropy, hidden_gradient.astype(hidden.dtype))

    shape = head_VD.shape[::-1] if narrow_left else head_VD.shape
    zero = laid_out(jnp.zeros((shards, *shape), jnp.float32))
    head_gradient, (losses, *rest, hidden_gradient) = jax.lax.scan(one, zero, chunks)
    primal = losses.sum(), _joined(tuple(rest), n)
    head_gradient = head_gradient.sum(0)
    head_gradient_VD = head_gradient.T if narrow_left else head_gradient
    return primal, (head_gradient_VD.astype(head_VD.dtype), _joined(hidden_gradient, n))


def _token_loss_bwd(config, term_fn, gradients, cotangent):
    scale, _ = cotangent
    return *(jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)), None, None, None


_token_loss.defvjp(_token_loss_fwd, _token_loss_bwd)
