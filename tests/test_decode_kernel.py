"""The decode kernels, emulated, against one softmax per row in float64, and whole rollouts against the plain path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import EOS, SHORT, count_calls, make_tasks

from rpt_jax.config import MeshConfig
from rpt_jax.models import attention, decode_kernel, decoder
from rpt_jax.models.decode_kernel import Spans, decode_attention
from rpt_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.sequences import continued, trunks_alone


@pytest.fixture
def emulated(tiny_config, monkeypatch):
    """The tiny policy on an imaginary GPU whose kernels are emulated."""
    kernels = dataclasses.replace(attention.KERNELS["gpu"], flash=None, fused_decoding="emulated")
    monkeypatch.setitem(attention.KERNELS, "gpu", kernels)
    return dataclasses.replace(tiny_config, platform="gpu")


@pytest.mark.parametrize(
    "U, S, K, J, columns, column",
    [(2, 5, 2, 3, 128, 70), (1, 3, 1, 7, 64, 0), (1, 20, 2, 1, 128, 127)],
    ids=["split stems", "one tile, seven queries a key", "end of the ring"],
)
def test_one_step_is_one_softmax_per_row(U, S, K, J, columns, column):
    rng, Q, P, L = np.random.default_rng(0), 16, 192, 120

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    first = rng.integers(L, P - 9, (U, S))
    spans = Spans(cut=rng.integers(1, L + 1, (U, S)), first=first, last=first + rng.integers(1, 9, (U, S)))
    spans = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), spans)
    # Nothing yet, one token, and a full ring among them.
    lengths = rng.integers(0, columns, (U, S))
    lengths[0, :3] = 0, 1, columns - 1
    q, k, v = normal(U, S, K * J, Q), normal(U, S, K, Q), normal(U, S, K, Q)
    stem, cache = (tuple(normal(*shape) for _ in "kv") for shape in ((U, K, P, Q), (U, S, K, columns, Q)))
    got, (new_k, new_v) = decode_attention(
        q, k, v, stem, spans, cache, jnp.int32(column), jnp.asarray(lengths, jnp.int32), interpret=True
    )
    expected = np.zeros(q.shape)
    for u, s, h in np.ndindex(U, S, K * J):
        p, kv = np.arange(P), h // J
        seen = (p < spans.cut[u, s]) | ((p >= spans.first[u, s]) & (p < spans.last[u, s]))
        ages = (column - np.arange(1, lengths[u, s] + 1)) % columns
        keys, values = (
            np.concatenate([of_stem[u, kv, seen], own[u, s, kv, ages], new[u, s, kv][None]]).astype(np.float64)
            for of_stem, own, new in zip(stem, cache, (k, v), strict=True)
        )
        weights = np.exp(keys @ np.asarray(q[u, s, h], np.float64) / np.sqrt(Q))
        expected[u, s, h] = weights @ values / weights.sum()
    np.testing.assert_allclose(got, expected, atol=2e-6)
    for old, new, token in ((cache[0], new_k, k), (cache[1], new_v, v)):
        np.testing.assert_array_equal(new, old.at[:, :, :, column].set(token))


def test_kernels_support_what_tensor_cores_do():
    assert decode_kernel.supports("bfloat16", 128, 6)
    assert not decode_kernel.supports("float32", 128, 6)
    assert not decode_kernel.supports("bfloat16", 96, 6)
    assert not decode_kernel.supports("bfloat16", 64, 17)


def sampled(config, params, prompts, **options):
    options = dict(top_p=1.0, top_k=0, stop_ids=(EOS,), schedule=SCHEDULES["few"]) | SHORT | options
    return jax.tree.map(np.asarray, generate(config, params, prompts, rollout_key(0, 1), **options))


def assert_same(found, expected):
    for name in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5)


def test_rollouts_equal_those_of_the_plain_path(tiny_config, tiny_params, emulated, monkeypatch):
    """Rows that wait for slots, wrap around the ring, move into fewer slots, and continue after given tokens."""
    prompts = make_tasks(tiny_config, U=4, M=2, G=6).prompts
    plain = sampled(tiny_config, tiny_params, prompts)
    counts = count_calls(monkeypatch, "widen", "regroup")
    assert_same(sampled(emulated, tiny_params, prompts), plain)
    assert counts == {"widen": 0, "regroup": 1}
    long = dict(slots_per_trunk=2, max_completion_tokens=40)  # six rows in turn: about 100 steps in 64 columns
    assert_same(sampled(emulated, tiny_params, prompts, **long), sampled(tiny_config, tiny_params, prompts, **long))
    given = continued(prompts, plain, np.random.default_rng(0).integers(0, 9, prompts.row_ids.shape))
    assert_same(sampled(emulated, tiny_params, given), plain)


def test_a_mesh_splits_the_kernels_by_trunk_and_head(emulated):
    config = dataclasses.replace(emulated, vocab_size=64)
    single, many = make_mesh(MeshConfig()), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.init_params(config, single, jax.random.key(2))
    prompts = make_tasks(config, U=4).prompts
    abstract = jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), trunks_alone(np.zeros((1, 2), np.int32)))
    sharded = jax.device_put(params, param_shardings(many, abstract)["params"])
    a = sampled(config, params, shard_batch(single, prompts))
    b = sampled(config, sharded, shard_batch(many, prompts))
    same = (a.tokens == b.tokens).all(-1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(a.sampler_logprobs[same], b.sampler_logprobs[same], atol=1e-5)
