"""A run's tokenizer, model shape and initial parameters: from a model directory, from another run, or new."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config, DecoderConfig
from rpt_jax.config.schema import flag_of
from rpt_jax.data.readers import read_texts, training_corpora
from rpt_jax.data.templates import with_prompt_texts
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.models import lora
from rpt_jax.models.attention import default_dtype
from rpt_jax.models.decoder import init_params
from rpt_jax.models.families import has_readout
from rpt_jax.models.families import read_config as read_model_config
from rpt_jax.models.hf import load_hf
from rpt_jax.models.lora import Frozen, merge
from rpt_jax.models.scalar_head import READOUT, init_readout
from rpt_jax.parallel.mesh import replicated
from rpt_jax.rewards.catalog import requested_policies
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.scoring.companions import AVERAGE, with_companions
from rpt_jax.scoring.scalars import ScalarModel
from rpt_jax.tokenizer import Tokenizer, load_tokenizer, train_byte_level
from rpt_jax.tokenizer.chat import parse_options
from rpt_jax.tokenizer.stops import find_stop_ids
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.run_directory import FINISHED, read_config, read_json
from rpt_jax.types import TrainState

# A tokenizer is trained on the first documents, up to about this many characters.
_TOKENIZER_CHARACTERS = 50_000_000


def is_run(path: str | Path) -> bool:
    """Return whether a policy path is a run directory, not a model directory."""
    path = Path(path)
    return ((path / "checkpoints").is_dir() or (path / "corpus.json").exists()) and (path / "config.json").exists()


# Objectives of reward models, and those that score whole completions.
_REWARD_MODELS, _OF_SEQUENCES = ("bradley_terry", "outcome", "process", "value"), ("bradley_terry", "outcome")


def is_reward_model(config: Config) -> bool:
    """Return whether a run trains a reward or value model."""
    return config.supervised.objective in _REWARD_MODELS


def check_path(path: str, setting: str = "policy.path") -> None:
    """Raise ConfigError if a setting's path names no model; say how to download what looks like a name on a hub."""
    if not path or (Path(path) / "config.json").exists():
        return
    if Path(path).exists():
        raise ConfigError(
            f"{setting}={path!r} holds no config.json; it must be a Hugging Face model directory or a run directory. "
            f"Correct {flag_of(setting)}."
        )
    message = f"{setting}={path!r} does not exist; it must be a Hugging Face model directory or a run directory. "
    if Path(path) == Path("runs/smollm2"):
        message += "Write it with python -m experiments.fetch_smollm2 --out runs/smollm2, or run make real-run."
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        name = path.split("/")[1]
        message += (
            f"If it is a name on the Hugging Face hub: nothing is downloaded here. Run hf download {path} --local-dir "
            f"{name}, and set {flag_of(setting)} {name}."
        )
    else:
        message += f"Correct {flag_of(setting)}."
    raise ConfigError(message)


def find_tokenizer(config: Config) -> Tokenizer:
    """Return data.tokenizer, else the tokenizer of policy.path, else the run's own, trained on its documents.

    Raises:
        ConfigError: none is set for a run on questions, or malformed variables of the chat template.
    """
    tokenizer = _read_or_train(config)
    tokenizer.chat_options = parse_options(config.data.chat_template_kwargs)
    return tokenizer


def _read_or_train(config: Config) -> Tokenizer:
    own = Path(config.run.directory) / "tokenizer"
    # A run keeps its tokenizer, so it does not need the place that it was read from.
    named = config.data.tokenizer or config.policy.path
    if named and not Path(named).exists() and (own / "tokenizer.json").exists():
        return load_tokenizer(own)
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer, config.data.tokenizer_pattern)
    if config.policy.path:
        is_of_run = is_run(config.policy.path)
        directory = Path(config.policy.path) / "tokenizer" if is_of_run else config.policy.path
        return load_tokenizer(directory, config.data.tokenizer_pattern)
    if (own / "tokenizer.json").exists():
        return load_tokenizer(own)
    if config.questions.path:
        raise ConfigError(
            "questions.path is set without a tokenizer; a run on questions needs one. Set --data.tokenizer."
        )

    def texts():
        left = _TOKENIZER_CHARACTERS
        for corpus in training_corpora(config.data):
            for text in read_texts(corpus.path, text_template=corpus.text_template, split=corpus.split):
                yield text.text
                left -= len(text.text)
                if left < 0:
                    return

    return train_byte_level(texts(), config.data.tokenizer_vocab_size)


def resolve(config: Config, tokenizer: Tokenizer, kept: Config | None = None) -> Config:
    """Return the config with the values that a run's first start resolves: the model, the stop ids and prompt files.

    The shape is that of policy.path. Without one, model.vocab_size=0 becomes at least one entry for every id.
    An empty model.activation_dtype becomes that of the platform.

    Args:
        config: of this start.
        tokenizer: of the run.
        kept: config of the existing run, or of the run to copy, whose resolved values are used again; None: a new run.
    Raises:
        ConfigError: fewer entries than ids, invalid stop ids, sizes that do not fit each other, or no such prompt.
    """
    config = with_prompt_texts(config, kept)
    model, path = config.model, config.policy.path
    if path:
        is_same = kept is not None and kept.policy.path == path
        model = with_shape(model, kept.model if is_same else shape_of(path))
    elif kept is not None and not model.vocab_size:
        model = replace(model, vocab_size=kept.model.vocab_size)
    kept_dtype = "" if kept is None else kept.model.activation_dtype
    model = replace(model, activation_dtype=model.activation_dtype or kept_dtype)
    model = replace(model, activation_dtype=default_dtype(model))
    size, shards = model.vocab_size, config.mesh.tensor
    if size and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size}; the tokenizer has {tokenizer.vocab_size} ids and each needs an entry. "
            "Raise --model.vocab-size, use 0, or use the tokenizer that belongs to the checkpoint."
        )
    # Runs of an earlier version scored and learned unused entries too.
    num_ids = tokenizer.vocab_size if kept is None else kept.model.num_ids
    model = replace(model, vocab_size=size or -(-tokenizer.vocab_size // shards) * shards, num_ids=num_ids)
    # A run directory without stop ids is of an earlier version, which stops at the end token alone.
    kept_ids = () if kept is None else kept.rollout.stop_ids or (tokenizer.eos_id,)
    stop_ids = config.rollout.stop_ids or kept_ids or tuple(stop_sources(config, tokenizer))
    if not all(0 <= i < tokenizer.vocab_size for i in stop_ids):
        raise ConfigError(
            f"rollout.stop_ids={stop_ids}; they must be ids of the tokenizer, below {tokenizer.vocab_size}. Correct "
            "them, or remove them."
        )
    config = replace(config, model=model, rollout=replace(config.rollout, stop_ids=stop_ids))
    config.validate()
    return config


def stop_sources(config: Config, tokenizer: Tokenizer) -> dict[int, list[str]]:
    """Return the stop ids of a new run and their sources: of rollout.stop_ids, a run as policy, or `find_stop_ids`."""
    path = config.policy.path
    if config.rollout.stop_ids:
        return {i: ["rollout.stop_ids"] for i in config.rollout.stop_ids}
    if path and is_run(path):
        ids = read_config(Path(path), say=False).rollout.stop_ids or (tokenizer.eos_id,)
        return {i: ["the run in policy.path"] for i in ids}
    return find_stop_ids(tokenizer, Path(path)) if path else tokenizer.stop_sources


def shape_of(path: str) -> DecoderConfig:
    """Return the shape of the model in a Hugging Face or run directory."""
    return read_config(Path(path)).model if is_run(path) else read_model_config(path)


def with_shape(model: DecoderConfig, shape: DecoderConfig) -> DecoderConfig:
    """Return `shape` with the settings of `model` that no shape has: dtype of activations, remat and platform."""
    return replace(shape, activation_dtype=model.activation_dtype, remat=model.remat, platform=model.platform)


def start_params(config: Config, mesh: Mesh) -> Any:
    """Return the policy's parameters before any training, in policy.param_dtype: from policy.path, or random."""
    path, kind = config.policy.path, config.policy.param_dtype
    if path and _has_readout(path) and not is_reward_model(config):
        raise ConfigError(
            f"policy.path={path!r} is a reward model, no policy. Choose another --policy.path, or use it as "
            "--reward.models.path."
        )
    if not path:
        params = init_params(config.model, mesh, jax.random.key(config.run.seed))
    elif is_run(path):
        params = _policy_of_run(Path(path), mesh)
    else:
        return load_hf(path, mesh, dtype=kind)[1]
    return jax.tree.map(lambda x: x.astype(kind), params)


def _policy_of_run(path: Path, mesh: Mesh) -> Any:
    """Return the newest policy of a run directory, with its adapters merged; a reward model's readout stays."""
    config = read_config(path, say=False)
    if not (config.run.num_steps or config.supervised.num_steps):
        return start_params(config, mesh)
    state, frozen, _ = newest_of_run(path, mesh)
    readout = {READOUT: state.params[READOUT]} if is_reward_model(config) else {}
    return merge(frozen, state.params) | readout


def _has_readout(path: str) -> bool:
    if is_run(path):
        return is_reward_model(read_config(Path(path), say=False))
    return has_readout(path)


def load_reward_model(path: str, mesh: Mesh, tokenizer: Tokenizer | None = None) -> ScalarModel:
    """Load a reward model: a run that trained one, or a Hugging Face classifier with one label.

    Args:
        path: of either. Of a classifier that is no export of ours, the objective is bradley_terry, or process if its
            readout has a bias.
        mesh: that holds its parameters.
        tokenizer: of the completions that it will score; None: not compared.
    Raises:
        ConfigError: no reward model is there, or it has another tokenizer.
    """
    check_path(path)
    is_of_run, directory = is_run(path), Path(path)
    if is_of_run and not is_reward_model(config := read_config(directory, say=False)):
        raise ConfigError(
            f"{path} is a run that trained a policy (supervised.objective={config.supervised.objective!r}), no reward "
            "model. Train one with --supervised.objective outcome or another (docs/reward_models.md)."
        )
    if not is_of_run and not has_readout(directory):
        raise ConfigError(
            f"{path} is a language model; a reward model is a sequence or token classifier with one label. Choose "
            "another directory."
        )
    if is_of_run and not (directory / FINISHED).exists():
        raise ConfigError(
            f"{path} is a reward model whose training has not ended; its scores would change. Finish it with the "
            "command that began it."
        )
    own = load_tokenizer(directory / "tokenizer" if is_of_run else directory) if tokenizer else None
    if own is not None and own.encoding_fingerprint != tokenizer.encoding_fingerprint:
        raise ConfigError(
            f"reward model {path} has another tokenizer than the policy; it scores the policy's own tokens, so both "
            "must be the same. Train a reward model on this policy's tokenizer."
        )
    if is_of_run:
        params = _policy_of_run(directory, mesh)
        return ScalarModel(
            config=config.model, params=params, objective=config.supervised.objective, steps=config.steps, name=path
        )
    model, params = load_hf(path, mesh)
    model = replace(model, activation_dtype=default_dtype(replace(model, activation_dtype="")))
    objective = "process" if len(params[READOUT]) > model.width else "bradley_terry"
    # Our exports tell which of two objectives it was.
    objective = read_json(directory / "config.json").get("rpt_objective", objective)
    return ScalarModel(config=model, params=params, objective=objective, steps=None, name=path)


def newest_of_run(path: Path, mesh: Mesh) -> tuple[TrainState, Frozen | None, int]:
    """Return (newest state of a run, base weights of its adapters, its step), from the run directory alone.

    Only adapters need the model that the run started from. Of a run without RL steps, the warm start is the newest.

    Raises:
        CheckpointError: there is no checkpoint yet, or the model that the run started from has changed.
    """
    config = read_config(path, say=False)
    has_rl = _checkpoints(path, "rpt", config).latest_step is not None
    last = "rpt" if has_rl or config.run.num_steps else "warm_start"
    if _checkpoints(path, last, config).latest_step is None:
        raise CheckpointError(
            f"{path} is a run without a checkpoint of {last}, which would hold its policy. Continue training it, or "
            "choose another run."
        )
    start = config.policy.path
    if config.lora.rank or not start or Path(start).exists():
        params = start_params(config, mesh)
        if start and read_json(path / "policy.json")["checksum"] != fingerprint(params):
            raise CheckpointError(
                f"{path} is a run that started from {start}, whose weights have changed since. Restore them, or choose "
                "another run."
            )
    else:
        # Only their shapes matter, because the checkpoint holds all weights.
        params = init_params(config.model, mesh, jax.random.key(0))
        params = jax.tree.map(lambda x: x.astype(config.policy.param_dtype), params)
    # Adapters belong to the warm-started weights.
    if last == "rpt" and config.supervised.num_steps and config.lora.rank:
        state, frozen = fresh_state(config, mesh, params, "warm_start")
        params = merge(frozen, _checkpoints(path, "warm_start", config).restore(state)[0].params)
    state, frozen = fresh_state(config, mesh, params, last)
    state, record = _checkpoints(path, last, config).restore(state)
    return state, frozen, record["step"]


def _checkpoints(path: Path, stage: str, config: Config) -> Checkpoints:
    return Checkpoints(path / "checkpoints" / stage, keep=config.checkpoint.keep, read_only=True)


def trainable(config: Config, mesh: Mesh, params) -> tuple[Any, Frozen | None]:
    """Return (trained parameters, frozen ones): a copy of `params` and None, or fresh adapters and `params`."""
    settings = config.lora
    if not settings.rank:
        # The first update donates its state, but the control and the reference still need the buffers of `params`.
        return _copied(params), None
    adapters = lora.init_adapters(config.model, settings, mesh, jax.random.key(config.run.seed + 1))
    return adapters, Frozen(params=params, scale=np.float32(settings.alpha / settings.rank))


@jax.jit
def _copied(params):
    return jax.tree.map(jnp.copy, params)


def stage_optimizer(config: Config, stage: str) -> Any:
    """Return the optimizer of a stage: warm_start, rpt or control."""
    settings, num_steps = {
        "warm_start": (config.supervised.optimizer, config.supervised.num_steps),
        "rpt": (config.optimizer, config.num_updates),
        "control": (config.supervised.control_optimizer, config.run.num_steps),
    }[stage]
    return make_optimizer(settings, num_steps)


def fresh_state(config: Config, mesh: Mesh, params, stage: str) -> tuple[TrainState, Frozen | None]:
    """Return (a stage's state at step 0, with the companions that the reward requests; its adapters' base weights)."""
    trained, frozen = trainable(config, mesh, params)
    if (stage == "rpt" and config.loss.has_critic) or (stage == "warm_start" and is_reward_model(config)):
        # Sequence classification of Hugging Face has no bias, token classification has one.
        readout = init_readout(config.model.width, has_bias=config.supervised.objective not in _OF_SEQUENCES)
        if stage == "warm_start" and len(params.get(READOUT, ())) == len(readout):
            readout = jnp.copy(params[READOUT])  # of the reward model that it starts from
        trained = trained | {READOUT: jax.device_put(readout, replicated(mesh))}
    state = init_state(trained, stage_optimizer(config, stage), mesh)
    companions = requested_policies(config.reward) & {AVERAGE} if stage == "rpt" else set()
    return with_companions(state, companions), frozen


@jax.jit
def _checksum(params):
    """Return u32 [2], sums over the bits of all parameters, each hashed with its index: the same on any mesh."""
    total = jnp.zeros(2, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
        place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) * jnp.uint32(2654435761) + number
        mixed = (bits.astype(jnp.uint32) ^ place) * jnp.uint32(2246822519)
        total = total + jnp.stack([jnp.sum(mixed), jnp.sum(mixed ^ (mixed >> 15))])
    return total


def fingerprint(params: Any) -> str:
    """Return a checksum that identifies parameters; it does not protect against deliberate collisions."""
    return "-".join(f"{int(part):08x}" for part in _checksum(params))
