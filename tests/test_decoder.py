"""The one graph: against a float64 definition, and trunks with branches against repeated prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P

from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.models import attention, decoder
from rpt_jax.models.vocabulary_head import token_logprobs, token_loss
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.scoring.logprobs import predicting_states, score
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


E, C = 5, 7


def ragged_sequences(config, seed=0, U=3, M=4, R=6, L=17):
    """Trunks with cuts anywhere, tails and completions of every length, lanes of one or two completions, and garbage in
    the padding; and the completions as [(u, prompt, lane, first column, length)]."""
    rng = np.random.default_rng(seed)
    T = 2 * C
    mask, prompts, index = np.zeros((U, R, T), bool), np.zeros((U, R, T), np.int32), np.zeros((U, R, T), np.int32)
    completions = []
    for u, r in np.ndindex(U, R):
        column = 0
        for length in rng.integers(1, C + 1, rng.integers(1, 3)):
            place, m = np.s_[u, r, column : column + length], rng.integers(M)
            mask[place], prompts[place], index[place] = True, m, np.arange(length)
            completions.append((u, m, r, column, length))
            column += length
    return Sequences(
        trunk_tokens=jnp.asarray(rng.integers(0, config.vocab_size, (U, L)), jnp.int32),
        cuts=jnp.asarray(rng.integers(1, L + 1, (U, M)), jnp.int32),
        tail_tokens=jnp.asarray(rng.integers(0, config.vocab_size, (U, M, E)), jnp.int32),
        tail_lengths=jnp.asarray(rng.integers(1, E + 1, (U, M)), jnp.int32),
        branch_tokens=jnp.asarray(rng.integers(0, config.vocab_size, (U, R, T)), jnp.int32),
        branch_mask=jnp.asarray(mask),
        branch_prompts=jnp.asarray(prompts),
        branch_index=jnp.asarray(index),
    ), completions


def plain_logprobs(config, params, sequences, completions):
    """f32 [U, R, T] log-probabilities of completion tokens, from whole logits of the repeated prompts; 0 elsewhere.

    All are right-padded to one length (causality hides it), so that one program serves them."""
    s = jax.tree.map(np.asarray, sequences)
    padded = np.zeros((len(completions), 32), np.int32)
    starts = []
    for row, (u, m, r, column, length) in zip(padded, completions, strict=True):
        tail = s.tail_tokens[u, m, E - s.tail_lengths[u, m] :]
        own = s.branch_tokens[u, r, column : column + length]
        tokens = np.concatenate([s.trunk_tokens[u, : s.cuts[u, m]], tail, own])
        row[: len(tokens)] = tokens
        starts.append(len(tokens) - length)
    logprobs = jax.nn.log_softmax(decoder.logits(config, params, jnp.asarray(padded)))
    chosen = jnp.take_along_axis(logprobs[:, :-1], jnp.asarray(padded)[:, 1:, None], axis=-1)[..., 0]
    result = jnp.zeros(s.branch_mask.shape)
    for i, (u, _, r, column, length) in enumerate(completions):
        result = result.at[u, r, column : column + length].set(chosen[i, starts[i] - 1 : starts[i] - 1 + length])
    return result


def test_trunk_and_branch_logprobs_equal_repeated_prompts(tiny_config, tiny_params):
    sequences, completions = ragged_sequences(tiny_config)
    got = np.asarray(score(tiny_config, tiny_params, sequences, temperature=1.0))
    one_by_one = score(tiny_config, tiny_params, sequences, temperature=1.0, trunks_at_once=1)
    np.testing.assert_allclose(one_by_one, got, atol=1e-5)
    expected = np.asarray(plain_logprobs(tiny_config, tiny_params, sequences, completions))
    keep = np.asarray(sequences.branch_mask)
    assert keep.sum() > 80
    np.testing.assert_allclose(got[keep], expected[keep], atol=1e-5, rtol=1e-6)


def relative_difference(a, b):
    difference = sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return float(jnp.sqrt(difference / sum(jnp.sum(y**2) for y in jax.tree.leaves(b))))


def logprob_gradient(config, params, sequences, weights, temperature=1.0):
    """Gradient of a weighted sum of log-probabilities, through the loss that training uses."""

    def loss(params):
        hidden, _ = predicting_states(config, params, sequences)
        U, R, T, D = hidden.shape
        return token_loss(
            config, lambda logprobs, w: w * logprobs, params, hidden.reshape(U, R * T, D),
            sequences.branch_tokens.reshape(U, R * T), weights.reshape(U, R * T), temperature=temperature,
        )[0]  # fmt: skip

    return jax.jit(jax.grad(loss))(params)


def random_weights(sequences):
    weights = np.random.default_rng(1).standard_normal(sequences.branch_mask.shape).astype(np.float32)
    return jnp.asarray(weights * np.asarray(sequences.branch_mask))


def test_trunk_and_branch_gradients_equal_repeated_prompts(tiny_config, tiny_params):
    sequences, completions = ragged_sequences(tiny_config)
    weights = random_weights(sequences)

    def repeated(params):
        return jnp.sum(weights * plain_logprobs(tiny_config, params, sequences, completions))

    got = logprob_gradient(tiny_config, tiny_params, sequences, weights)
    assert relative_difference(got, jax.jit(jax.grad(repeated))(tiny_params)) < 1e-5


def test_attention_block_by_block_changes_nothing(tiny_config, tiny_params, monkeypatch):
    """Scores of a whole batch at once, of a few queries of a lane or a trunk, and keys kept the other way round."""
    sequences, _ = ragged_sequences(tiny_config)
    weights = random_weights(sequences)
    whole = logprob_gradient(tiny_config, tiny_params, sequences, weights)
    columns = 17 + 4 * E + 2 * C
    few = dataclasses.replace(attention.KERNELS["cpu"], max_scores=3 * 4 * columns * 4, keys_transposed=False)
    monkeypatch.setitem(attention.KERNELS, "cpu", few)
    other = dataclasses.replace(tiny_config, platform="cpu")  # another static argument: traced again
    blocks = logprob_gradient(other, tiny_params, sequences, weights)
    assert relative_difference(blocks, whole) < 1e-5


def test_padding_and_neighbours_change_nothing(tiny_config, tiny_params):
    sequences, _ = ragged_sequences(tiny_config)
    base = np.asarray(score(tiny_config, tiny_params, sequences, temperature=1.0))
    mask, s = sequences.branch_mask, sequences
    wrong = dataclasses.replace(
        s,
        branch_tokens=jnp.where(mask, s.branch_tokens, (s.branch_tokens + 5) % tiny_config.vocab_size),
        trunk_tokens=jnp.where(jnp.arange(17) >= s.cuts.max(1, keepdims=True), 3, s.trunk_tokens),
        tail_tokens=jnp.where(jnp.arange(E) >= E - s.tail_lengths[..., None], s.tail_tokens, 4),
    )
    other = np.asarray(score(tiny_config, tiny_params, wrong, temperature=1.0))
    keep = np.asarray(mask)
    np.testing.assert_allclose(base[keep], other[keep], atol=1e-5)
    fields = ("branch_tokens", "branch_mask", "branch_prompts", "branch_index")
    alone = dataclasses.replace(s, **{name: getattr(s, name)[:, :1] for name in fields})
    first = np.asarray(score(tiny_config, tiny_params, alone, temperature=1.0))[:, 0]
    # Products of other shapes round differently: a few units in the last place of log-probabilities near -17.
    np.testing.assert_allclose(first[keep[:, 0]], base[:, 0][keep[:, 0]], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("num_ids", [50, 41], ids=["every entry is an id", "unused entries"])
def test_chunked_logprobs_and_their_gradients_equal_the_whole(tiny_config, monkeypatch, num_ids):
    """Log-probabilities and entropy against float64, gradients against autodiff through the whole log-softmax.

    The distribution is over the tokenizer's ids: that of a head without the unused rows, which get no gradient.
    """
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 23, 8)).astype(np.float32)
    params = {"head": rng.standard_normal((50, 8)).astype(np.float32)}
    targets, weights = rng.integers(0, num_ids, (2, 23)), rng.standard_normal((2, 23)).astype(np.float32)
    # 5 tokens a chunk, so 23 leave a ragged last one.
    small = dataclasses.replace(attention.KERNELS["cpu"], max_logits=2 * 50 * 5)
    monkeypatch.setitem(attention.KERNELS, "cpu", small)
    config = dataclasses.replace(tiny_config, vocab_size=50, num_ids=num_ids, platform="cpu")
    logprobs, entropy = token_logprobs(config, params, hidden, targets, temperature=0.7)
    z = (hidden.astype(np.float64) @ params["head"][:num_ids].T) / 0.7
    expected = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-5)

    def term(logprobs, inputs):
        return inputs["w"] * jnp.exp(0.1 * logprobs)

    def chunked(params, hidden):
        loss, aux = token_loss(config, term, params, hidden, targets, {"w": weights}, temperature=0.7)
        return 3.0 * loss, aux

    def whole(params, hidden):
        logprobs = jax.nn.log_softmax(hidden @ params["head"][:num_ids].T / 0.7)
        return 3.0 * jnp.sum(term(jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], {"w": weights}))

    (value, aux), gradients = jax.value_and_grad(chunked, (0, 1), has_aux=True)(params, jnp.asarray(hidden))
    expected, slopes = jax.value_and_grad(whole, (0, 1))(params, jnp.asarray(hidden))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux[0], logprobs, atol=1e-6)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(chunked(params, hidden)[0], expected, rtol=1e-5)  # without a gradient


def test_remat_changes_no_gradient(tiny_config, tiny_params):
    sequences, _ = ragged_sequences(tiny_config)
    weights = random_weights(sequences)
    with_remat = logprob_gradient(tiny_config, tiny_params, sequences, weights)
    without = logprob_gradient(dataclasses.replace(tiny_config, remat=False), tiny_params, sequences, weights)
    assert relative_difference(with_remat, without) < 1e-5


def test_parameters_lie_on_the_mesh_as_the_table_says():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = DecoderConfig(vocab_size=64, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_size=8)
    params = decoder.init_params(config, mesh, jax.random.key(0))
    assert params["layers"]["q_proj"].sharding.spec == P(None, "fsdp", "tensor")
    assert params["layers"]["down_proj"].sharding.spec == P(None, "tensor", "fsdp")
    assert params["embedding"].sharding.spec == P("tensor", "fsdp")
    # Half of the width and half of the heads lie on each device.
    assert params["layers"]["q_proj"].addressable_shards[0].data.shape == (4, 16, 2, 8)
