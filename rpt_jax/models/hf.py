"""Read and write Hugging Face model directories: config.json and safetensors, one tensor on the host at a time.

Files are read, not mapped, because mapped pages would count as memory. Pickles and code in the directory are never
loaded. The tensors of a layer are written into stacked, sharded arrays in place, so loading needs memory for the
parameters and one tensor.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.errors import CheckpointError
from rpt_jax.models import decoder
from rpt_jax.models.families import (
    LAYER_TENSORS,
    SCORE_BIAS,
    SCORE_WEIGHT,
    TOP_TENSORS,
    config_json,
    has_readout,
    read_config,
)
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import make_mesh, replicated

_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_MAX_HEADER_BYTES = 100_000_000  # limit of the format
# Buffers of old exports, which config.json determines.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        array = np.fromfile(self.file, self.dtype, count, offset=self.offset)
        if array.size != count:
            raise CheckpointError(f"{self.file} ended while being read; replace the damaged file.")
        if num_bad := count - int(np.isfinite(array).sum()):
            raise CheckpointError(
                f"{self.file}: {self.name} has {num_bad} of {count} values that are not finite; the model would "
                "predict only NaN. Replace the damaged file."
            )
        return array.reshape(self.shape)


def load_hf(
    directory: str | Path, mesh: Mesh | None = None, *, dtype: str | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model directory into sharded parameters.

    Args:
        directory: config.json with model.safetensors, or shards with their index.
        mesh: that shards the parameters; None: the first device.
        dtype: of the parameters, "float32", "bfloat16" or "float16"; None: as stored.
    Returns:
        (DecoderConfig, parameters in the layout of `decoder.init_params`). A classifier with one label has a scalar
        readout (`scalar_head`) and no head.
    Raises:
        CheckpointError: unsupported architecture, damaged file, or a missing, surplus or misshapen tensor; names the
            file and the key, before anything is allocated on a device. A tensor with values that are not finite is
            found and named when it is read.
    """
    directory = Path(directory)
    config = read_config(directory)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    entries, readout = _index_tensors(directory), None
    if has_readout(directory):
        # A tied head asks for no parameter: there is none.
        config = replace(config, tie_embeddings=True)
        readout, entries = _take_readout(directory, config, entries)
    abstract = decoder.abstract_params(config, mesh)
    plan = _plan(directory, config, abstract, entries)
    params: dict[str, Any] = {"layers": {}}
    for (name, *layer), sources in plan.items():
        target = abstract[name] if not layer else abstract["layers"][layer[0]]
        kind = np.dtype(dtype) if dtype else sources[0].dtype
        target = jax.ShapeDtypeStruct(target.shape, kind, sharding=target.sharding)
        if layer:
            params["layers"][layer[0]] = _stack(target, sources, is_matrix=layer[0].endswith("_proj"))
        else:
            params[name] = _put(target, sources[0], is_matrix=False)
    if readout is not None:
        params[READOUT] = jax.device_put(readout, replicated(mesh))
    return config, params


def _take_readout(directory: Path, config: DecoderConfig, entries: dict[str, _Entry]):
    """Return (a classifier's readout f32 [D], or [D + 1] with its bias; the other tensors)."""
    weight, bias = entries.get(SCORE_WEIGHT), entries.get(SCORE_BIAS)
    if weight is None or weight.shape != (1, config.width) or (bias is not None and bias.shape != (1,)):
        shape = None if weight is None else list(weight.shape)
        raise CheckpointError(
            f"{directory}: {SCORE_WEIGHT} is {shape}; a classifier with one label has [1, {config.width}]. Use the "
            "config.json that belongs to these weights."
        )
    parts = [entry.read().astype(np.float32).reshape(-1) for entry in (weight, bias) if entry is not None]
    # A language head that a training script left in the file is of no use to a classifier.
    rest = {name: entry for name, entry in entries.items() if name not in (SCORE_WEIGHT, SCORE_BIAS, "lm_head.weight")}
    return np.concatenate(parts), rest


def _put(target: jax.ShapeDtypeStruct, source: _Entry, *, is_matrix: bool) -> jax.Array:
    """Load a stored tensor onto the mesh; every process reads it and keeps its shards."""
    array = source.read()
    array = (array.T if is_matrix else array).reshape(target.shape).astype(target.dtype, copy=False)
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{source.file}: {source.name} does not fit {target.dtype}; some values would become infinite. Use "
            "bfloat16 or float32."
        )
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])


def _stack(target: jax.ShapeDtypeStruct, sources: list[_Entry], *, is_matrix: bool) -> jax.Array:
    """Write the tensors of all layers one by one into a stacked array, in place."""
    spec = jax.sharding.PartitionSpec(*target.sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(target.sharding.mesh, spec)
    layer = jax.ShapeDtypeStruct(target.shape[1:], target.dtype, sharding=sharding)
    stacked = jax.jit(partial(jnp.zeros, target.shape, target.dtype), out_shardings=target.sharding)()
    write = jax.jit(
        jax.lax.dynamic_update_index_in_dim,
        static_argnames="axis",
        donate_argnums=0,
        out_shardings=target.sharding,
    )
    for number, source in enumerate(sources):
        # Waiting frees the host copy of this layer before the next is read.
        stacked = jax.block_until_ready(write(stacked, _put(layer, source, is_matrix=is_matrix), number, axis=0))
    return stacked


def _plan(directory: Path, config: DecoderConfig, abstract, entries: dict[str, _Entry]) -> dict[tuple, list[_Entry]]:
    """Map each parameter to its tensors, one per layer; every tensor of the files is used exactly once."""
    wanted = {(name,): [tensor] for name, tensor in TOP_TENSORS.items() if name in abstract}
    for name, tensor in LAYER_TENSORS.items():
        if name in abstract["layers"]:
            wanted["layers", name] = [f"model.layers.{i}.{tensor}" for i in range(config.num_layers)]
    used = Counter(tensor for tensors in wanted.values() for tensor in tensors)
    if config.tie_embeddings:
        entries = _with_tied(directory, entries)
    found = {name for name in entries if not name.endswith(_DERIVED)}
    missing, surplus = sorted(used.keys() - found), sorted(found - used.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensor(s) are missing ({_some(missing)}) and {len(surplus)} have no place "
            f"({_some(surplus)}) in a {config.family} model of {config.num_layers} layers; each must occur once. "
            "Use the config.json that belongs to these weights."
        )
    for path, tensors in wanted.items():
        shape = abstract["layers"][path[1]].shape[1:] if len(path) > 1 else abstract[path[0]].shape
        dtypes = {entries[t].dtype for t in tensors}
        for tensor in tensors:
            _check_shape(entries[tensor], tensor, shape, is_matrix=path[-1].endswith("_proj"), path=path)
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{directory}: the layers' {LAYER_TENSORS[path[-1]]} have types {sorted(map(str, dtypes))}; one "
                "parameter must have one type. Convert the checkpoint to a single type."
            )
    return {path: [entries[t] for t in tensors] for path, tensors in wanted.items()}


def _check_shape(entry: _Entry, tensor: str, shape: tuple[int, ...], *, is_matrix: bool, path: tuple) -> None:
    """Stored weights are [out, in]; ours are [in, out] with split heads."""
    if is_matrix:
        num_in = 2 if path[-1] == "o_proj" else 1
        stored = (math.prod(shape[num_in:]), math.prod(shape[:num_in]))
    else:
        stored = shape if len(path) == 1 else (math.prod(shape),)
    if entry.shape != stored:
        raise CheckpointError(
            f"{entry.file}: {tensor} is {list(entry.shape)}; config.json requires {list(stored)}. "
            "Use the config.json that belongs to these weights."
        )


def _with_tied(directory: Path, entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """Return the tensors with the tied matrix as the embedding alone; files store it as either, or as both."""
    head, embedding = (entries.get(TOP_TENSORS[name]) for name in ("head", "embedding"))
    if head is None:
        return entries
    if embedding is not None and head.read().tobytes() != embedding.read().tobytes():
        raise CheckpointError(
            f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; one of the two "
            "would be lost. Set tie_word_embeddings to false in config.json."
        )
    rest = {name: entry for name, entry in entries.items() if name != TOP_TENSORS["head"]}
    return rest | {TOP_TENSORS["embedding"]: embedding or head}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _index_tensors(directory: Path) -> dict[str, _Entry]:
    """Map tensor names to their places in all shards."""
    index = directory / _INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            files = {name: directory / Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise CheckpointError(
                f"{index} is not an index ({error!r}); it must map tensors to files under weight_map. Replace it."
            ) from error
    else:
        files = {"": directory / "model.safetensors"}
    entries: dict[str, _Entry] = {}
    for file in sorted(set(files.values())):
        for name, entry in _read_header(file):
            if name in entries:
                raise CheckpointError(
                    f"{file}: {name} is also in {entries[name].file}; it must occur once. Remove one."
                )
            entries[name] = entry
    for name, file in files.items():
        if name and (name not in entries or entries[name].file != file):
            raise CheckpointError(f"{index}: {name} should be in {file.name} and is not. Replace index or shard.")
    return entries


def _read_header(file: Path) -> Iterator[tuple[str, _Entry]]:
    """Yield the tensors of a safetensors file: eight bytes of header size, a JSON header, the data."""
    try:
        is_there = file.is_file()
    except OSError:  # the name is not a valid file name
        is_there = False
    if not is_there:
        others = sorted(p.name for p in file.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise CheckpointError(
            f"{file} is missing (weights there: {others[:5]}); weights must be safetensors; pickled files are not "
            "read. Convert them, or complete the download."
        )
    total = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if total < 8 or size > min(_MAX_HEADER_BYTES, total - 8):
            raise CheckpointError(
                f"{file} has {total} bytes and a header of {size}: it is truncated or not safetensors. Replace it."
            )
        raw = stream.read(size)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        described = [(n, d["dtype"], tuple(d["shape"]), tuple(d["data_offsets"])) for n, d in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header does not parse ({error!r}); replace the damaged file.") from error
    for name, dtype, shape, offsets in described:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name} has type {dtype}; {', '.join(_DTYPES)} are read, quantised weights are not. "
                "Convert the checkpoint."
            )
        kind = np.dtype(_DTYPES[dtype])
        if not all(isinstance(n, int) and n >= 0 for n in shape + offsets) or len(offsets) != 2:
            raise CheckpointError(f"{file}: {name} has shape {shape} at {offsets}; replace the damaged file.")
        begin, end = offsets
        if end - begin != math.prod(shape) * kind.itemsize or 8 + size + end > total:
            raise CheckpointError(
                f"{file}: {name} should take {math.prod(shape) * kind.itemsize} bytes and has {end - begin} of a file "
                f"of {total}; the file is truncated or damaged. Replace it."
            )
        yield name, _Entry(name, file, kind, shape, 8 + size + begin)


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Any,
    *,
    dtype: str | None = None,
    tokenizer: Any = None,
    generation: dict[str, Any] | None = None,
    objective: str = "",
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Write a model directory that transformers loads. Adapters must be merged first.

    Parameters with a scalar readout become a classifier with one label: of sequences, or of tokens if it has a bias.

    Args:
        directory: created if missing.
        config: the model's shape.
        params: plain parameters.
        dtype: of the tensors; None: that of each parameter.
        tokenizer: a `tokenizer.Tokenizer` to save with the weights.
        generation: generation_config.json to write, such as its stop ids; None: none.
        objective: of a reward model, kept in config.json; empty: none.
        max_shard_bytes: of a safetensors file; one shard is on the host at a time.
    Raises:
        CheckpointError: the family does not support this model, adapters are not merged, or the directory is not empty.
    """
    directory = Path(directory)
    adapters = [name for name in (*params, *params["layers"]) if "_lora_" in name]
    if adapters:
        raise CheckpointError(
            f"{adapters[0]} and others are adapters, which would be lost; merge them first (lora.merge)."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not an empty directory; an export needs one. Choose another.")
    names = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    # The widest dtype: loading in the dtype that config.json names must lose nothing.
    kind = str(np.dtype(dtype) if dtype else jnp.result_type(*jax.tree.leaves(params)))
    classifier = ""
    if READOUT in params:
        classifier = "sequence" if len(params[READOUT]) == config.width else "token"
        # Batches of sequences need to know their padding.
        names["pad_token_id"] = tokenizer.pad_id if tokenizer else None
    description = config_json(config, kind, names, classifier) | ({"rpt_objective": objective} if objective else {})
    directory.mkdir(parents=True, exist_ok=True)
    shards, weight_map, shard, size, total = 0, {}, {}, 0, 0
    for name, read, num_bytes in _tensors_out(params, dtype):
        if shard and size + num_bytes > max_shard_bytes:
            _write_shard(directory, shards, shard)
            shards, shard, size = shards + 1, {}, 0
        shard[name], weight_map[name] = read(), shards
        size, total = size + num_bytes, total + num_bytes
    _write_shard(directory, shards, shard)
    _name_shards(directory, shards + 1, weight_map, total)
    if tokenizer is not None:
        tokenizer.save(directory)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # Written last: a directory without config.json is an unfinished export.
    (directory / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _tensors_out(params, dtype: str | None):
    """Yield (tensor name, reader, bytes) of every tensor, in model order."""

    def item(name: str, array, layer: int | None):
        shape = array.shape if layer is None else array.shape[1:]
        kind = np.dtype(dtype) if dtype else array.dtype

        def read() -> np.ndarray:
            host = to_host(array if layer is None else array[layer]).astype(kind, copy=False)
            num_in = 2 if ".o_proj." in name else 1
            if layer is not None and "proj.weight" in name:
                host = host.reshape(math.prod(shape[:num_in]), -1).T
            elif layer is not None:
                host = host.reshape(-1)
            return np.ascontiguousarray(host)

        return name, read, math.prod(shape) * kind.itemsize

    yield item(TOP_TENSORS["embedding"], params["embedding"], None)
    layers = params["layers"]
    for number in range(len(next(iter(layers.values())))):
        for leaf, tensor in LAYER_TENSORS.items():
            if leaf in layers:
                yield item(f"model.layers.{number}.{tensor}", layers[leaf], number)
    for name in ("final_norm", "head"):
        if name in params and not (name == "head" and READOUT in params):
            yield item(TOP_TENSORS[name], params[name], None)
    if READOUT in params:
        D = params["embedding"].shape[1]
        yield item(SCORE_WEIGHT, params[READOUT][None, :D], None)
        if len(params[READOUT]) > D:
            yield item(SCORE_BIAS, params[READOUT][D:], None)


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def _write_shard(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    path = _shard_path(directory, number)
    safetensors.numpy.save_file(tensors, str(path), {"format": "pt"})
    path.chmod(0o644)  # the library writes files that only their owner can read


def _name_shards(directory: Path, number: int, weight_map: dict[str, int], total: int) -> None:
    """Rename shards to what transformers expects, and write the index if there are several."""
    if number == 1:
        _shard_path(directory, 0).rename(directory / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    for i, file in enumerate(files):
        _shard_path(directory, i).rename(directory / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in weight_map.items()}}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
