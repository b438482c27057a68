"""Attention over two sets of keys by two fused kernels, one for each set, whose results are merged.

The forward kernels return their outputs and log-sum-exps, which give the output and the log-sum-exp of the whole
softmax. Given those two, each backward kernel computes the gradients of its part of the whole softmax: it needs the
probabilities exp(scores - log-sum-exp) and the products of outputs and their gradients, nothing of the other part.

B batch entries of one kernel call · T its queries · S its keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.types import record

# Hides a key; cuDNN can subtract two of them. Source: jax, fused_attention_stablehlo.get_large_negative_number.
_HIDDEN = -(2.0**41)

# Queries and keys are padded to a multiple of this: cuDNN reads rows of the bias in 16 bytes.
_MULTIPLE = 8


@dataclass(frozen=True)
class FusedKernel:
    """One fused attention: softmax(scale q k' + bias) v with its backward pass.

    Attributes:
        forward: (q [B, T, H, Q], k and v [B, S, K, Q], bias [B, 1, T, S] or None, is_causal) -> (output [B, T, H, Q],
            its log-sum-exp f32 [B, H, T]). is_causal hides later keys.
        backward: (q, k, v, bias, is_causal, log-sum-exp, output, gradient of the output) -> gradients of q, k and v.
        supports: (dtype, head size) -> whether the kernel exists for them.
    """

    forward: Callable
    backward: Callable
    supports: Callable


@record
class Part:
    """One of the two sets of keys."""

    keys: Any  # [B, S, K, Q]
    values: Any  # [B, S, K, Q]
    bias: Any  # [B, 1, T, S], from `bias_of`, activation dtype


def bias_of(mask_BTS, dtype):
    """Return what is added to the scores, [B, 1, T', S']: 0 where the mask holds. T' and S' are T and S rounded up."""
    mask_BTS = jnp.pad(mask_BTS, [(0, 0)] + [(0, -n % _MULTIPLE) for n in mask_BTS.shape[1:]])
    return jnp.where(mask_BTS, 0.0, _HIDDEN).astype(dtype)[:, None]


def merged_flash(kernel: FusedKernel, q_URTHQ, stem: Part, own: Part):
    """Compute one softmax over a shared and an own set of keys.

    Args:
        kernel: of the platform.
        q_URTHQ: queries; each real one sees a key of at least one part.
        stem: keys that all queries of u share; B = U, T = R * T.
        own: keys of (u, r); B = U * R. Query t sees none after key t.
    Returns:
        [U, R, T, H, Q] in the queries' dtype.
    """
    T = q_URTHQ.shape[2]
    rows = own.bias.shape[2]
    q_URTHQ = jnp.pad(q_URTHQ, [(0, 0), (0, 0), (0, rows - T), (0, 0), (0, 0)])

    def padded(part: Part) -> Part:
        def pad(x):
            return jnp.pad(x, [(0, 0), (0, part.bias.shape[-1] - x.shape[1]), (0, 0), (0, 0)])

        return Part(keys=pad(part.keys), values=pad(part.values), bias=part.bias)

    return _merged(kernel, q_URTHQ, padded(stem), padded(own))[:, :, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(kernel: FusedKernel, q_URTHQ, stem: Part, own: Part):
    return _merged_fwd(kernel, q_URTHQ, stem, own)[0]


def _merged_fwd(kernel: FusedKernel, q_URTHQ, stem: Part, own: Part):
    U, R, T, H, _ = shape = q_URTHQ.shape
    outputs, sums = [], []
    for part in (stem, own):
        q = _as_queries_of(part, q_URTHQ)
        output, sums_BHT = kernel.forward(q, part.keys, part.values, part.bias, part is own)
        outputs.append(output.reshape(shape))
        sums.append(jnp.moveaxis(sums_BHT.reshape(U, -1, H, sums_BHT.shape[-1]), 2, -1).reshape(U, R, T, H))
    sums_URTH = jnp.logaddexp(*sums)
    merged = sum(o * jnp.exp(s - sums_URTH)[..., None] for o, s in zip(outputs, sums, strict=True))
    merged = merged.astype(q_URTHQ.dtype)
    return merged, (q_URTHQ, stem, own, merged, sums_URTH)


def _merged_bwd(kernel: FusedKernel, residuals, gradient_URTHQ):
    q_URTHQ, stem, own, merged_URTHQ, sums_URTH = residuals
    H = q_URTHQ.shape[3]
    total, of_parts = jnp.zeros(q_URTHQ.shape, jnp.float32), []
    for part in (stem, own):
        q, merged, gradient = (_as_queries_of(part, x) for x in (q_URTHQ, merged_URTHQ, gradient_URTHQ))
        sums_BHT = jnp.moveaxis(sums_URTH.reshape(*q.shape[:2], H), 2, 1)
        found = kernel.backward(q, part.keys, part.values, part.bias, part is own, sums_BHT, merged, gradient)
        of_q, of_k, of_v = found
        total = total + of_q.reshape(q_URTHQ.shape)
        of_parts.append(Part(keys=of_k, values=of_v, bias=jnp.zeros_like(part.bias)))
    return total.astype(q_URTHQ.dtype), *of_parts


_merged.defvjp(_merged_fwd, _merged_bwd)


def _as_queries_of(part: Part, x_URTHQ):
    """Flatten [U, R, T, H, Q] to the part's batch: [U, R * T, H, Q] or [U * R, T, H, Q]."""
    return x_URTHQ.reshape(part.bias.shape[0], -1, *x_URTHQ.shape[3:])


def causal_flash(kernel: FusedKernel, q_ULHQ, k_ULKQ, v_ULKQ, mask_ULS=None):
    """Compute causal attention, [U, L, H, Q]; mask bool [U, L, L], further limits what is seen."""
    if mask_ULS is None:
        return _causal(kernel, q_ULHQ, k_ULKQ, v_ULKQ, None)
    bias, L = bias_of(mask_ULS, q_ULHQ.dtype), q_ULHQ.shape[1]
    padded = (jnp.pad(x, [(0, 0), (0, bias.shape[-1] - L), (0, 0), (0, 0)]) for x in (q_ULHQ, k_ULKQ, v_ULKQ))
    return _causal(kernel, *padded, bias)[:, :L]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(kernel: FusedKernel, q, k, v, bias):
    return kernel.forward(q, k, v, bias, True)[0]


def _causal_fwd(kernel: FusedKernel, q, k, v, bias):
    output, sums = kernel.forward(q, k, v, bias, True)
    return output, (q, k, v, bias, sums, output)


def _causal_bwd(kernel: FusedKernel, residuals, gradient):
    q, k, v, bias, sums, output = residuals
    return *kernel.backward(q, k, v, bias, True, sums, output, gradient), None


_causal.defvjp(_causal_fwd, _causal_bwd)


# --- cuDNN --------------------------------------------------------------------------------------------------------
# jax.nn.dot_product_attention rounds the log-sum-exp to bfloat16, and wants a GPU to be there when programs are lowered
# for one. This calls the primitives below it.


def _arguments(q, k, v, bias):
    nothing = jnp.zeros(0, q.dtype)
    return q, k, v, nothing if bias is None else bias, *(nothing,) * 6


def _cudnn():
    # A private module, so only GPU programs depend on it.
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _options(q, bias, is_causal: bool) -> dict:
    cudnn = _cudnn()
    # A parameter since JAX 0.12.
    newer = {"score_mod": None} if "score_mod" in signature(cudnn._dot_product_attention_fwd).parameters else {}
    return newer | dict(
        scale=q.shape[-1] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(bias is not None, False),  # no gradient of the bias
        mask_type=cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )


def _cudnn_forward(q, k, v, bias, is_causal):
    forward = _cudnn()._dot_product_attention_fwd_p_wrapper
    return forward.bind(*_arguments(q, k, v, bias), **_options(q, bias, is_causal), is_training=True)


def _cudnn_backward(q, k, v, bias, is_causal, sums, output, gradient):
    arguments = (*_arguments(q, k, v, bias), sums, output, gradient)
    return _cudnn()._dot_product_attention_bwd_p_wrapper.bind(*arguments, **_options(q, bias, is_causal))


CUDNN = FusedKernel(
    forward=_cudnn_forward,
    backward=_cudnn_backward,
    supports=lambda dtype, head_size: jnp.dtype(dtype).itemsize == 2 and head_size % 8 == 0 and head_size <= 128,
)


# --- Emulation, in plain JAX on any platform ----------------------------------------------------------------------


def _scores(q, k, bias, is_causal):
    B, T, _, Q = q.shape
    q = q.reshape(B, T, k.shape[2], -1, Q)
    scores_BKJTS = jnp.einsum("btkjq,bskq->bkjts", q, k, preferred_element_type=jnp.float32) * Q**-0.5
    if bias is not None:
        scores_BKJTS = scores_BKJTS + bias[:, :, None]
    return jnp.where(jnp.tri(T, k.shape[1], dtype=bool), scores_BKJTS, _HIDDEN) if is_causal else scores_BKJTS


def _emulated_forward(q, k, v, bias, is_causal):
    scores_BKJTS = _scores(q, k, bias, is_causal)
    sums_BKJT = jax.nn.logsumexp(scores_BKJTS, axis=-1)
    output = jnp.einsum("bkjts,bskq->btkjq", jnp.exp(scores_BKJTS - sums_BKJT[..., None]), v)
    return output.reshape(q.shape).astype(q.dtype), sums_BKJT.reshape(q.shape[0], q.shape[2], -1)


def _emulated_backward(q, k, v, bias, is_causal, sums, output, gradient):
    B, T, _, Q = q.shape
    q5, output5, gradient5 = (x.reshape(B, T, k.shape[2], -1, Q) for x in (q, output, gradient))
    sums_BKJT = sums.reshape(B, k.shape[2], -1, T)
    probs_BKJTS = jnp.exp(_scores(q, k, bias, is_causal) - sums_BKJT[..., None])
    product_BKJT = jnp.einsum("btkjq,btkjq->bkjt", output5, gradient5)
    of_probs = jnp.einsum("btkjq,bskq->bkjts", gradient5, v)
    of_scores = probs_BKJTS * (of_probs - product_BKJT[..., None]) * Q**-0.5
    of_q = jnp.einsum("bkjts,bskq->btkjq", of_scores, k).reshape(q.shape)
    of_k = jnp.einsum("bkjts,btkjq->bskq", of_scores, q5)
    of_v = jnp.einsum("bkjts,btkjq->bskq", probs_BKJTS, gradient5)
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype)


EMULATED = FusedKernel(
    forward=_emulated_forward,
    backward=_emulated_backward,
    supports=lambda dtype, head_size: True,
)
