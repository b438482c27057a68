"""A checked run, which its stages share. Invalid input is found here, before anything compiles."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.data.examples import Example
from rpt_jax.data.readers import check_files
from rpt_jax.data.templates import Template
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.models import lora
from rpt_jax.models.decoding import describe_attention
from rpt_jax.models.families import config_json
from rpt_jax.models.lora import Frozen
from rpt_jax.parallel.distributed import is_main, main_first
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.parallel.programs import drop_programs_if_many, use_cache
from rpt_jax.planning.fitting import sizes_of, with_sizes
from rpt_jax.rewards.base import Reward
from rpt_jax.rewards.catalog import check_rewards, learned_request, make_reward, requested_policies, requests_of
from rpt_jax.rewards.host import check_function
from rpt_jax.scoring.requests import Scorer
from rpt_jax.scoring.scalars import ScalarModel
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.domains import Domain, Source, open_domain
from rpt_jax.train.policies import (
    check_path,
    find_tokenizer,
    fingerprint,
    fresh_state,
    is_reward_model,
    load_reward_model,
    resolve,
    start_params,
    stop_sources,
)
from rpt_jax.train.progress import console
from rpt_jax.train.resume import Resume, begin_as_copy
from rpt_jax.train.run_directory import RunDirectory, read_config, read_json
from rpt_jax.types import TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run.

    Attributes:
        config: with resolved values, such as the model's shape.
        mesh: that holds parameters and batches.
        directory: of its records and checkpoints.
        tokenizer: of the policy.
        domain: kind of its tasks.
        warm_examples: examples that the warm start learns; empty without a warm start.
    """

    config: Config
    mesh: Mesh
    directory: RunDirectory
    tokenizer: Tokenizer
    domain: Domain
    warm_examples: Sequence[Example] = ()

    @property
    def template(self) -> Template:
        """Return the template of every prompt."""
        return self.domain.template

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every token id."""
        return [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]

    def checkpoints(self, stage: str, *, read_only: bool = False) -> Checkpoints:
        """Open the checkpoints of a stage: warm_start, rpt or control."""
        directory = self.directory.path / "checkpoints" / stage
        return Checkpoints(directory, keep=self.config.checkpoint.keep, read_only=read_only)

    def make_reward(self, source: Source, terms: tuple[str, ...] = ()) -> Reward:
        """Create the run's reward for tasks of the source, or that of other terms."""
        config = replace(self.config.reward, terms=terms) if terms else self.config.reward
        return make_reward(config, self.tokenizer, source.columns, self.make_scorer(), kind=self.domain.name)

    def make_scorer(self) -> Scorer:
        """Create the scorer of the run's requests."""
        header, temperature = len(self.template.header), self.config.rollout.temperature
        return Scorer(
            self.config.model, self.tokenizer, header, _at_once(self.config), temperature, self.reward_models,
            self.config.steps,
        )  # fmt: skip

    @cached_property
    def reward_models(self) -> dict[str, ScalarModel]:
        """Return the reward models that the terms of the reward name, loaded once.

        Raises:
            ConfigError: a path is no reward model, or one of another tokenizer.
        """
        settings, found = self.config.reward.models, {}
        for name, path in model_paths(self.config).items():
            found[name] = model = load_reward_model(path, self.mesh, self.tokenizer)
            check_slot(name, model, settings.aggregation)
        if found and not self.directory.is_read_only:
            # A reward must not change under a run that resumes.
            self.directory.remember("reward_models", {name: fingerprint(m.params) for name, m in found.items()})
        return found

    @cached_property
    def learned_width(self) -> int:
        """Return the length of update rows that end with a reference to learn; 0: rows are completions."""
        request, limit = (
            learned_request(self.config.reward, self.domain.name),
            self.config.rollout.max_completion_tokens,
        )
        return self.make_scorer().row_width(request, limit, self.domain.num_reference) if request else 0

    def start_params(self) -> Any:
        """Return the policy's parameters before any training.

        Raises:
            CheckpointError: the weights of policy.path are not those that the run was made with.
        """
        params = start_params(self.config, self.mesh)
        if self.config.policy.path:
            # Adapters, warm starts and references are valid only with the weights that they were made with.
            self.directory.remember("policy", {"path": self.config.policy.path, "checksum": fingerprint(params)})
        return params


def model_paths(config: Config) -> dict[str, str]:
    """Return {name in requests: path} of the reward models that the terms of the reward need."""
    settings, asked = config.reward.models, requested_policies(config.reward)
    paths = {"reward_model": settings.path, "process_model": settings.process_path}
    return {name: path for name, path in paths.items() if name in asked}


def check_slot(name: str, model: ScalarModel, aggregation: str) -> None:
    """Raise ConfigError if a model does not score what a reward reads."""
    fitting = ("process", "value") if name == "process_model" else ("bradley_terry", "outcome", "value")
    if model.objective not in fitting:
        raise ConfigError(
            f"{model.name} is a model of objective {model.objective!r}, which the reward {name} cannot read: it needs "
            f"{' or '.join(fitting)}. Choose another model, or the other reward."
        )
    if name == "process_model" and model.objective == "value" and aggregation == "prod":
        raise ConfigError(
            f"reward.models.aggregation='prod' with the value model {model.name}, whose values may be negative. Set "
            "--reward.models.aggregation min, mean or last."
        )


def _at_once(config: Config):
    """Return U -> trunks per scoring pass: the most that U and the mesh allow, up to an update's microbatch."""

    def number(U: int) -> int:
        limit, shards = config.microbatch_trunks if config.mesh.microbatch_trunks else U, config.mesh.trunk_shards
        return max(n for n in range(shards, U + 1, shards) if U % n == 0 and n <= max(limit, shards))

    return number


def prepare(config: Config, *, read_only: bool = False, judges: bool = False) -> Run:
    """Read and check a run's input; nothing compiles here.

    Args:
        config: of the run.
        read_only: write nothing, because the run exists and may be active elsewhere.
        judges: the run's policy is judged, possibly with other settings and on other data than it was trained with;
            needs read_only.
    Raises:
        ConfigError, DataError, CheckpointError: see the modules that read the input.
    """
    config.validate()
    check_rewards(config)
    drop_programs_if_many()
    use_cache(config.run.compilation_cache)
    mesh, path = make_mesh(config.mesh), Path(config.run.directory)
    own = _config_of(path, say=not read_only)
    if own is not None:
        # A preset may leave open what it set when the run began.
        config = with_sizes(config, sizes_of(own))
        if not read_only:
            _check_steps(config)
    else:
        check_path(config.policy.path)
        # A cache may hold what the files held, and a reward model needs no texts.
        if not (config.data.cache or is_reward_model(config)):
            check_files(config)
    kept = own or _config_of(Resume.parse(config.run.resume).source, say=True)
    tokenizer = find_tokenizer(config)
    started = _start_of(path, Resume.parse(config.run.resume).source)
    # A chat template may write the date into every prompt: it is that of the run's first start.
    tokenizer.chat_date = started
    sources = {} if own is not None else stop_sources(config, tokenizer)
    asked_dtype = config.model.activation_dtype
    config = resolve(config, tokenizer, kept)
    check_model(config, mesh)
    with main_first("corpus"):
        domain = open_domain(config, tokenizer)
    if config.reward.function:
        check_function(config.reward, domain.example_columns(config, tokenizer))
    for name, path in model_paths(config).items():
        check_path(path, f"reward.models.{'path' if name == 'reward_model' else 'process_path'}")
    check_positions(config, domain.template, _longest_row(config, domain, tokenizer))
    examples = domain.warm_examples(config, tokenizer) if config.supervised.num_steps and not judges else ()
    identity = domain.identity | {
        "tokenizer": {"sha256": tokenizer.fingerprint},
        "template": {"sha256": domain.template.fingerprint},
    }
    begin_as_copy(config, identity)
    directory = RunDirectory(config, identity, read_only=read_only, judges=judges)
    run = Run(config=config, mesh=mesh, directory=directory, tokenizer=tokenizer, domain=domain, warm_examples=examples)
    if config.reward.function and not read_only:
        _note_function(directory, config.reward.function)
    if config.data.chat:
        directory.remember("chat", {"started": started.isoformat()})
    if kept is None and not read_only:
        if not asked_dtype:
            console.print(f"model.activation_dtype is {config.model.activation_dtype}: the default of this platform")
        console.print(f"attention: {describe_attention(config.model)}")
        directory.remember("stop_ids", {str(i): names for i, names in sources.items()})
        ends = (f"{i} {tokenizer.entry(i)!r} ({', '.join(names)})" for i, names in sources.items())
        console.print(f"a completion stops at {'; '.join(ends)}", highlight=False)
    if not read_only:
        if config.run.resume.isdigit():
            Checkpoints(
                directory.path / "checkpoints" / "rpt", keep=config.checkpoint.keep, step=int(config.run.resume)
            )
        if is_main():
            tokenizer.save(directory.path / "tokenizer")
    return run


def _note_function(directory: RunDirectory, function: str) -> None:
    """Keep the checksum of a reward function's file, and say so if the file has changed since the run began."""
    file = Path(function.rpartition(":")[0])
    if file.suffix != ".py" or not file.exists():
        return
    found, kept = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}, directory.path / "reward_function.json"
    if kept.exists() and read_json(kept) != found:
        console.print(f"{file} has changed since the run last started; earlier steps used the old reward")
    directory.keep("reward_function", found)


def _check_steps(config: Config) -> None:
    """Refuse fewer steps than the run has done, before its config is written.

    Raises:
        CheckpointError: names the steps; going back needs run.resume.
    """
    checkpoints = Checkpoints(Path(config.run.directory) / "checkpoints" / "rpt", keep=1, read_only=True)
    done, wanted = checkpoints.latest_step or 0, config.run.num_steps
    if config.run.resume == "latest" and wanted < done:
        raise CheckpointError(
            f"rpt has done {done} steps; run.num_steps={wanted} must be at least that. Raise --run.num-steps, or go "
            f"back with --run.resume {wanted}."
        )


def _start_of(*directories: Path | None) -> datetime:
    """Return the time at which the run, or the run that it copies, rendered its first prompt; now for a new run."""
    for directory in directories:
        if directory is not None and (directory / "chat.json").exists():
            return datetime.fromisoformat(read_json(directory / "chat.json")["started"])
    return datetime.now()


def _config_of(path: Path | None, *, say: bool) -> Config | None:
    """Return the config of the run at `path`; None if there is none."""
    return read_config(path, say=say) if path and (path / "config.json").exists() else None


def check_model(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if the model cannot be trained with these settings, or cannot be exported afterwards."""
    lora.check_targets(config.model, config.lora)
    if config.model.activation_dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            "model.activation_dtype='bfloat16' on a CPU, whose compiler lacks bfloat16 products. Use float32 there."
        )
    if config.policy.param_dtype == "bfloat16" and not config.lora.rank:
        raise ConfigError(
            "policy.param_dtype='bfloat16' without adapters: most updates are smaller than the spacing of bfloat16 and "
            "would be lost. Use float32, or set --lora.rank."
        )
    config_json(config.model, "float32", {})


def check_positions(config: Config, template: Template, num_tokens: int) -> None:
    """Raise ConfigError if a prompt and a row of `num_tokens` behind it need more positions than the model has."""
    longest, limit = config.data.trunk_length + template.width + num_tokens, config.rollout.max_completion_tokens
    scored = f" and {num_tokens - limit} that the reward scores" if num_tokens > limit else ""
    if longest > config.model.max_positions:
        raise ConfigError(
            f"data.trunk_length={config.data.trunk_length}, a tail of {template.width}, rollout.max_completion_tokens="
            f"{limit}{scored} make {longest} positions; the model has {config.model.max_positions}. Lower one of the "
            "two settings."
        )


def _longest_row(config: Config, domain: Domain, tokenizer: Tokenizer) -> int:
    """Return the number of tokens of the longest row behind a prompt: a completion, or one with what is scored."""
    scorer, limit = Scorer(config.model, tokenizer, len(domain.template.header)), config.rollout.max_completion_tokens
    requests = requests_of(config.reward, domain.name)
    return max([limit, *(scorer.row_width(request, limit, domain.num_reference) for request in requests)])


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy to evaluate without a run.

    Attributes:
        config: with resolved values, such as the model's shape.
        mesh: that holds the parameters.
        tokenizer: of the policy.
        params: parameters of the policy.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    params: Any


def load_policy(config: Config, template_of) -> LoadedPolicy:
    """Load the model and tokenizer that the config names, to evaluate them without a run.

    Args:
        config: names the model and the tokenizer.
        template_of: (tokenizer, resolved config) -> Template whose prompts must fit.
    Raises:
        ConfigError: prompts do not fit, or see `resolve`.
    """
    check_path(config.policy.path)
    use_cache(config.run.compilation_cache)
    mesh, tokenizer = make_mesh(config.mesh), find_tokenizer(config)
    config = resolve(config, tokenizer)
    check_positions(config, template_of(tokenizer, config), config.rollout.max_completion_tokens)
    return LoadedPolicy(config=config, mesh=mesh, tokenizer=tokenizer, params=start_params(config, mesh))


def newest_state(run: Run, params) -> tuple[TrainState, Frozen | None, int]:
    """Return (state of the newest RL checkpoint, base weights of its adapters, its step).

    Args:
        run: the run.
        params: that RL started from; with adapters their values are used, otherwise only their shapes.
    Raises:
        CheckpointError: there is no RL checkpoint.
    """
    checkpoints = run.checkpoints("rpt", read_only=True)
    if checkpoints.latest_step is None:
        raise CheckpointError(
            f"{run.directory.path} has no checkpoint of RPT yet. Continue training, or choose another --run."
        )
    like, frozen = fresh_state(run.config, run.mesh, params, "rpt")
    state, record = checkpoints.restore(like)
    return state, frozen, record["step"]
