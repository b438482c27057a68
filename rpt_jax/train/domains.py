"""Task domains: positions of documents, or questions. Training stages use both through `Domain`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rpt_jax.config import Config
from rpt_jax.data import documents as documents_lib
from rpt_jax.data.batches import Source, make_source
from rpt_jax.data.documents import Document
from rpt_jax.data.examples import Example, document_examples, draft_examples, read_examples
from rpt_jax.data.graded import Graded, read_graded
from rpt_jax.data.positions import (
    UNSCORED_SELECTORS,
    PositionTable,
    ScoredCorpus,
    Windows,
    parts_key,
    select_from_corpus,
)
from rpt_jax.data.preferences import Pair, read_pairs
from rpt_jax.data.questions import (
    Question,
    QuestionSource,
    make_question_source,
    make_question_template,
    read_or_recall,
    read_questions,
)
from rpt_jax.data.readers import Corpus, count_paragraphs, is_text_file, training_corpora
from rpt_jax.data.templates import Template, continuation, make_plain_template, make_template, token_facts
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.evals.next_token import Evaluator, difficulty_splits
from rpt_jax.evals.questions import QuestionEvaluator, category_splits, verification
from rpt_jax.models.families import read_config
from rpt_jax.models.hf import load_hf
from rpt_jax.rewards.catalog import shows_references
from rpt_jax.scoring.entropy import Proxy
from rpt_jax.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.train.policies import fingerprint, is_reward_model
from rpt_jax.train.progress import console, counted, tracked
from rpt_jax.train.run_directory import read_json


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The tasks that RL trains on."""

    source: Source
    ids: np.ndarray
    """i64 [tasks], ids in the source of the tasks to train on."""
    weights: tuple[float, ...] = (1.0,)
    """Sampling weights of the parts of a mixture."""
    corpora: np.ndarray | None = None
    """i32 [trunks], part of the mixture that each trunk is from; None: there is one part."""
    band: tuple[float, float] | None = None
    """Lowest and highest pass rate at which a task is used again; None: any."""


# A .txt file with that many paragraphs may be meant as that many documents.
_MANY_PARAGRAPHS = 20


class Domain(Protocol):
    """One kind of task.

    Attributes:
        name: documents or questions.
        template: of every prompt in training; those of held-out tasks show no reference.
        num_reference: tokens of the longest reference.
        identity: JSON-able, identifies the data; a run resumes only with the same data.
    """

    name: str
    template: Template
    num_reference: int
    identity: dict

    def warm_examples(self, config: Config, tokenizer: Tokenizer) -> Sequence[Example | Pair | Graded]:
        """Return the examples, pairs or graded completions that a warm start learns."""
        ...

    def control_examples(self, run) -> Sequence[Example] | None:
        """Return the examples that a control learns; None: the domain has no control."""
        ...

    def training_tasks(self, run, params) -> Tasks:
        """Return the tasks to train on; `params` are those of the policy that RL starts from."""
        ...

    def heldout(self, run, params) -> Source:
        """Return the held-out tasks, for evaluation; `params` as in `training_tasks`."""
        ...

    def example_columns(self, config: Config, tokenizer: Tokenizer) -> dict:
        """Return the columns of a task, as reward functions get them, without scoring any text."""
        ...

    def evaluator(self, run, source: Source, limits: dict[str, int], reward) -> Any:
        """Return an evaluator whose splits, keyed (limit name, split), hold up to `limits[limit name]` tasks each."""
        ...


def open_domain(config: Config, tokenizer: Tokenizer) -> Domain:
    """Read and check the domain that the config names."""
    if is_reward_model(config):
        return open_completions(config, tokenizer)
    return (open_questions if config.questions.path else open_documents)(config, tokenizer)


def cache_directory(config: Config) -> Path:
    """Return the directory of the cached corpus and its scored positions: data.cache, or the run's directory."""
    return Path(config.data.cache or config.run.directory)


def _read_supervised(config: Config, tokenizer: Tokenizer, template: Template) -> Sequence[Example | Pair | Graded]:
    """Read supervised.path for supervised.objective; print how many examples are skipped, and why."""
    path, objective = config.supervised.path, config.supervised.objective
    if objective == "likelihood":
        return read_examples(path, tokenizer, template, config)
    found, skipped = (read_pairs if objective == "dpo" else read_graded)(path, tokenizer, template, config)
    for reason, count in skipped.items():
        if count:
            console.print(f"{count} of {len(found) + sum(skipped.values())} examples of {path} {reason}; skipped")
    return found


def _named(splits: dict[str, dict]) -> dict:
    return {(which, name): ids for which, of in splits.items() for name, ids in of.items()}


# --- Questions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions with accepted answers; a trunk is one prompt."""

    template: Template
    training: QuestionSource
    held_out: QuestionSource
    name: str = "questions"

    @property
    def num_reference(self) -> int:
        return self.training.num_tokens

    @property
    def identity(self) -> dict:
        return {"training": self.training.identity, "held-out": self.held_out.identity}

    def warm_examples(self, config: Config, tokenizer: Tokenizer) -> Sequence[Example]:
        if not config.supervised.path:
            raise ConfigError(
                "a warm start on questions needs their solutions. Set --supervised.path to a file of solutions."
            )
        return _read_supervised(config, tokenizer, self.template)

    def control_examples(self, run) -> None:
        return None

    def training_tasks(self, run, params) -> Tasks:
        return Tasks(source=self.training, ids=np.arange(len(self.training.questions)))

    def heldout(self, run, params) -> QuestionSource:
        return self.held_out

    def example_columns(self, config: Config, tokenizer: Tokenizer) -> dict:
        return self.training.columns(0)

    def evaluator(self, run, source: QuestionSource, limits: dict[str, int], reward) -> QuestionEvaluator:
        seed = run.config.run.seed
        splits = {which: category_splits(source.questions, limit, seed=seed) for which, limit in limits.items()}
        return QuestionEvaluator(
            config=run.config, mesh=run.mesh, tokenizer=run.tokenizer, source=source, splits=_named(splits),
            reward=reward, progress=tracked,
            **verification(run.config.reward, source, partial(run.make_reward, source)),
        )  # fmt: skip


def open_questions(config: Config, tokenizer: Tokenizer) -> Questions:
    """Read the training and held-out questions.

    Raises:
        ConfigError: unusable settings.
        DataError: unusable records.
    """
    number = 2 if shows_references(config.reward) else 1
    if config.rollout.prompts_per_trunk != number:
        pair = " of two prompts, of which one shows the answer (ravr)" if number > 1 else ""
        raise ConfigError(
            f"rollout.prompts_per_trunk={config.rollout.prompts_per_trunk}; every question is a separate trunk{pair}. "
            f"Set --rollout.prompts-per-trunk {number}."
        )
    training = read_or_recall(config.questions.path, cache_directory(config))
    if config.questions.heldout_path:
        heldout = read_or_recall(config.questions.heldout_path, cache_directory(config))
    else:
        cut = min(len(training) - 1, max(1, round(len(training) * (1 - config.data.heldout_fraction))))
        training, heldout = training[:cut], training[cut:]
    if not training:
        raise ConfigError(
            "questions.path holds one question; training and evaluation need at least one each. "
            "Set --questions.heldout-path, or add questions."
        )
    source = question_source(training, "training", config, tokenizer)
    if number > 1:
        num_shown = config.reward.likelihood.num_targets or source.num_tokens
        source = replace(source, template=replace(source.template, num_shown=num_shown))
    return Questions(
        template=source.template,
        training=source,
        held_out=question_source(heldout[: config.eval.max_documents], "held-out", config, tokenizer),
    )


def question_source(
    questions: str | list[Question], where: str, config: Config, tokenizer: Tokenizer
) -> QuestionSource:
    """Return the source of questions given as a path or a list; print how many are skipped, and why."""
    found = read_questions(questions) if isinstance(questions, str) else questions
    source, left_out = make_question_source(found, tokenizer, config.questions, config.data)
    for reason, count in left_out.items():
        if count:
            console.print(f"{count} of {len(found)} {where} questions {reason}; skipped")
    return source


# --- Completions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Graded completions of a file alone, for reward models: there is nothing to sample."""

    template: Template
    identity: dict
    name: str = "completions"
    num_reference: int = 0

    def warm_examples(self, config: Config, tokenizer: Tokenizer) -> Sequence[Graded]:
        return _read_supervised(config, tokenizer, self.template)


def open_completions(config: Config, tokenizer: Tokenizer) -> Completions:
    """Check the file of graded completions. Prompts are those of the questions or texts that the config names, so that
    the model reads what their policy writes; without either, they open no thought.

    Raises:
        ConfigError: unusable settings of the template.
        DataError: there is no such file.
    """
    path, kept = Path(config.supervised.path), Path(config.run.directory) / "corpus.json"
    if path.is_file():
        identity = {"completions": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    elif kept.exists():
        # A trained model does not need its examples.
        identity = {"completions": read_json(kept).get("completions")}
    else:
        raise DataError(
            f"supervised.path {str(path)!r} is not a file; a reward model learns from one. Set it to a file."
        )
    if config.questions.path:
        template = make_question_template(tokenizer, config.questions, config.data)
    elif config.data.path or config.data.mixture:
        template = make_template(tokenizer, config.data)
    else:
        template = make_plain_template(tokenizer, config.data)
    return Completions(template=template, identity=identity)


# --- Documents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Positions of documents, by default selected by a proxy's entropy."""

    template: Template
    training: Sequence[Document]
    held_out: Sequence[Document]
    num_reference: int
    weights: tuple[float, ...] = (1.0,)
    name: str = "documents"

    @property
    def identity(self) -> dict:
        return {"training": _identity(self.training), "held-out": _identity(self.held_out)}

    def warm_examples(self, config: Config, tokenizer: Tokenizer) -> Sequence[Example]:
        supervised = config.supervised
        if supervised.path:
            return _read_supervised(config, tokenizer, self.template)
        # Mixed with drafts, plain text gets the weight of their contexts, or it would drown out their few tokens.
        weight = supervised.context_weight if supervised.draft_fraction else 1.0
        plain = document_examples(self.training, tokenizer, config.data.trunk_length, weight=weight)
        if not supervised.draft_fraction:
            return plain
        # Take no more than the warm start can use, which is only part of a large corpus.
        plain = plain.sample(supervised.num_steps * supervised.batch_size)
        drafts = draft_examples(self.training, tokenizer, self.template, config, len(plain))
        console.print(f"warm start: {len(plain):,} plain sequences, {len(drafts):,} drafts")
        return [*plain, *drafts]

    def control_examples(self, run) -> Sequence[Example]:
        return document_examples(self.training, run.tokenizer, run.config.data.trunk_length)

    def training_tasks(self, run, params) -> Tasks:
        settings = run.config.positions
        corpus = self.training_positions(run, *load_proxy(run, params))
        selected = select_from_corpus(corpus, settings, seed=run.config.run.seed).table
        source = self._source(run, corpus.documents, selected, self.template)
        ids, corpora = np.arange(len(selected)), None
        if len(self.weights) > 1:
            trunks = source.group(ids, run.config.rollout.prompts_per_trunk)
            corpora = corpus.documents.corpora[selected.document[trunks.ids[trunks.ends - 1]]]
        band = settings.pass_rate_band if settings.selector == "pass_rate_band" else None
        return Tasks(source=source, ids=ids, weights=self.weights, corpora=corpora, band=band)

    def training_positions(self, run, proxy: Proxy, identity: str) -> ScoredCorpus:
        """Return the positions of the training documents to select from; `identity` is the proxy's fingerprint."""
        training = self.training
        if run.config.positions.max_documents:
            training = documents_lib.first(training, run.config.positions.max_documents)
        return self._scored(run, training, proxy, identity, max_tokens=run.config.positions.max_tokens)

    def heldout(self, run, params) -> Source:
        proxy, identity = load_proxy(run, params)
        limit = run.config.eval.max_tokens
        parts = list(self._scored(run, self.held_out, proxy, identity, max_tokens=limit, always=True))
        template = replace(self.template, num_shown=0)
        return self._source(run, self.held_out, PositionTable.concatenate(parts), template)

    def example_columns(self, config: Config, tokenizer: Tokenizer) -> dict:
        least = config.positions.min_context_tokens
        document = next(d for d in self.training if len(d.tokens) > least)
        tokens = document.tokens[least : least + config.data.continuation_tokens]
        pieces = {int(token): tokenizer.token_bytes(int(token)) for token in tokens}
        text, ends = continuation(document, least, pieces, config.data.continuation_tokens)
        return {"document": document.id, "index": least, "continuation": text, "boundaries": ends}

    def evaluator(self, run, source, limits: dict[str, int], reward) -> Evaluator:
        settings, seed = run.config.eval, run.config.run.seed
        splits = {
            which: difficulty_splits(source.table, self.held_out, settings.difficulty_thresholds, limit, seed=seed)
            for which, limit in limits.items()
        }
        return Evaluator(
            config=run.config, mesh=run.mesh, tokenizer=run.tokenizer, source=source, splits=_named(splits),
            reward=reward, progress=tracked,
        )  # fmt: skip

    def _source(self, run, documents: Sequence[Document], table: PositionTable, template: Template) -> Source:
        data = run.config.data
        return make_source(
            documents, table, template, run.token_bytes, trunk_length=data.trunk_length,
            stride=data.window_stride, continuation_tokens=data.continuation_tokens,
        )  # fmt: skip

    def _scored(
        self, run, documents, proxy: Proxy, identity: str, *, max_tokens: int, always: bool = False
    ) -> ScoredCorpus:
        """Return the positions of the documents, scored if the selector needs scores or `always` is set."""
        config, facts = run.config, token_facts(run.token_bytes, boxed_mode=run.config.reward.boxed_mode)
        windows = Windows(
            window=config.data.trunk_length - len(self.template.header),
            stride=config.data.window_stride,
            continuation_tokens=config.data.continuation_tokens,
            min_context_tokens=config.positions.min_context_tokens,
        )
        settings = config.positions.renormalize, config.reward.boxed_mode, *([max_tokens] if max_tokens else [])
        name = documents_lib.view_fingerprint(documents)
        key = parts_key(name, run.tokenizer.fingerprint, identity, windows, settings)
        is_scored = always or config.positions.selector not in UNSCORED_SELECTORS
        return ScoredCorpus(
            documents=documents, lengths=documents_lib.first_tokens(documents, max_tokens), facts=facts,
            windows=windows, proxy=proxy if is_scored else None, directory=cache_directory(config) / key,
            progress=tracked,
        )  # fmt: skip


def open_documents(config: Config, tokenizer: Tokenizer) -> Documents:
    """Read the training and held-out documents.

    Raises:
        ConfigError: unusable settings.
        DataError: an unusable corpus.
    """
    _check_proxy(config, tokenizer)
    template = make_template(tokenizer, config.data)
    if shows_references(config.reward):
        num_shown = min(config.reward.likelihood.num_targets or 1, config.data.continuation_tokens)
        template = replace(template, num_shown=num_shown)
    least = config.data.trunk_length - len(template.header) - config.data.window_stride + 1
    if least < config.positions.min_context_tokens:
        raise ConfigError(
            f"data.window_stride={config.data.window_stride} leaves a position as few as {least} tokens of context in "
            f"its window; positions.min_context_tokens={config.positions.min_context_tokens} requires more. Lower "
            "--data.window-stride."
        )
    corpora = training_corpora(config.data)
    read = partial(
        documents_lib.open_documents,
        tokenizer=tokenizer,
        cache=cache_directory(config),
        progress=partial(counted, "tokenising"),
    )
    training = read(corpora)
    _say_how_to_split(corpora)
    if config.data.heldout_path:
        data = config.data
        heldout = read([Corpus(path=data.heldout_path, text_template=data.text_template, split=data.split)])
    else:
        training, heldout = documents_lib.split_heldout(training, config.data.heldout_fraction, tokenizer)
    heldout = documents_lib.first(heldout, config.eval.max_documents)
    limits = config.positions.max_tokens, config.eval.max_tokens
    for where, found, limit in zip(("training", "held-out"), (training, heldout), limits, strict=True):
        short = documents_lib.check_lengths(found, config.positions.min_context_tokens, where, limit)
        if short:
            console.print(f"{short} of {len(found)} {where} documents are too short to hold a position")
    return Documents(
        template=template, training=training, held_out=heldout, num_reference=config.data.continuation_tokens,
        weights=tuple(c.weight for c in corpora),
    )  # fmt: skip


def _say_how_to_split(corpora: list[Corpus]) -> None:
    """Say that a .txt file with paragraphs is one document, which some do not expect."""
    for corpus in corpora:
        if is_text_file(corpus.path) and corpus.split == "files" and Path(corpus.path).is_file():
            count = count_paragraphs(corpus.path)
            if count >= _MANY_PARAGRAPHS:
                console.print(
                    f"{corpus.path} has {count} paragraphs or more and is one document; positions see the paragraphs "
                    "before their own. If the paragraphs are separate texts, set --data.split paragraphs."
                )


def _identity(documents: Sequence[Document]) -> dict:
    return {
        "documents": len(documents),
        "tokens": int(documents_lib.lengths_of(documents).sum()),
        "sha256": documents_lib.view_fingerprint(documents),
    }


def _check_proxy(config: Config, tokenizer: Tokenizer) -> None:
    path = config.proxy.path
    if not path:
        return
    model = read_config(path)
    has_own = (Path(path) / "tokenizer.json").exists()
    if (
        load_tokenizer(path, "" if has_own else config.data.tokenizer_pattern).encoding_fingerprint
        != tokenizer.encoding_fingerprint
    ):
        raise ConfigError(
            f"the tokenizer in proxy.path={path!r} is not the policy's; positions are token indices, so both "
            "models must share a tokenizer. Choose a proxy of the same family."
        )
    if config.data.trunk_length + 2 > model.max_positions:
        raise ConfigError(
            f"the proxy has {model.max_positions} positions; it needs data.trunk_length={config.data.trunk_length} "
            "plus 2. Lower --data.trunk-length, or choose another proxy."
        )


def load_proxy(run, params) -> tuple[Proxy, str]:
    """Return the model that scores positions, and its fingerprint. Without a proxy.path it is the policy, `params`."""
    model, path = run.config.model, run.config.proxy.path
    if path:
        model = replace(read_config(path), activation_dtype=model.activation_dtype, num_ids=model.num_ids)
        _, params = load_hf(path, run.mesh)
        run.directory.remember("proxy", {"path": path, "checksum": fingerprint(params)})
    proxy = Proxy(
        config=model,
        params=params,
        mesh=run.mesh,
        bos_id=run.tokenizer.bos_id,
        batch_trunks=run.config.eval.batch_trunks,
        renormalize=run.config.positions.renormalize,
    )
    # Exclude remat and platform, which change only how the scores are computed and may differ between machines.
    unused = "" if model.num_ids in (0, model.vocab_size) else f"ids below {model.num_ids}"
    return proxy, f"{replace(model, remat=True, platform='')}{fingerprint(params)}{unused}"
