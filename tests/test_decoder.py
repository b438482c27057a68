"""The one graph: against a float64 definition, and trunks with branches against repeated prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P

from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.scoring import completion_logprobs
from rpt_jax.types import Sequences

VARIANTS = {
    "qwen2": dict(qkv_bias=True, qk_norm=False, tie_embeddings=True),
    "qwen3": dict(qkv_bias=False, qk_norm=True, tie_embeddings=False),
    "llama": dict(qkv_bias=False, qk_norm=False, tie_embeddings=False, rope_theta=500_000.0),
    "seven query heads, head size not width / heads": dict(num_heads=7, num_kv_heads=1, head_size=10),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_float64_definition(variant, tiny_config, mesh):
    config = dataclasses.replace(tiny_config, **variant)
    params = decoder.init_params(config, mesh, jax.random.key(1))
    # Biases and norm scales start at 0 and 1: disturb them, or a missing one would go unseen.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)
    tokens = rng.integers(0, config.vocab_size, 19)
    got = decoder.logits(config, params, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(got, oracles.decoder_logits(config, params, tokens), atol=2e-5, rtol=1e-4)


def ragged_sequences(config, seed=0, U=3, R=4, L=17, E=5, C=7):
    """Trunks with cuts anywhere, tails and completions of every length, garbage in the padding."""
    rng = np.random.default_rng(seed)
    tail_lengths = rng.integers(1, E + 1, (U, R, 1))
    completion_lengths = rng.integers(1, C + 1, (U, R, 1))
    columns = np.arange(E + C)
    mask = (columns >= E - tail_lengths) & (columns < E + completion_lengths)
    return Sequences(
        trunk_tokens=jnp.asarray(rng.integers(0, config.vocab_size, (U, L)), jnp.int32),
        cuts=jnp.asarray(rng.integers(1, L + 1, (U, R)), jnp.int32),
        branch_tokens=jnp.asarray(rng.integers(0, config.vocab_size, (U, R, E + C)), jnp.int32),
        branch_mask=jnp.asarray(mask),
    )


def repeated_prompts(sequences):
    """Every branch as a plain sequence of its own: [(tokens, number of branch tokens)]."""
    s = jax.tree.map(np.asarray, sequences)
    for u, r in np.ndindex(s.cuts.shape):
        own = s.branch_tokens[u, r][s.branch_mask[u, r]]
        yield u, r, np.concatenate([s.trunk_tokens[u, : s.cuts[u, r]], own]), len(own)


def plain_logprobs(config, params, sequences):
    """[(u, r, log-probabilities of the branch's own tokens)], from whole logits of the repeated prompts.

    All are right-padded to one length (causality hides it), so that one program serves them."""
    rows = list(repeated_prompts(sequences))
    padded = np.zeros((len(rows), 32), np.int32)
    for row, (_, _, tokens, _) in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    law = jax.nn.log_softmax(decoder.logits(config, params, jnp.asarray(padded)))
    chosen = jnp.take_along_axis(law[:, :-1], jnp.asarray(padded)[:, 1:, None], axis=-1)[..., 0]
    return [(u, r, chosen[i, len(t) - 1 - n : len(t) - 1]) for i, (u, r, t, n) in enumerate(rows)]


def test_trunk_and_branch_logprobs_equal_repeated_prompts(tiny_config, tiny_params):
    sequences, C = ragged_sequences(tiny_config), 7
    got, _, _ = completion_logprobs(tiny_config, tiny_params, sequences, C, 1.0)
    mask = np.asarray(sequences.branch_mask)
    for u, r, logprobs in plain_logprobs(tiny_config, tiny_params, sequences):
        own = np.zeros(mask.shape[-1])
        own[mask[u, r]] = logprobs
        keep = mask[u, r, -C:]
        np.testing.assert_allclose(np.asarray(got)[u, r][keep], own[-C:][keep], atol=1e-5)


def test_trunk_and_branch_gradients_equal_repeated_prompts(tiny_config, tiny_params):
    sequences, C = ragged_sequences(tiny_config), 7
    weights = np.random.default_rng(1).standard_normal((3, 4, C)).astype(np.float32)
    weights *= np.asarray(sequences.branch_mask)[..., -C:]

    def shared(params):
        return jnp.sum(weights * completion_logprobs(tiny_config, params, sequences, C, 1.0)[0])

    def repeated(params):
        total = 0.0
        mask = np.asarray(sequences.branch_mask)
        for u, r, logprobs in plain_logprobs(tiny_config, params, sequences):
            total += jnp.sum(np.pad(weights[u, r], (mask.shape[-1] - C, 0))[mask[u, r]] * logprobs)
        return total

    a, b = jax.jit(jax.grad(shared))(tiny_params), jax.jit(jax.grad(repeated))(tiny_params)
    difference = jnp.sqrt(
        sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    )
    size = jnp.sqrt(sum(jnp.sum(y**2) for y in jax.tree.leaves(b)))
    assert float(difference / size) < 1e-5


def test_padding_and_neighbours_change_nothing(tiny_config, tiny_params):
    sequences, C = ragged_sequences(tiny_config), 7
    base, _, _ = completion_logprobs(tiny_config, tiny_params, sequences, C, 1.0)
    mask = sequences.branch_mask
    garbage = jnp.where(mask, sequences.branch_tokens, (sequences.branch_tokens + 5) % tiny_config.vocab_size)
    beyond = jnp.arange(17) >= sequences.cuts.max(1, keepdims=True)
    trunk = jnp.where(beyond, 3, sequences.trunk_tokens)
    other, _, _ = completion_logprobs(
        tiny_config, tiny_params, dataclasses.replace(sequences, branch_tokens=garbage, trunk_tokens=trunk), C, 1.0
    )
    # The first completion token is predicted by a real tail token, so every real column must agree.
    keep = np.asarray(mask)[..., -C:]
    np.testing.assert_allclose(np.asarray(base)[keep], np.asarray(other)[keep], atol=1e-5)
    first = completion_logprobs(
        tiny_config, tiny_params, dataclasses.replace(
            sequences, cuts=sequences.cuts[:, :1], branch_tokens=sequences.branch_tokens[:, :1], branch_mask=mask[:, :1]
        ), C, 1.0,
    )[0]  # fmt: skip
    # Products of other shapes round differently: a few units in the last place of log-probabilities near -17.
    np.testing.assert_allclose(
        np.asarray(first)[:, 0][keep[:, 0]], np.asarray(base)[:, 0][keep[:, 0]], atol=1e-5, rtol=1e-6
    )


def test_chunked_logprobs_equal_whole_log_softmax(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 23, 8)).astype(np.float32), rng.standard_normal((50, 8)).astype(np.float32)
    targets = rng.integers(0, 50, (2, 23))
    monkeypatch.setattr(decoder, "_CHUNK_LOGITS", 2 * 50 * 5)  # 5 tokens a chunk, so 23 leave a ragged last one
    logprobs, entropy = decoder.token_logprobs.__wrapped__(head, hidden, targets, temperature=0.7)
    z = (hidden.astype(np.float64) @ head.T) / 0.7
    law = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(law, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(law) * law).sum(-1), atol=1e-5)


def test_remat_changes_no_gradient(tiny_config, tiny_params):
    sequences = ragged_sequences(tiny_config)

    def loss(params, config):
        return jnp.sum(completion_logprobs(config, params, sequences, 7, 1.0)[0])

    with_remat = jax.grad(loss)(tiny_params, tiny_config)
    without = jax.grad(loss)(tiny_params, dataclasses.replace(tiny_config, remat=False))
    for a, b in zip(jax.tree.leaves(with_remat), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_parameters_lie_on_the_mesh_as_the_table_says():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = DecoderConfig(vocab_size=64, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_size=8)
    params = decoder.init_params(config, mesh, jax.random.key(0))
    assert params["layers"]["q_proj"].sharding.spec == P(None, "fsdp", "tensor", None)
    assert params["layers"]["down_proj"].sharding.spec == P(None, "tensor", "fsdp")
    assert params["embedding"].sharding.spec == P("tensor", "fsdp")
    # Half of the width and half of the heads lie on each device.
    assert params["layers"]["q_proj"].addressable_shards[0].data.shape == (4, 16, 2, 8)
