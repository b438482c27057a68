"""The stages of a run, in order, each leaving its result in the run directory.

corpus or questions -> policy -> warm start -> tasks -> RL -> control. A finished stage is not run again, an
interrupted one goes on from its newest checkpoint. Everything that can be wrong with the input is found in `prepare`,
before anything compiles.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpt_jax.config import Config, OptimizerConfig
from rpt_jax.data import documents as documents_lib
from rpt_jax.data.batches import Source, TrainIterator, make_source
from rpt_jax.data.documents import Document
from rpt_jax.data.positions import (
    UNSCORED_SELECTORS,
    PositionTable,
    Proxy,
    ScoredCorpus,
    Windows,
    parts_key,
    select_from_corpus,
)
from rpt_jax.data.questions import (
    Question,
    QuestionSource,
    make_question_source,
    make_question_template,
    read_questions,
)
from rpt_jax.data.readers import Corpus, read_texts, training_corpora
from rpt_jax.data.templates import Template, make_template, token_facts
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.evals.next_token import Evaluator, difficulty_splits
from rpt_jax.evals.questions import QuestionEvaluator, category_splits
from rpt_jax.models import lora
from rpt_jax.models.decoder import init_params
from rpt_jax.models.families import config_json, read_config
from rpt_jax.models.hf import load_hf
from rpt_jax.models.lora import Frozen, join, merge
from rpt_jax.parallel.distributed import from_main, is_main, main_first
from rpt_jax.parallel.interruption import check_alone
from rpt_jax.parallel.mesh import local_trunks, make_mesh
from rpt_jax.rewards.host import check_function
from rpt_jax.rewards.reward import JUDGES, Reward, make_reward
from rpt_jax.rl.update import init_state, make_optimizer
from rpt_jax.tokenizer import Tokenizer, load_tokenizer, train_byte_level
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.compute import fingerprint
from rpt_jax.train.loop import train
from rpt_jax.train.metrics import RunDirectory, console, progress_bar, read_records
from rpt_jax.train.resume import begin_as_copy
from rpt_jax.train.supervised import Example, document_examples, draft_examples, read_examples, train_supervised
from rpt_jax.train.trainer import Trainer
from rpt_jax.types import TrainState

# Documents that a tokenizer is trained on, at most, in characters.
_TOKENIZER_CHARACTERS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked run: what the stages share. `config` has the model's shape filled in.

    Documents are empty where the tasks are questions, and the other way round.
    """

    config: Config
    mesh: Any
    run: RunDirectory
    tokenizer: Tokenizer
    template: Template
    train_documents: Sequence[Document] = ()
    heldout_documents: Sequence[Document] = ()
    corpus_weights: tuple[float, ...] = (1.0,)
    train_questions: QuestionSource | None = None
    heldout_questions: QuestionSource | None = None
    warm_examples: Sequence[Example] = ()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        return [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]

    @property
    def windows(self) -> Windows:
        data = self.config.data
        return Windows(
            window=data.trunk_length - len(self.template.header),
            stride=data.window_stride,
            continuation_tokens=data.continuation_tokens,
            min_context_tokens=self.config.positions.min_context_tokens,
        )

    @property
    def cache(self) -> Path:
        return cache_directory(self.config)

    def checkpoints(self, stage: str, *, read_only: bool = False) -> Checkpoints:
        return Checkpoints(self.run.path / "checkpoints" / stage, keep=self.config.checkpoint.keep, read_only=read_only)


def cache_directory(config: Config) -> Path:
    return Path(config.data.cache or config.run.directory)


def prepare(config: Config, *, read_only: bool = False) -> Prepared:
    """Read and check everything; nothing compiles here.

    Args:
        read_only: an existing run, which may be going on elsewhere and is not written to.
    Raises:
        ConfigError, DataError, CheckpointError: see the modules that do the reading.
    """
    config.validate()
    mesh = make_mesh(config.mesh)
    tokenizer = find_tokenizer(config)
    config = resolve_model(config, tokenizer)
    lora.check_targets(config.model, config.lora)
    if config.model.activation_dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            "model.activation_dtype='bfloat16' on a CPU, whose compiler lacks these products. Use float32 there."
        )
    if config.policy.param_dtype == "bfloat16" and not config.lora.rank:
        raise ConfigError(
            "policy.param_dtype='bfloat16' without adapters: most updates are smaller than the spacing of bfloat16 and "
            "would be lost. Use float32, or --lora.rank."
        )
    if config.reward.function:
        check_function(config.reward.function)
    config_json(config.model, "float32", {})  # a model that no family can hold could not be exported in the end
    with main_first("corpus"):
        prepare_tasks = _prepare_questions if config.questions.path else _prepare_documents
        tasks = prepare_tasks(config, tokenizer)
    template = tasks["template"]
    _check_positions(config, template)
    if config.supervised.num_steps:
        tasks["warm_examples"] = _warm_examples(config, tokenizer, template, tasks.get("train_documents", ()))
    # The template too: a chat template may write the day's date into every prompt.
    identity = tasks.pop("identity") | {
        "tokenizer": {"sha256": tokenizer.fingerprint},
        "template": {"sha256": template.fingerprint},
    }
    begin_as_copy(config, identity)
    run = RunDirectory(config, identity, read_only=read_only)
    if read_only:
        return Prepared(config=config, mesh=mesh, run=run, tokenizer=tokenizer, **tasks)
    if config.run.resume.isdigit():
        Checkpoints(run.path / "checkpoints" / "rpt", keep=config.checkpoint.keep, step=int(config.run.resume))
    if is_main():
        tokenizer.save(run.path / "tokenizer")
    return Prepared(config=config, mesh=mesh, run=run, tokenizer=tokenizer, **tasks)


def find_tokenizer(config: Config) -> Tokenizer:
    """data.tokenizer; else that of policy.path; else the run's own, trained on its documents."""
    if config.data.tokenizer or config.policy.path:
        return load_tokenizer(config.data.tokenizer or config.policy.path)
    own = Path(config.run.directory) / "tokenizer"
    if (own / "tokenizer.json").exists():
        return load_tokenizer(own)
    if config.questions.path:
        raise ConfigError("questions.path without a tokenizer; questions train none. Set --data.tokenizer.")

    def texts():
        left = _TOKENIZER_CHARACTERS
        for corpus in training_corpora(config.data):
            for text in read_texts(corpus.path, text_template=corpus.text_template):
                yield text.text
                left -= len(text.text)
                if left < 0:
                    return

    return train_byte_level(texts(), config.data.tokenizer_vocab_size)


def resolve_model(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with its model section filled in: the checkpoint's, or a vocabulary entry for every id."""
    model = config.model
    if config.policy.path:
        shape = read_config(config.policy.path)
        model = replace(shape, activation_dtype=model.activation_dtype, remat=model.remat, platform=model.platform)
    size, shards = model.vocab_size, config.mesh.tensor
    if size and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size}; the tokenizer has {tokenizer.vocab_size} ids and each needs an entry. "
            "Raise --model.vocab-size, use 0, or give the tokenizer that belongs to the checkpoint."
        )
    config = replace(config, model=replace(model, vocab_size=size or -(-tokenizer.vocab_size // shards) * shards))
    config.validate()
    return config


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A Hugging Face model to judge, without a run around it."""

    config: Config
    mesh: Any
    tokenizer: Tokenizer
    params: Any


def load_policy(config: Config) -> LoadedPolicy:
    """The model and tokenizer that the config names."""
    mesh, tokenizer = make_mesh(config.mesh), find_tokenizer(config)
    config = resolve_model(config, tokenizer)
    _check_positions(config, make_question_template(tokenizer, config.questions, config.data))
    _, params = load_hf(config.policy.path, mesh, dtype=config.policy.param_dtype)
    return LoadedPolicy(config=config, mesh=mesh, tokenizer=tokenizer, params=params)


def _check_positions(config: Config, template: Template) -> None:
    longest = config.data.trunk_length + len(template.tail) + config.rollout.max_completion_tokens
    if longest > config.model.max_positions:
        raise ConfigError(
            f"data.trunk_length={config.data.trunk_length}, a tail of {len(template.tail)} and "
            f"rollout.max_completion_tokens={config.rollout.max_completion_tokens} make {longest} positions; the model "
            f"has {config.model.max_positions}. Lower one of the two."
        )


def open_questions(questions: str | list[Question], where: str, config: Config, tokenizer: Tokenizer) -> QuestionSource:
    """Questions of a path, or these ones, as tasks; says how many cannot be asked."""
    found = read_questions(questions) if isinstance(questions, str) else questions
    source, left_out = make_question_source(found, tokenizer, config.questions, config.data)
    for reason, count in left_out.items():
        if count:
            console.print(f"{count} of {len(found)} {where} questions {reason}; left out")
    return source


def _prepare_questions(config: Config, tokenizer: Tokenizer) -> dict:
    if config.rollout.prompts_per_trunk != 1:
        raise ConfigError(
            f"rollout.prompts_per_trunk={config.rollout.prompts_per_trunk}; a question is a trunk of its own. "
            "Set --rollout.prompts-per-trunk 1."
        )
    training = read_questions(config.questions.path)
    if config.questions.heldout_path:
        heldout = read_questions(config.questions.heldout_path)
    else:
        cut = min(len(training) - 1, max(1, round(len(training) * (1 - config.data.heldout_fraction))))
        training, heldout = training[:cut], training[cut:]
    if not training:
        raise ConfigError("one question leaves none to hold out. Set --questions.heldout-path, or give more questions.")
    sources = {
        where: open_questions(found, where, config, tokenizer)
        for where, found in (("training", training), ("held-out", heldout[: config.eval.max_documents]))
    }
    return dict(
        template=make_question_template(tokenizer, config.questions, config.data),
        train_questions=sources["training"],
        heldout_questions=sources["held-out"],
        identity={where: source.identity for where, source in sources.items()},
    )


def _check_proxy(config: Config, tokenizer: Tokenizer) -> None:
    path = config.proxy.path
    if not path:
        return
    model = read_config(path)
    if load_tokenizer(path).encoding_fingerprint != tokenizer.encoding_fingerprint:
        raise ConfigError(
            f"the tokenizer in proxy.path={path!r} is not the policy's; positions are token indices, so both must "
            "share one. Choose a proxy of the same family."
        )
    if config.data.trunk_length + 2 > model.max_positions:
        raise ConfigError(
            f"the proxy has {model.max_positions} positions; data.trunk_length={config.data.trunk_length} does not "
            "fit. Lower it, or choose another proxy."
        )


def _prepare_documents(config: Config, tokenizer: Tokenizer) -> dict:
    if config.reward.name in JUDGES:
        raise ConfigError(
            f"reward.name={config.reward.name!r} needs questions. Set --questions.path, or --reward.name prefix."
        )
    _check_proxy(config, tokenizer)
    template = make_template(tokenizer, config.data)
    least = config.data.trunk_length - len(template.header) - config.data.window_stride + 1
    if least < config.positions.min_context_tokens:
        raise ConfigError(
            f"data.window_stride={config.data.window_stride} leaves a position as few as {least} tokens of context in "
            f"its window; positions.min_context_tokens={config.positions.min_context_tokens}. Lower the stride."
        )
    corpora = training_corpora(config.data)
    open_documents = partial(
        documents_lib.open_documents,
        tokenizer=tokenizer,
        cache=cache_directory(config),
        progress=partial(_counted, "tokenising"),
    )
    training = open_documents(corpora)
    if config.data.heldout_path:
        heldout = open_documents([Corpus(path=config.data.heldout_path, text_template=config.data.text_template)])
    else:
        training, heldout = documents_lib.split_heldout(training, config.data.heldout_fraction, tokenizer)
    heldout = documents_lib.first(heldout, config.eval.max_documents)
    for where, found in (("training", training), ("held-out", heldout)):
        short = documents_lib.check_lengths(found, config.positions.min_context_tokens, where)
        if short:
            console.print(f"{short} of {len(found)} {where} documents are too short to hold a position")
    return dict(
        template=template,
        train_documents=training,
        heldout_documents=heldout,
        corpus_weights=tuple(c.weight for c in corpora),
        identity={"training": _identity(training), "held-out": _identity(heldout)},
    )


def _identity(documents: Sequence[Document]) -> dict:
    return {
        "documents": len(documents),
        "tokens": int(documents_lib.lengths_of(documents).sum()),
        "sha256": documents_lib.view_fingerprint(documents),
    }


def _warm_examples(config: Config, tokenizer: Tokenizer, template: Template, documents) -> Sequence[Example]:
    supervised = config.supervised
    if supervised.path:
        return read_examples(supervised.path, tokenizer, template, config)
    if not documents:
        raise ConfigError("a warm start on questions needs their solutions. Set --supervised.path to a file of them.")
    # Beside drafts, plain text weighs like their contexts, or it would drown their few tokens.
    weight = supervised.context_weight if supervised.draft_fraction else 1.0
    plain = document_examples(documents, tokenizer, config.data.trunk_length, weight=weight)
    if not supervised.draft_fraction:
        return plain
    # No more than the warm start can use: of a large corpus only a part is ever seen.
    plain = plain.sample(supervised.num_steps * supervised.batch_size)
    drafts = draft_examples(documents, tokenizer, template, config, len(plain))
    console.print(f"warm start: {len(plain):,} plain sequences, {len(drafts):,} drafts")
    return [*plain, *drafts]


def start_params(p: Prepared) -> Any:
    """The policy's parameters before any training: from policy.path, or random."""
    config = p.config
    if config.policy.path:
        _, params = load_hf(config.policy.path, p.mesh, dtype=config.policy.param_dtype)
        # Adapters, warm starts and references are only good on the weights that they were made with.
        p.run.remember("policy", {"path": config.policy.path, "checksum": fingerprint(params)})
        return params
    params = init_params(config.model, p.mesh, jax.random.key(config.run.seed))
    return jax.tree.map(lambda x: x.astype(config.policy.param_dtype), params)


def trainable(p: Prepared, params) -> tuple[Any, Frozen | None]:
    """(what a stage trains, what stays beside it): a copy of the parameters, or fresh adapters on the parameters."""
    settings = p.config.lora
    if not settings.rank:
        # The first update donates its state: keep the start's own buffers for the control and the reference.
        return jax.tree.map(lambda x: x.copy(), params), None
    adapters = lora.init_adapters(p.config.model, settings, p.mesh, jax.random.key(p.config.run.seed + 1))
    return adapters, Frozen(params=params, scale=np.float32(settings.alpha / settings.rank))


def warm_start(p: Prepared) -> Any:
    """Parameters that RL and the control start from: the policy's, after supervised.num_steps of training."""
    config = p.config
    params = start_params(p)
    if not config.supervised.num_steps:
        return params
    optimizer = make_optimizer(config.supervised.optimizer, config.supervised.num_steps)
    trained, frozen = trainable(p, params)
    state = init_state(trained, optimizer, p.mesh)
    finished = p.checkpoints("warm_start", read_only=True)
    if finished.latest_step == config.supervised.num_steps:
        state, _ = finished.restore(state)
        return merge(frozen, state.params)
    with p.checkpoints("warm_start") as checkpoints:
        state, _ = train_supervised(
            "warm_start",
            config,
            state,
            optimizer,
            p.mesh,
            p.warm_examples,
            frozen=frozen,
            tail=p.template.tail,
            shuffle=not config.supervised.path,
            num_steps=config.supervised.num_steps,
            max_flops=None,
            run=p.run,
            checkpoints=checkpoints,
        )
    return merge(frozen, state.params)


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What RL trains and is judged on."""

    training: Source
    ids: np.ndarray
    """Tasks of `training` to train on."""
    heldout: Source
    corpora: np.ndarray | None = None
    """Part of the mixture of each trunk; None: there is one part."""


def choose_tasks(p: Prepared, params) -> Tasks:
    """Questions, or the positions that the proxy's entropy selects; `params` is the policy that RL starts from."""
    if p.train_questions is not None:
        return Tasks(
            training=p.train_questions, ids=np.arange(len(p.train_questions.questions)), heldout=p.heldout_questions
        )
    proxy, identity = load_proxy(p, params)
    corpus = training_positions(p, proxy, identity)
    selected = select_from_corpus(corpus, p.config.positions, seed=p.config.run.seed).table
    source = _source(p, corpus.documents, selected)
    ids, corpora = np.arange(len(selected)), None
    if len(p.corpus_weights) > 1:
        trunks = source.group(ids, p.config.rollout.prompts_per_trunk)
        corpora = corpus.documents.corpora[selected.document[trunks.ids[trunks.ends - 1]]]
    return Tasks(training=source, ids=ids, heldout=_heldout(p, proxy, identity), corpora=corpora)


def heldout_tasks(p: Prepared, params) -> Source:
    """What a policy is judged on; `params` is the policy that RL started from."""
    if p.heldout_questions is not None:
        return p.heldout_questions
    return _heldout(p, *load_proxy(p, params))


def _heldout(p: Prepared, proxy: Proxy, identity: str) -> Source:
    parts = list(scored_corpus(p, p.heldout_documents, proxy, identity, always=True))
    return _source(p, p.heldout_documents, PositionTable.concatenate(parts))


def _source(p: Prepared, documents: Sequence[Document], table: PositionTable) -> Source:
    data = p.config.data
    return make_source(
        documents,
        table,
        p.template,
        p.token_bytes,
        trunk_length=data.trunk_length,
        stride=data.window_stride,
        continuation_tokens=data.continuation_tokens,
    )


def training_positions(p: Prepared, proxy: Proxy, identity: str) -> ScoredCorpus:
    """Positions of the training documents that may be chosen."""
    training = p.train_documents
    if p.config.positions.max_documents:
        training = documents_lib.first(training, p.config.positions.max_documents)
    return scored_corpus(p, training, proxy, identity)


def load_proxy(p: Prepared, params) -> tuple[Proxy, str]:
    """The model that scores positions, and its fingerprint."""
    model, path = p.config.model, p.config.proxy.path
    if path:
        model = replace(read_config(path), activation_dtype=model.activation_dtype)
        _, params = load_hf(path, p.mesh)
        p.run.remember("proxy", {"path": path, "checksum": fingerprint(params)})
    proxy = Proxy(
        config=model,
        params=params,
        mesh=p.mesh,
        bos_id=p.tokenizer.bos_id,
        batch_trunks=p.config.eval.batch_trunks,
        renormalize=p.config.positions.renormalize,
    )
    # Not how it is computed, which another machine may do in another way.
    return proxy, f"{replace(model, remat=True, platform='')}{fingerprint(params)}"


def scored_corpus(p: Prepared, documents, proxy: Proxy, identity: str, *, always: bool = False) -> ScoredCorpus:
    """Positions of the documents; without scores where the selector needs none, unless `always`."""
    name = documents_lib.view_fingerprint(documents)
    settings = p.config.positions.renormalize, p.config.reward.boxed_mode
    key = parts_key(name, p.tokenizer.fingerprint, identity, p.windows, settings)
    is_scored = always or p.config.positions.selector not in UNSCORED_SELECTORS
    return ScoredCorpus(
        documents=documents,
        lengths=documents_lib.lengths_of(documents),
        facts=token_facts(p.token_bytes, boxed_mode=p.config.reward.boxed_mode),
        windows=p.windows,
        proxy=proxy if is_scored else None,
        directory=p.cache / key,
        progress=_tracked,
    )


def _tracked(description: str, batches: Iterable) -> Iterable:
    batches = list(batches)
    with progress_bar(description, len(batches)) as progress:
        for number, batch in enumerate(batches, start=1):
            yield batch
            progress(number)


def _counted(description: str, items: Iterable) -> Iterable:
    """Passes items on and shows how many there were; their total is not known."""
    with progress_bar(description, None) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            check_alone()
            if number % 100 == 0:
                progress(number)


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Evaluates at the loop's request and logs the figures; the first and last evaluation use more tasks."""

    prepared: Prepared
    source: Source

    def __call__(self, step: int, params, flops: float) -> None:
        is_end = step in (0, self.prepared.config.run.num_steps)
        self.prepared.run.log("evaluation", step, {"flops": flops} | self.evaluate(params, thinking=True, final=is_end))

    def evaluate(self, params, *, thinking: bool, final: bool) -> dict[str, dict]:
        """{"splits": figures per split, on eval.num_positions tasks of each}.

        Args:
            final: "splits" are on eval.final_num_positions; the others, of which a curve over steps is made, are
                beside them as "curve".
        """
        p, settings = self.prepared, self.prepared.config.eval
        limits = {"splits": settings.num_positions}
        if final:
            limits = {"splits": settings.final_num_positions, "curve": settings.num_positions}
        chosen = {which: self._splits(limit) for which, limit in limits.items()}
        splits = {(which, name): ids for which, of in chosen.items() for name, ids in of.items()}
        if isinstance(self.source, QuestionSource):
            evaluator = QuestionEvaluator(
                config=p.config,
                mesh=p.mesh,
                tokenizer=p.tokenizer,
                source=self.source,
                splits=splits,
                reward=self._rewards[p.config.reward.name],
            )
        else:
            evaluator = Evaluator(
                config=p.config,
                mesh=p.mesh,
                tokenizer=p.tokenizer,
                source=self.source,
                splits=splits,
                rewards=self._rewards,
            )
        figures = evaluator.evaluate(params, thinking=thinking)
        return {which: {name: cells for (w, name), cells in figures.items() if w == which} for which in limits}

    def _splits(self, limit: int) -> dict[str, np.ndarray]:
        """Name -> tasks, at most `limit` of each; a smaller limit's are among a larger one's."""
        p, seed = self.prepared, self.prepared.config.run.seed
        if isinstance(self.source, QuestionSource):
            return category_splits(self.source.questions, limit, seed=seed)
        thresholds = p.config.positions.difficulty_thresholds
        return difficulty_splits(self.source.table, p.heldout_documents, thresholds, limit, seed=seed)

    @cached_property
    def _rewards(self) -> dict[str, Reward]:
        """Made once: every new one would compile anew, or start processes anew."""
        p, names = self.prepared, ("prefix", "first_token")
        if isinstance(self.source, QuestionSource):
            names = (p.config.reward.name,)
        return {
            name: make_reward(replace(p.config.reward, name=name), p.tokenizer, self.source.columns) for name in names
        }


def run_rl(p: Prepared, params, tasks: Tasks, evaluations, *, stop_at_step=None) -> float:
    """Reinforcement learning from `params` on the chosen tasks; its FLOPs. The result is the run's checkpoints."""
    config = p.config
    is_banded = config.positions.selector == "pass_rate_band" and not config.questions.path
    iterator = TrainIterator(
        tasks.training,
        tasks.ids,
        num_trunks=config.rollout.num_trunks,
        prompts_per_trunk=config.rollout.prompts_per_trunk,
        group_size=config.rollout.group_size,
        seed=config.run.seed,
        corpora=tasks.corpora,
        weights=p.corpus_weights,
        band=config.positions.pass_rate_band if is_banded else None,
        rows=local_trunks(p.mesh, config.rollout.num_trunks),
    )
    trainer, state = make_trainer(p, params, tasks.training)
    checkpoints = p.checkpoints("rpt")
    with checkpoints:
        _, flops = train(trainer, state, iterator, p.run, checkpoints, evaluations, stop_at_step=stop_at_step)
    return flops


def make_trainer(p: Prepared, params, source: Source) -> tuple[Trainer, TrainState]:
    """The trainer of the RL stage and its state at step 0."""
    config = p.config
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    trained, frozen = trainable(p, params)
    trainer = Trainer(
        config=config,
        mesh=p.mesh,
        tokenizer=p.tokenizer,
        header_length=len(p.template.header),
        reward=make_reward(config.reward, p.tokenizer, source.columns),
        optimizer=optimizer,
        columns=source.columns,
        frozen=frozen,
        # With adapters these are the very arrays under them: the adapter switched off.
        reference=params if config.loss.kl_coef else None,
    )
    return trainer, init_state(trained, optimizer, p.mesh)


def newest_state(p: Prepared) -> tuple[TrainState, Frozen | None, int]:
    """(state of the newest RL checkpoint, what its adapters sit on, its step).

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = p.checkpoints("rpt", read_only=True)
    if checkpoints.latest_step is None:
        raise CheckpointError(f"{p.run.path} has no checkpoint of RPT yet. Train on, or name another --run.")
    # The shapes are all that the warm start's result is needed for, but adapters sit on its very values.
    trained, frozen = trainable(p, warm_start(p))
    like = init_state(trained, make_optimizer(p.config.optimizer, p.config.num_updates), p.mesh)
    state, record = checkpoints.restore(like)
    return state, frozen, record["step"]


def continue_supervised(
    p: Prepared,
    params,
    sequences: Sequence[Example],
    optimizer_config: OptimizerConfig,
    max_flops: float,
    *,
    run: RunDirectory | None = None,
    checkpoints: Checkpoints | None = None,
    on_step=lambda *_: None,
) -> Any:
    """Parameters after supervised training from `params` until `max_flops` are spent: what a control is."""
    optimizer = make_optimizer(optimizer_config, p.config.run.num_steps)
    trained, frozen = trainable(p, params)
    state, _ = train_supervised(
        "control",
        p.config,
        init_state(trained, optimizer, p.mesh),
        optimizer,
        p.mesh,
        sequences,
        frozen=frozen,
        tail=p.template.tail,
        shuffle=True,
        num_steps=None,
        max_flops=max_flops,
        run=run,
        checkpoints=checkpoints,
        on_step=lambda step, state, flops: on_step(step, join(frozen, state.params), flops),
    )
    return join(frozen, state.params)


def run_control(p: Prepared, params, max_flops: float, evaluations: Evaluations, *, num_evaluations: int = 5) -> None:
    """Next-token training on the training documents at matched compute, evaluated on the way and at the end."""
    evaluated = [r for r in read_records(p.run.path) if r["stage"] == "control_evaluation"]
    # Where the run went on for longer than its control, so does the control.
    if from_main(any(r.get("final") and r["flops"] >= max_flops for r in evaluated)):
        return
    sequences = document_examples(p.train_documents, p.tokenizer, p.config.data.trunk_length)
    checkpoints = p.checkpoints("control")
    done = (checkpoints.latest_step or 0) - 1
    p.run.cut_metrics("control_evaluation", done)
    marks = np.linspace(0, max_flops, num_evaluations + 1)[1:-1]
    reached = max((r["flops"] for r in evaluated if r["step"] <= done), default=0.0)
    num_passed = from_main(int((marks <= reached).sum()))
    last = [0, 0.0]

    def on_step(step: int, params, flops: float) -> None:
        nonlocal num_passed
        last[:] = step, flops
        if (marks <= flops).sum() > num_passed:
            num_passed = (marks <= flops).sum()
            figures = evaluations.evaluate(params, thinking=False, final=False)
            p.run.log("control_evaluation", step, {"flops": flops} | figures)

    with checkpoints:
        trained = continue_supervised(
            p,
            params,
            sequences,
            p.config.supervised.control_optimizer,
            max_flops,
            run=p.run,
            checkpoints=checkpoints,
            on_step=on_step,
        )
    figures = evaluations.evaluate(trained, thinking=True, final=True)
    p.run.log("control_evaluation", last[0], {"flops": last[1], "final": True} | figures)
