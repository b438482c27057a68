"""The paths of attention to stems and lanes against one softmax per query in float64, and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.models import attention, decoder
from rpt_jax.models.attention import Visibility, branch_attention, branch_biases
from rpt_jax.models.flash import EMULATED

U, R, T, L, M, E, K, J, Q = 2, 6, 10, 13, 3, 4, 1, 7, 8
P = L + M * E


def ragged():
    """Queries, keys and values of ragged lanes: completions of other lengths and prompts, back to back."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    first, prompts = np.zeros((U, R, T), int), np.zeros((U, R, T), int)
    for lane in np.ndindex(U, R):
        begins = np.flatnonzero(rng.random(T) < 0.3)
        for begin in (0, *begins):
            first[lane][begin:], prompts[lane][begin:] = begin, rng.integers(M)
    cuts = rng.integers(1, L + 1, (U, M))
    visibility = Visibility(
        cuts=jnp.asarray(np.take_along_axis(cuts, prompts.reshape(U, -1), 1).reshape(U, R, T)),
        prompts=jnp.asarray(prompts),
        first=jnp.asarray(first),
        stem_layout=decoder.stem_layout(L, jnp.asarray(rng.integers(1, E + 1, (U, M))), E),
    )
    arrays = normal(U, R, T, K * J, Q), (normal(U, P, K, Q), normal(U, P, K, Q))
    return (*arrays, (normal(U, R, T, K, Q), normal(U, R, T, K, Q))), visibility, normal(U, R, T, K * J, Q)


def one_by_one(q, stem_kv, own_kv, visibility):
    """One softmax per query over the keys it sees, in float64."""
    q, stem_kv, own_kv = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, stem_kv, own_kv))
    cuts, prompts, first, layout = (
        np.asarray(getattr(visibility, n)) for n in ("cuts", "prompts", "first", "stem_layout")
    )
    out = np.zeros(q.shape)
    for u, r, t, h in np.ndindex(q.shape[:4]):
        of_trunk = (layout[u] == attention.TRUNK) & (np.arange(P) < cuts[u, r, t])
        seen = of_trunk | (layout[u] == prompts[u, r, t])
        keys, values = (
            np.concatenate([stem[u, seen, h // J], own[u, r, first[u, r, t] : t + 1, h // J]])
            for stem, own in zip(stem_kv, own_kv, strict=True)
        )
        weights = np.exp(keys @ q[u, r, t, h] / np.sqrt(Q))
        out[u, r, t, h] = weights @ values / weights.sum()
    return out


PATHS = {
    "whole": dict(max_scores=2**28),
    "two lanes at once": dict(max_scores=2 * T * U * K * J * (P + T)),
    "blocks of queries": dict(max_scores=3 * U * K * J * (P + T)),
    "keys the other way round": dict(keys_transposed=False),
    "two fused kernels": dict(flash=EMULATED),
}


def test_every_path_is_one_softmax_per_query(tiny_config, monkeypatch):
    """Values against float64; gradients of queries, stems and lanes against those of all scores at once."""
    arrays, visibility, cotangent = ragged()
    expected, gradients = one_by_one(*arrays, visibility), {}
    for name, change in PATHS.items():
        monkeypatch.setitem(attention.KERNELS, "cpu", dataclasses.replace(attention.KERNELS["cpu"], **change))
        config = dataclasses.replace(tiny_config, head_size=Q, activation_dtype="float32")
        biases = branch_biases(visibility, "float32") if attention.flash_of(config) else None
        out, pull = jax.vjp(lambda *a: branch_attention(*a, visibility, biases, config), *arrays)  # noqa: B023
        np.testing.assert_allclose(out, expected, atol=1e-6, err_msg=name)
        gradients[name] = pull(cotangent)
        monkeypatch.undo()
    for name, of_path in gradients.items():
        for got, want in zip(jax.tree.leaves(of_path), jax.tree.leaves(gradients["whole"]), strict=True):
            difference = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
            assert difference < 1e-6, (name, got.shape)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(1, 3000), st.integers(1, 2**22))
def test_blocks_pad_less_than_a_block(num_lanes, num_queries, per_query, limit):
    """The places that are computed stay near the tokens that there are, at every lane length and limit."""
    lanes, queries = attention._at_once(num_lanes, num_queries, per_query, limit)
    assert num_lanes % lanes == 0
    assert lanes * queries * per_query <= max(limit, per_query)
    blocks, columns = attention._query_blocks((np.zeros((1, num_queries)),), queries)
    assert columns.size - num_queries < min(queries, columns.shape[0])
    assert blocks[0].size == columns.size


@pytest.mark.parametrize("segments", [None, [[0] * 5 + [1] * 9, [0] * 14]])
def test_fused_trunks_and_tails_equal_the_plain_path(tiny_config, tiny_params, monkeypatch, segments):
    """A whole policy: packed trunks, or trunks with tails of other lengths."""
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, tiny_config.vocab_size, (2, 14)))
    sequences = decoder.trunks_alone(tokens, None if segments is None else jnp.asarray(segments))
    if segments is None:
        tails = jnp.asarray(rng.integers(0, tiny_config.vocab_size, (2, 2, 5)))
        changes = dict(
            tail_tokens=tails, cuts=jnp.asarray([[3, 14], [1, 9]]), tail_lengths=jnp.asarray([[5, 2], [1, 4]])
        )
        sequences = dataclasses.replace(sequences, **changes)

    def run(platform):
        config = dataclasses.replace(tiny_config, platform=platform)

        def loss(params):
            stems, _ = decoder.forward(config, params, sequences)
            real = jnp.ones(stems.shape[:2], bool)
            if segments is None:
                E = sequences.tail_tokens.shape[-1]
                tails = jnp.arange(E) >= E - sequences.tail_lengths[..., None]
                real = real.at[:, 14:].set(tails.reshape(2, -1))
            return jnp.sum(jnp.where(real[..., None], jnp.sin(stems), 0.0))

        return jax.jit(jax.value_and_grad(loss))(tiny_params)

    value, gradients = run("cpu")
    kernels = dataclasses.replace(attention.KERNELS["cpu"], flash=EMULATED)
    monkeypatch.setitem(attention.KERNELS, "gpu", kernels)
    fused_value, fused_gradients = run("gpu")
    np.testing.assert_allclose(fused_value, value, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(fused_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max() + 1e-3))
