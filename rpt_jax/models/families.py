"""Hugging Face architectures as tables: their config.json, their tensors, and the names of our parameters.

All of them run the graph of `decoder.py`. A new family of the same block is a line of FAMILIES.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from rpt_jax.config import DecoderConfig, RopeScaling
from rpt_jax.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Features of a Hugging Face `model_type` beyond the plain block."""

    architecture: str
    qk_norm: bool = False
    always_qkv_bias: bool = False
    has_attention_bias: bool = False
    """attention_bias in config.json adds biases to queries, keys, values and output."""
    has_mlp_bias: bool = False


FAMILIES = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", always_qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, has_attention_bias=True),
    "llama": Family(architecture="LlamaForCausalLM", has_attention_bias=True, has_mlp_bias=True),
    "mistral": Family(architecture="MistralForCausalLM"),
}

# Our leaf under "layers" -> tensor of model.layers.<i>. Weights are stored transposed, [out, in].
LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
# A scalar readout stands in place of the language head: of sequences without a bias, of tokens with one.
_CLASSIFIERS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
SCORE_WEIGHT, SCORE_BIAS = "score.weight", "score.bias"
TOP_TENSORS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}


def has_readout(directory: str | Path) -> bool:
    """Return whether a model directory holds a sequence or token classifier, a reward model."""
    names = _read_json(Path(directory) / "config.json").get("architectures") or [""]
    return isinstance(names, list) and str(names[0]).endswith(tuple(_CLASSIFIERS.values()))


def read_config(directory: str | Path) -> DecoderConfig:
    """Read the DecoderConfig of a model directory's config.json, in the old or new rotary layout.

    Classifiers must have one label, whose score is a scalar readout (`has_readout`).

    Raises:
        CheckpointError: no readable config.json, or an unsupported architecture or feature, which it names.
    """
    path = Path(directory) / "config.json"
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type={model_type!r} (architectures {raw.get('architectures')}); supported are "
            f"{', '.join(FAMILIES)}, dense. Convert the model or choose another."
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        # transformers fills in the defaults of the architecture. No code from the directory runs.
        filled = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validation raises anything from KeyError to its own classes
        raise CheckpointError(f"{path} does not load ({error}); it must be a valid config. Correct it.") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    family = FAMILIES[model_type]
    _refuse_unsupported(path, raw, filled, family)
    attention_bias = family.has_attention_bias and bool(getattr(filled, "attention_bias", False))
    config = DecoderConfig(
        family=model_type,
        vocab_size=filled.vocab_size,
        num_layers=filled.num_hidden_layers,
        width=filled.hidden_size,
        mlp_width=filled.intermediate_size,
        num_heads=filled.num_attention_heads,
        num_kv_heads=filled.num_key_value_heads or filled.num_attention_heads,
        head_size=getattr(filled, "head_dim", None) or filled.hidden_size // filled.num_attention_heads,
        rope_theta=_number(path, filled.rope_parameters, "rope_theta"),
        rope_scaling=_rope_scaling(path, filled.rope_parameters),
        max_positions=filled.max_position_embeddings,
        norm_eps=_number(path, vars(filled), "rms_norm_eps"),
        qkv_bias=family.always_qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.has_mlp_bias and bool(getattr(filled, "mlp_bias", False)),
        qk_norm=family.qk_norm,
        tie_embeddings=bool(filled.tie_word_embeddings),
    )
    _check_sizes(path, config)
    return config


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a model directory has a config.json. Check the path.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); replace the damaged file.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is a JSON {type(value).__name__}; it must be an object. Replace it.")
    return value


def _refuse_unsupported(path: Path, raw: dict, filled, family: Family) -> None:
    architectures = raw.get("architectures") or [family.architecture]
    stem = family.architecture.removesuffix("ForCausalLM")
    supported = [[family.architecture], *([stem + suffix] for suffix in _CLASSIFIERS.values())]
    is_classifier = architectures in supported[1:]
    is_sliding = getattr(filled, "sliding_window", None) is not None
    is_sliding |= any(kind != "full_attention" for kind in getattr(filled, "layer_types", None) or ())
    refusals = {
        f"architectures={architectures}": architectures not in supported,
        f"num_labels={getattr(filled, 'num_labels', 1)}": is_classifier and filled.num_labels != 1,
        f"hidden_act={filled.hidden_act!r}": filled.hidden_act != "silu",
        "quantization_config": bool(raw.get("quantization_config")),
        f"sliding_window={getattr(filled, 'sliding_window', None)}": is_sliding,
        "auto_map (code in the directory)": bool(raw.get("auto_map")),
        f"partial_rotary_factor={_partial_rotary(raw, filled)}": _partial_rotary(raw, filled) != 1,
    }
    for what, is_present in refusals.items():
        if is_present:
            raise CheckpointError(
                f"{path}: {what} is not supported; the model must be a plain {family.architecture}, or its classifier "
                "with one label, full attention, silu and unquantised weights. Convert it or choose another."
            )


def _partial_rotary(raw: dict, filled) -> Any:
    """Return the share of each head that is rotated; rotating all of it where the file says less would be silent."""
    values = (raw.get("partial_rotary_factor"), (filled.rope_parameters or {}).get("partial_rotary_factor"))
    return next((v for v in values if v is not None), 1)


def _number(path: Path, values: dict, name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: {name}={value!r}; it must be a number above 0. Correct the file.")
    return float(value)


def _rope_scaling(path: Path, parameters: dict) -> RopeScaling:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return RopeScaling()
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or not all(isinstance(parameters.get(n), int | float) for n in names):
        raise CheckpointError(
            f"{path}: rotary scaling {parameters}; llama3 is supported, with {', '.join(names)}. "
            "Remove the scaling (if prompts fit the original length) or choose another model."
        )
    factor, low, high, original = (_number(path, parameters, n) for n in names)
    if factor < 1 or low >= high:
        raise CheckpointError(
            f"{path}: rotary scaling {parameters}; factor must be at least 1, low_freq_factor below high_freq_factor. "
            "Correct the file."
        )
    return RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=int(original))


def _check_sizes(path: Path, config: DecoderConfig) -> None:
    names = (
        "vocab_size",
        "num_layers",
        "width",
        "mlp_width",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "max_positions",
    )
    wrong = [f"{n}={getattr(config, n)!r}" for n in names if not isinstance(getattr(config, n), int)]
    wrong += [f"{n}={getattr(config, n)}" for n in names if not wrong and getattr(config, n) < 1]
    if not wrong and config.num_heads % config.num_kv_heads:
        wrong = [f"num_heads={config.num_heads} not divisible by num_kv_heads={config.num_kv_heads}"]
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; sizes must be positive and fit. Correct the file.")


def config_json(
    config: DecoderConfig, dtype: str, special_ids: dict[str, int | None], classifier: str = ""
) -> dict[str, Any]:
    """Return the config.json of an export, in the layout of transformers 5.

    Args:
        dtype: of the weights.
        special_ids: entries such as bos_token_id.
        classifier: sequence or token: of the readout that stands in place of the language head. Empty: there is none.
    Raises:
        CheckpointError: config.family does not support one of the model's features.
    """
    family = FAMILIES[config.family]
    can_have_bias = family.has_attention_bias or family.always_qkv_bias
    for feature, value, is_possible in (
        ("qk_norm", config.qk_norm, config.qk_norm == family.qk_norm),
        ("qkv_bias", config.qkv_bias, can_have_bias if config.qkv_bias else not family.always_qkv_bias),
        ("o_bias", config.o_bias, config.o_bias == (config.qkv_bias and family.has_attention_bias)),
        ("mlp_bias", config.mlp_bias, family.has_mlp_bias or not config.mlp_bias),
    ):
        if not is_possible:
            raise CheckpointError(
                f"model.{feature}={value} cannot be written as {family.architecture}; choose the --model.family that "
                "has it (qwen2: biases on q, k, v; qwen3: normed heads; llama: biases everywhere)."
            )
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    optional = {}
    if family.has_attention_bias:
        optional["attention_bias"] = config.o_bias
    if family.has_mlp_bias:
        optional["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        optional["sliding_window"] = None
    architecture = family.architecture
    if classifier:
        architecture = architecture.removesuffix("ForCausalLM") + _CLASSIFIERS[classifier]
        optional |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return (
        optional
        | {
            "architectures": [architecture],
            "model_type": config.family,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": rope,
            # For readers of the older layout.
            "rope_theta": config.rope_theta,
            "rope_scaling": None if scaling.factor == 1 else {k: v for k, v in rope.items() if k != "rope_theta"},
            "tie_word_embeddings": config.tie_embeddings,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        | special_ids
    )
