"""Low-rank adapters (LoRA, arXiv:2106.09685) on any of the decoder's weights, with frozen base parameters.

The graph applies every adapter that the parameter tree contains. `join` returns the policy's tree; the frozen
parameters alone are the policy without adapters, which is the reference policy.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rpt_jax.config import DecoderConfig, LoraConfig
from rpt_jax.errors import ConfigError
from rpt_jax.models.decoder import abstract_params
from rpt_jax.models.families import LAYER_TENSORS
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.types import record


@record
class Frozen:
    """Frozen base parameters, and the scale of their adapters."""

    params: Any  # tree of the decoder's parameters
    scale: Any  # f32 [], alpha / rank


def check_targets(config: DecoderConfig, lora: LoraConfig) -> None:
    """Raise ConfigError if the adapters cannot be created."""
    if lora.rank and "head" in lora.targets and config.tie_embeddings:
        raise ConfigError(
            "lora.targets contains 'head', which is tied to the embedding; an adapter would untie them. "
            "Remove 'head' from --lora.targets."
        )
    if lora.rank and "head" in lora.targets and config.activation_dtype == "bfloat16":
        raise ConfigError(
            "lora.targets contains 'head' with model.activation_dtype='bfloat16'; rounding the sum of head and adapter "
            "would lose the adapter. Remove 'head' from --lora.targets, or use float32."
        )
    if lora.rank and not lora.targets:
        raise ConfigError("lora.targets is empty; nothing would be trained. Name weights, or set --lora.rank 0.")


def abstract_adapters(config: DecoderConfig, lora: LoraConfig, mesh: Mesh) -> Any:
    """Return shapes, dtype f32 and shardings of the adapters; each is sharded like its weight.

    Returns:
        {"layers": {"<target>_lora_a": [N, *in, r], "<target>_lora_b": [N, r, *out]}, "head_lora_a": [D, r], ...}.
    """
    abstract = abstract_params(config, mesh)
    adapters: dict[str, Any] = {"layers": {}}

    def leaf(parts):
        shape, spec = tuple(size for size, _ in parts), PartitionSpec(*(axis for _, axis in parts))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    for name in sorted(lora.targets):
        at_top = name == "head"
        weight = abstract[name] if at_top else abstract["layers"][name]
        # The head is [V, D] with its input last; a layer's weight is [N, *in, *out].
        axes = [(size, axis) for size, axis in zip(weight.shape, (*weight.sharding.spec, *[None] * weight.ndim))]
        num_in = 2 if name == "o_proj" else 1
        lead, inputs, outputs = (
            ([], axes[1:], axes[:1]) if at_top else (axes[:1], axes[1 : 1 + num_in], axes[1 + num_in :])
        )
        tree = adapters if at_top else adapters["layers"]
        tree[f"{name}_lora_a"] = leaf([*lead, *inputs, (lora.rank, None)])
        tree[f"{name}_lora_b"] = leaf([*lead, (lora.rank, None), *outputs])
    return adapters


def init_adapters(config: DecoderConfig, lora: LoraConfig, mesh: Mesh, key) -> Any:
    """Create adapters that are zero in effect: a uniform in ±in^-0.5, b zero; sharded as in `abstract_adapters`."""
    numbers = {name: number for number, name in enumerate(sorted(lora.targets))}

    def make(path, leaf):
        name, _, part = path[-1].key.rpartition("_lora_")
        bound = math.prod(leaf.shape[:-1] if name == "head" else leaf.shape[1:-1]) ** -0.5

        def init(k):
            if part == "b":
                return jnp.zeros(leaf.shape)
            return jax.random.uniform(k, leaf.shape, minval=-bound, maxval=bound)

        return jax.jit(init, out_shardings=leaf.sharding)(jax.random.fold_in(key, numbers[name]))

    return jax.tree_util.tree_map_with_path(make, abstract_adapters(config, lora, mesh))


def join(frozen: Frozen | None, trainable: Any) -> Any:
    """Return the policy's parameters: the trainable ones, or the frozen ones with their adapters."""
    if frozen is None:
        return trainable

    def scaled(tree):
        return {name: leaf * frozen.scale if name.endswith("_lora_a") else leaf for name, leaf in tree.items()}

    top = scaled({name: leaf for name, leaf in trainable.items() if name != "layers"})
    return frozen.params | top | {"layers": frozen.params["layers"] | scaled(trainable["layers"])}


@jax.jit
def merge(frozen: Frozen | None, trainable: Any) -> Any:
    """Merge adapters into plain parameters: W + scale * a b, in float32 for any dtype of W.

    bfloat16 would round away most of what an adapter learns.
    """
    trainable = {name: leaf for name, leaf in trainable.items() if name != READOUT}
    if frozen is None:
        return trainable

    def merged(params, adapters):
        out = dict(params)
        for name in (n.removesuffix("_lora_a") for n in adapters if n.endswith("_lora_a")):
            a, b = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
            if name == "head":
                delta = jnp.einsum("dr,rv->vd", a, b)
            else:
                delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
            out[name] = params[name].astype(jnp.float32) + frozen.scale * delta
        return out

    top = {name: leaf for name, leaf in trainable.items() if name != "layers"}
    return merged(frozen.params, top) | {"layers": merged(frozen.params["layers"], trainable["layers"])}


def save_adapters(directory: str | Path, lora: LoraConfig, adapters: Any, *, base: str) -> None:
    """Write adapters in the layout of Hugging Face PEFT.

    Args:
        lora: settings that the adapters were made with.
        adapters: as `abstract_adapters`.
        base: directory or name of the base model, for PEFT to look up.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}

    def put(prefix: str, a, b, num_in: int) -> None:
        """Store lora_A as [r, in] and lora_B as [out, r], as PEFT does."""
        a, b = np.asarray(a), np.asarray(b)
        a = a.reshape(math.prod(a.shape[:num_in]), -1)
        tensors[f"base_model.model.{prefix}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{prefix}.lora_B.weight"] = np.ascontiguousarray(b.reshape(len(b), -1).T)

    for name in sorted(lora.targets):
        if name == "head":
            put("lm_head", adapters["head_lora_a"], adapters["head_lora_b"], 1)
            continue
        a, b = (adapters["layers"][f"{name}_lora_{part}"] for part in "ab")
        for layer in range(a.shape[0]):
            module = LAYER_TENSORS[name].removesuffix(".weight")
            put(f"model.layers.{layer}.{module}", a[layer], b[layer], 2 if name == "o_proj" else 1)
    safetensors.numpy.save_file(tensors, str(directory / "adapter_model.safetensors"), {"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted("lm_head" if name == "head" else name for name in lora.targets),
    }
    (directory / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
