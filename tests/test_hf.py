"""Hugging Face directories in and out: against PyTorch's logits, byte for byte, on a mesh, and when damaged."""

import importlib.util
import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch_parity
from safetensors.numpy import load_file, save_file

from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.data import positions
from rpt_jax.errors import CheckpointError
from rpt_jax.models import decoder
from rpt_jax.models.hf import load_hf, save_hf
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.scoring.requests import Request, Scorer
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.types import Rollouts

CASES = list(torch_parity.CASES)
AFTER_THOUGHT_WHOLE = Request(name="after_thought", stub="\\boxed{")
PLAIN = "qwen3, head size not width / heads"


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pytorch(case, tmp_path):
    torch_parity.write_checkpoint(tmp_path, case, num_files=1 + CASES.index(case) % 3)
    config, params = load_hf(tmp_path)
    got = np.asarray(decoder.logits(config, params, jnp.asarray(torch_parity.token_ids())))
    expected = [np.load(torch_parity.GOLDEN)[case]]
    if importlib.util.find_spec("torch"):
        expected.append(torch_parity.torch_logits(tmp_path))
    for logits in expected:
        np.testing.assert_allclose(got, logits, atol=1e-4, rtol=0)
        assert (got.argmax(-1) == logits.argmax(-1)).all()


@pytest.mark.parametrize("case", ["qwen2, seven heads on one, tied", "llama 3, scaled rope"])
def test_scores_of_references_equal_pytorch(case, tmp_path):
    """Trunk, tail, thought, stub and reference of each row are one sequence for PyTorch, with its own copy of each."""
    torch_parity.write_checkpoint(tmp_path, case)
    config, params = load_hf(tmp_path)
    ids = torch_parity.token_ids()
    cut, tail, thought, stub, reference = 30, 33, 50, 56, 60  # ends of the parts
    tasks = [[Task(id=u, cut=cut, tokens=ids[u, stub:reference])] for u in range(2)]
    trunks = list(zip(ids[:, :cut].astype(np.int32), tasks, strict=True))
    batch = build_tasks(trunks, tail=[0] * 3, row_ids=np.zeros((2, 1, 1)), trunk_length=cut, num_tokens=4)
    batch = replace(batch, prompts=replace(batch.prompts, tail_tokens=ids[:, None, cut:tail].astype(np.int32)))
    rollouts = Rollouts(
        tokens=jnp.asarray(ids[:, None, tail:thought], jnp.int32), mask=jnp.ones((2, 1, thought - tail), bool),
        sampler_logprobs=None, truncated=jnp.zeros((2, 1), bool), num_rejected=None,
    )  # fmt: skip
    # The thought ends with its last token; the stub differs between the two sequences, so each has a scorer.
    predictions = SimpleNamespace(think_end_tokens=jnp.full((2, 1), thought - tail))
    expected = jax.nn.log_softmax(np.load(torch_parity.GOLDEN)[case])
    for u in range(2):
        own = ids[u, thought:stub].tolist()
        tokenizer = SimpleNamespace(
            encode_continuation=lambda text, own=own: own, bos_id=None, vocab_size=67, token_bytes=lambda i: b"x"
        )
        scores = Scorer(config, tokenizer, 0).score(AFTER_THOUGHT_WHOLE, params, batch, rollouts, predictions)
        wanted = expected[u, np.arange(stub, reference) - 1, ids[u, stub:reference]]
        np.testing.assert_allclose(np.asarray(scores.values)[u, 0], wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_export_returns_every_tensor_byte_for_byte(case, dtype, tmp_path):
    tensors = torch_parity.write_checkpoint(tmp_path / "in", case, dtype=dtype)
    save_hf(tmp_path / "out", *load_hf(tmp_path / "in"), max_shard_bytes=10_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    written = {}
    for file in files:
        # Read with the format's own definition: the library's NumPy reader does not know bfloat16.
        raw = file.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                written[name] = (entry["shape"], raw[8 + size + begin : 8 + size + end])
                assert index[name] == file.name
    assert written == {name: (list(t.shape), t.tobytes()) for name, t in tensors.items()}
    again = load_hf(tmp_path / "out")
    assert again[0] == load_hf(tmp_path / "in")[0]


def test_loads_in_shards_on_a_mesh(tmp_path):
    torch_parity.write_checkpoint(tmp_path, PLAIN)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    padded = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded[name] = np.concatenate([tensors[name], tensors[name][:1]])
    save_file(padded, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 68}))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, params = load_hf(tmp_path, mesh, dtype="float32")
    q_proj = params["layers"]["q_proj"]
    assert q_proj.addressable_shards[0].data.shape == (2, 12, 2, 10)
    expected = tensors["model.layers.1.self_attn.q_proj.weight"].T.reshape(24, 4, 10)
    np.testing.assert_array_equal(np.asarray(q_proj[1]), expected)
    with jax.set_mesh(mesh):
        got = decoder.logits(config, params, jnp.asarray(torch_parity.token_ids()))
    np.testing.assert_allclose(got[..., :67], np.load(torch_parity.GOLDEN)[PLAIN], atol=1e-4)


def test_conversion_to_another_type(tmp_path):
    torch_parity.write_checkpoint(tmp_path / "in", PLAIN, dtype=ml_dtypes.bfloat16)
    config, params = load_hf(tmp_path / "in", dtype="float32")
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    save_hf(tmp_path / "out", config, params, dtype="bfloat16")
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert description["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors").read_bytes().count(b"BF16") == 25


def test_a_model_that_no_family_holds_is_refused_at_export(tmp_path, mesh):
    config = DecoderConfig(vocab_size=8, num_layers=1, width=8, mlp_width=8, num_heads=1, num_kv_heads=1, head_size=8)
    params = decoder.init_params(config, mesh, jax.random.key(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save_hf(tmp_path / "full", config, params)
    with pytest.raises(CheckpointError, match="qk_norm=True cannot be written as LlamaForCausalLM"):
        save_hf(tmp_path / "out", DecoderConfig(**{**vars(config), "family": "llama"}), params)
    assert not (tmp_path / "out").exists()


def edit_config(**changes):
    def damage(directory):
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def edit_tensors(change):
    def damage(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def edit_bytes(change):
    def damage(directory):
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def write(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def two_types(directory):
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, directory / "model.safetensors")


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def one_nan(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][3, 2] = np.nan


INDEX = "model.safetensors.index.json"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config cut off": (write("config.json", b'{"model_type": '), "config.json is not JSON"),
    "config is a list": (write("config.json", b"[]"), "is a JSON list"),
    "config is binary": (write("config.json", b"\xff\xfe\x00"), "is not JSON"),
    "no model type": (write("config.json", b"{}"), "model_type=None"),
    "mixture of experts": (edit_config(model_type="qwen3_moe"), "model_type='qwen3_moe'"),
    "other architecture": (edit_config(architectures=["Qwen3ForQuestionAnswering"]), "QuestionAnswering"),
    "quantised": (edit_config(quantization_config={"bits": 4, "quant_method": "gptq"}), "quantization_config"),
    "sliding window": (edit_config(use_sliding_window=True, sliding_window=16, max_window_layers=0), "sliding_window"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "code": (edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "code in the directory"),
    "yarn": (edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "rotary scaling"),
    "heads do not divide": (edit_config(num_key_value_heads=3), "num_heads=4 not divisible by num_kv_heads=3"),
    "odd head": (edit_config(head_dim=9), "even rotary dimension"),
    "negative size": (edit_config(vocab_size=-1), "vocab_size=-1"),
    "size is a string": (edit_config(hidden_size="24"), "hidden_size|width"),
    "other width": (edit_config(hidden_size=32), "embed_tokens.weight is .67, 24.; config.json requires .67, 32."),
    "fewer layers": (edit_config(num_hidden_layers=1), "have no place .model.layers.1"),
    "more layers": (edit_config(num_hidden_layers=3), "are missing .model.layers.2"),
    "tied but not equal": (edit_config(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickled weights": (pickled, "pytorch_model.bin.*pickled files are not read"),
    "weights empty": (write("model.safetensors", b""), "has 0 bytes"),
    "weights cut off": (edit_bytes(lambda b: b[:-100]), "is truncated or damaged"),
    "header cut off": (edit_bytes(lambda b: b[:100]), "truncated or not safetensors"),
    "header no JSON": (edit_bytes(lambda b: b[:8] + b"#" + b[9:]), "header does not parse"),
    "header size huge": (edit_bytes(lambda b: b"\xff" * 8 + b[8:]), "truncated or not safetensors"),
    "key missing": (edit_tensors(lambda t: t.pop("model.norm.weight")), "are missing .model.norm.weight"),
    "key left over": (edit_tensors(lambda t: t.update(extra=np.zeros(2, np.float32))), "have no place .extra"),
    "integer weights": (
        edit_tensors(lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)})),
        "model.norm.weight has type I8",
    ),
    "one NaN": (edit_tensors(one_nan), "layers.1.mlp.down_proj.weight has 1 of .* values that are not finite"),
    "rotates a part": (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    "two types": (two_types, "mlp.up_proj.weight have types"),
    "index no JSON": (write(INDEX, b"{"), "is not an index"),
    "index without map": (write(INDEX, b"{}"), "is not an index"),
    "index names a missing file": (write(INDEX, b'{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
    "index names a missing key": (write(INDEX, b'{"weight_map": {"a": "model.safetensors"}}'), "a should be in"),
    "index points outside": (write(INDEX, b'{"weight_map": {"a": "../../x.safetensors"}}'), "x.safetensors is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model_directories_are_refused_by_name(name, tmp_path):
    torch_parity.write_checkpoint(tmp_path, PLAIN)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_hf(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_models_load_however_the_matrix_is_stored(tmp_path, stored):
    torch_parity.write_checkpoint(tmp_path, PLAIN)
    edit_config(tie_word_embeddings=True)(tmp_path)

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        if stored != "both":
            tensors.pop("lm_head.weight" if stored == "embedding" else "model.embed_tokens.weight")

    matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tie)(tmp_path)
    config, params = load_hf(tmp_path)
    assert config.tie_embeddings and "head" not in params
    np.testing.assert_array_equal(params["embedding"], matrix)


def test_a_type_too_narrow_for_the_weights_is_refused(tmp_path):
    torch_parity.write_checkpoint(tmp_path, PLAIN)
    edit_tensors(lambda t: t.update({"model.norm.weight": np.full(24, 1e5, np.float32)}))(tmp_path)
    with pytest.raises(CheckpointError, match="model.norm.weight does not fit float16"):
        load_hf(tmp_path, dtype="float16")


def test_a_proxy_of_few_heads_on_a_mesh_of_more(tmp_path):
    """A small model on the mesh of a policy with tensor = 4: heads that 4 does not divide stay whole."""
    config = DecoderConfig(
        family="qwen2", vocab_size=64, num_layers=2, width=48, mlp_width=64, num_heads=12, num_kv_heads=2, head_size=8,
        qkv_bias=True, qk_norm=False,
    )  # fmt: skip
    params = decoder.init_params(config, make_mesh(MeshConfig()), jax.random.key(0))
    save_hf(tmp_path / "proxy", config, params)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 20)).astype(np.int32)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    _, spread = load_hf(tmp_path / "proxy", mesh)
    assert spread["layers"]["k_proj"].sharding.shard_shape((2, 48, 2, 8)) == (2, 24, 2, 8)
    assert spread["layers"]["q_proj"].sharding.shard_shape((2, 48, 12, 8)) == (2, 24, 3, 8)
    alone, together = (
        positions.direct_statistics(config, p, shard_batch(m, tokens), renormalize=False)
        for p, m in ((params, make_mesh(MeshConfig())), (spread, mesh))
    )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)
