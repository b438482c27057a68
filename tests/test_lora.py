"""Low-rank adapters: against merged weights and autodiff, frozen weights untouched, on a mesh, in PEFT's layout."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rpt_jax.config import LoraConfig, MeshConfig, OptimizerConfig
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder, lora
from rpt_jax.models.families import LAYER_TENSORS
from rpt_jax.models.hf import save_hf
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.update import update

ALL = LoraConfig(
    rank=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head")
)


def disturbed(adapters, seed=0):
    """b is zero at first: give it values, or nothing would be seen."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), adapters)


@pytest.fixture(scope="module")
def adapted(tiny_config, tiny_params, mesh):
    frozen = lora.Frozen(params=tiny_params, scale=np.float32(2.0))
    return frozen, lora.init_adapters(tiny_config, ALL, mesh, jax.random.key(3))


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 9)), jnp.int32)


def test_new_adapters_change_nothing(tiny_config, tiny_params, adapted):
    frozen, adapters = adapted
    np.testing.assert_allclose(
        decoder.logits(tiny_config, lora.join(frozen, adapters), TOKENS),
        decoder.logits(tiny_config, tiny_params, TOKENS),
        atol=1e-5,
    )
    a = np.asarray(adapters["layers"]["q_proj_lora_a"])
    assert a.shape == (3, 32, 3) and 0.9 * 32**-0.5 < abs(a).max() <= 32**-0.5
    assert adapters["layers"]["o_proj_lora_a"].shape == (3, 4, 8, 3)
    assert adapters["head_lora_b"].shape == (3, 61)


@pytest.mark.parametrize("target", ALL.targets)
def test_joined_equals_weights_with_the_product_added(tiny_config, tiny_params, mesh, target):
    """W + alpha / rank * a b, written out for one weight at a time; and what merge returns."""
    one = dataclasses.replace(ALL, targets=(target,))
    adapters = disturbed(lora.init_adapters(tiny_config, one, mesh, jax.random.key(3)))
    frozen = lora.Frozen(params=tiny_params, scale=np.float32(one.alpha / one.rank))
    expected = jax.tree.map(np.array, tiny_params)
    if target == "head":
        expected["head"] += 2.0 * (np.asarray(adapters["head_lora_a"]) @ np.asarray(adapters["head_lora_b"])).T
    else:
        for n in range(tiny_config.num_layers):
            a, b = (np.asarray(adapters["layers"][f"{target}_lora_{x}"][n]) for x in "ab")
            weight = expected["layers"][target]
            weight[n] += 2.0 * (a.reshape(-1, 3) @ b.reshape(3, -1)).reshape(weight[n].shape)
    logits = decoder.logits(tiny_config, expected, TOKENS)
    np.testing.assert_allclose(
        decoder.logits(tiny_config, lora.join(frozen, adapters), TOKENS), logits, atol=2e-4, rtol=1e-4
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), lora.merge(frozen, adapters), expected)
    assert not np.allclose(logits, decoder.logits(tiny_config, tiny_params, TOKENS), atol=1e-2)


def test_merging_keeps_what_bfloat16_cannot_hold(tiny_params, adapted):
    """Changes of a ten-thousandth stand in float32 after merging; rounded to the weights' own type they would not."""
    frozen, adapters = adapted
    small = jax.tree.map(lambda x: x * 1e-2, disturbed(adapters))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    merged = lora.merge(dataclasses.replace(frozen, params=base), small)
    for name in ("q_proj", "down_proj"):
        a, b = (np.asarray(small["layers"][f"{name}_lora_{x}"], np.float64) for x in "ab")
        weight = np.asarray(base["layers"][name], np.float64)
        delta = 2.0 * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b)])
        np.testing.assert_allclose(np.asarray(merged["layers"][name]) - weight, delta, atol=1e-7)
        rounded = np.asarray(jnp.asarray(weight + delta).astype(jnp.bfloat16), np.float64) - weight
        assert np.abs(rounded - delta).mean() > 0.5 * np.abs(delta).mean()


def test_an_export_names_a_type_that_holds_every_weight(tmp_path, tiny_config, tiny_params, adapted):
    frozen, adapters = adapted
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    config = dataclasses.replace(tiny_config, family="qwen2", qk_norm=False)
    if "q_norm" in base["layers"]:
        base["layers"] = {k: v for k, v in base["layers"].items() if k not in ("q_norm", "k_norm")}
    save_hf(tmp_path / "plain", config, base)
    save_hf(tmp_path / "merged", config, lora.merge(dataclasses.replace(frozen, params=base), adapters))
    for name, kind in (("plain", "bfloat16"), ("merged", "float32")):
        described = json.loads((tmp_path / name / "config.json").read_text())
        assert described.get("dtype", described.get("torch_dtype")) == kind


def log_likelihood(config, params, tokens):
    logprobs = jax.nn.log_softmax(decoder.logits(config, params, tokens))
    return -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)), {}


def test_updates_train_adapters_only_and_learn(tiny_config, tiny_params, mesh, adapted):
    frozen, adapters = adapted
    before = jax.tree.map(np.array, frozen.params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, max_grad_norm=0.0), 20)
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, mesh)
    assert len(jax.tree.leaves(state.opt_state[1][0].mu)) == 16
    loss_fn, losses = partial(log_likelihood, tiny_config), []
    for _ in range(20):
        state, metrics = update(state, [TOKENS], loss_fn=loss_fn, optimizer=optimizer, frozen=frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen.params, before)
    # The adapter switched off is the very model that training began with.
    np.testing.assert_array_equal(
        decoder.logits(tiny_config, frozen.params, TOKENS), decoder.logits(tiny_config, tiny_params, TOKENS)
    )


def test_gradients_equal_those_through_merged_weights(tiny_config, adapted):
    frozen, adapters = adapted
    adapters = disturbed(adapters)
    joined = jax.grad(lambda a: log_likelihood(tiny_config, lora.join(frozen, a), TOKENS)[0])(adapters)
    merged = jax.grad(lambda a: log_likelihood(tiny_config, lora.merge(frozen, a), TOKENS)[0])(adapters)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), joined, merged)


def test_adapters_lie_on_the_mesh_like_their_weights(tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=62)
    adapters = lora.init_adapters(config, ALL, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), jax.random.key(0))
    leaves = adapters["layers"] | {name: leaf for name, leaf in adapters.items() if name != "layers"}
    shards = {name: leaf.addressable_shards[0].data.shape for name, leaf in leaves.items()}
    assert shards["q_proj_lora_a"] == (3, 16, 3) and shards["q_proj_lora_b"] == (3, 3, 2, 8)
    assert shards["o_proj_lora_a"] == (3, 2, 8, 3) and shards["o_proj_lora_b"] == (3, 3, 16)
    assert shards["head_lora_a"] == (16, 3) and shards["head_lora_b"] == (3, 31)


def test_adapters_are_written_in_the_layout_of_peft(tmp_path, adapted):
    _, adapters = adapted
    adapters = disturbed(adapters)
    lora.save_adapters(tmp_path, ALL, adapters, base="some/model")
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["r"] == 3 and described["lora_alpha"] == 6.0 and "lm_head" in described["target_modules"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * (7 * 3 + 1)
    prefix = "base_model.model.model.layers.1." + LAYER_TENSORS["o_proj"].removesuffix(".weight")
    a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
    assert a.shape == (3, 32) and b.shape == (32, 3)
    # PEFT's B A is [out, in]: the transpose of ours.
    ours = np.einsum("hqr,rd->hqd", adapters["layers"]["o_proj_lora_a"][1], adapters["layers"]["o_proj_lora_b"][1])
    np.testing.assert_allclose((b @ a).T, ours.reshape(32, 32), atol=1e-6)


def test_impossible_adapters_are_refused(tiny_config):
    with pytest.raises(ConfigError, match="tied to the embedding"):
        lora.check_targets(dataclasses.replace(tiny_config, tie_embeddings=True), ALL)
    with pytest.raises(ConfigError, match="lora.targets is empty"):
        lora.check_targets(tiny_config, LoraConfig(rank=1, targets=()))
