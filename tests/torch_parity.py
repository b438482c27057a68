"""Tiny Hugging Face checkpoints of every family, and their logits under PyTorch transformers.

`python tests/torch_parity.py` (with the `parity` extra) writes tests/golden/torch_logits.npz, which test_hf.py compares
against where PyTorch is not installed.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "torch_logits.npz"
VOCAB, LENGTH = 67, 72

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

# name -> config.json, in addition to the shared fields. The sequence has 72 tokens: beyond Llama 3's original 16.
CASES = {
    "qwen2, seven heads on one, tied": dict(
        model_type="qwen2", hidden_size=28, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen3, head size not width / heads": dict(
        model_type="qwen3", hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10, rope_theta=1e6
    ),
    "qwen3, biases, tied": dict(
        model_type="qwen3", hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_bias=True, tie_word_embeddings=True,
    ),
    "llama 3, scaled rope": dict(
        model_type="llama", hidden_size=24, num_attention_heads=4, num_key_value_heads=1, rope_parameters=LLAMA3_ROPE
    ),
    "llama 3, scaled rope in the old layout": dict(
        model_type="llama", hidden_size=24, num_attention_heads=4, num_key_value_heads=1, rope_theta=10_000.0,
        rope_scaling={k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    ),
    "llama, biases everywhere": dict(
        model_type="llama", hidden_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=6,
        attention_bias=True, mlp_bias=True,
    ),
    "llama, square MLP and projections": dict(
        model_type="llama", hidden_size=24, num_attention_heads=4, num_key_value_heads=4, intermediate_size=24
    ),
    "mistral": dict(
        model_type="mistral", hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        sliding_window=None,
    ),
}  # fmt: skip
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}


def full_config(case: str) -> dict:
    config = dict(CASES[case])
    return {
        "architectures": [CLASSES[config["model_type"]] + "ForCausalLM"],
        "vocab_size": VOCAB,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        **config,
    }


def tensor_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that the architecture has, written out from its definition."""
    c = full_config(case)
    D, F, H, K = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    Q = c.get("head_dim", D // H)
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, D)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention = {"q_proj": (H * Q, D), "k_proj": (K * Q, D), "v_proj": (K * Q, D), "o_proj": (D, H * Q)}
        mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
        for name, shape in attention.items():
            shapes[f"{layer}self_attn.{name}.weight"] = shape
            if c.get("attention_bias") or (c["model_type"] == "qwen2" and name != "o_proj"):
                shapes[f"{layer}self_attn.{name}.bias"] = shape[:1]
        for name, shape in mlp.items():
            shapes[f"{layer}mlp.{name}.weight"] = shape
            if c.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (D,)
        if c["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}self_attn.{name}.weight"] = (Q,)
    return shapes


def tensors(case: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(sorted(CASES).index(case))
    return {
        name: ((1.0 if "norm" in name else 0.0) + 0.2 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in sorted(tensor_shapes(case).items())
    }


def write_checkpoint(directory: Path, case: str, *, num_files: int = 1, dtype=np.float32) -> dict[str, np.ndarray]:
    """A model directory in one file, or in several with an index; returns its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    all_tensors = tensors(case, dtype)
    (directory / "config.json").write_text(json.dumps(full_config(case)))
    if num_files == 1:
        save_file(all_tensors, directory / "model.safetensors", {"format": "pt"})
        return all_tensors
    weight_map = {}
    for part in range(num_files):
        names, file = sorted(all_tensors)[part::num_files], f"model-{part + 1:05d}-of-{num_files:05d}.safetensors"
        save_file({name: all_tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return all_tensors


CLASSIFIERS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
# One of each family.
CLASSIFIED = (
    "qwen2, seven heads on one, tied", "qwen3, head size not width / heads", "llama, biases everywhere", "mistral",
)  # fmt: skip


def write_classifier(directory: Path, case: str, kind: str) -> dict[str, np.ndarray]:
    """A classifier with one label: of sequences, without a bias, or of tokens, with one."""
    own = {name: t for name, t in tensors(case).items() if name != "lm_head.weight"}
    rng = np.random.default_rng(9)
    # Scores of order one, so that 1e-5 is above the rounding of float32.
    own["score.weight"] = 0.1 * rng.standard_normal((1, full_config(case)["hidden_size"])).astype(np.float32)
    if kind == "token":
        own["score.bias"] = np.array([0.75], np.float32)
    config = full_config(case)
    architecture = CLASSES[config["model_type"]] + CLASSIFIERS[kind]
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [architecture]} | labels))
    save_file(own, directory / "model.safetensors", {"format": "pt"})
    return own


def torch_scores(directory: Path, kind: str) -> np.ndarray:
    """The score of each sequence [2], or of each token [2, LENGTH]."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    loader = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    model = loader.from_pretrained(str(directory), dtype=torch.float32).eval()
    with torch.no_grad():
        # One by one, so that no padding id is needed.
        return np.stack([model(torch.tensor(ids[None])).logits[0, ..., 0].numpy() for ids in token_ids()])


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def torch_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(token_ids())).logits.numpy()


def main() -> None:
    import tempfile

    logits = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), case)
            logits[case] = torch_logits(Path(directory)).astype(np.float32)
    for case in CLASSIFIED:
        for kind in CLASSIFIERS:
            with tempfile.TemporaryDirectory() as directory:
                write_classifier(Path(directory), case, kind)
                logits[f"{case} | {kind}"] = torch_scores(Path(directory), kind).astype(np.float32)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **logits)


if __name__ == "__main__":
    main()
