"""The stages of a run, in order, each leaving its result in the run directory.

corpus -> warm start -> positions -> RPT -> control. A finished stage is not run again; RPT goes on from its newest
checkpoint, an interrupted warm start or control begins anew. Everything that can be wrong with the input is found in
`prepare`, before anything compiles.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from rpt_jax.config import Config
from rpt_jax.data import documents as documents_lib
from rpt_jax.data.documents import Document
from rpt_jax.data.pipeline import TaskSource, TrainIterator, make_source
from rpt_jax.data.positions import PositionTable, score_documents, select_positions
from rpt_jax.data.prompts import Template, make_template
from rpt_jax.errors import ConfigError
from rpt_jax.evals.next_token import Evaluator, difficulty_splits
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rewards.reward import Reward, make_reward
from rpt_jax.rl.update import init_state, make_optimizer
from rpt_jax.tokenizer import Tokenizer, load_tokenizer, train_byte_level
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.loop import train
from rpt_jax.train.metrics import RunDirectory, console, progress_bar, read_records
from rpt_jax.train.supervised import (
    Sequence,
    document_sequences,
    draft_sequences,
    read_sequences,
    train_supervised,
)
from rpt_jax.train.trainer import Trainer
from rpt_jax.types import TrainState


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked run: what the stages share. `config` has the vocabulary size filled in."""

    config: Config
    mesh: Any
    run: RunDirectory
    tokenizer: Tokenizer
    template: Template
    train_documents: list[Document]
    heldout_documents: list[Document]
    warm_sequences: list[Sequence]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        return [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]

    @property
    def window(self) -> int:
        return self.config.data.trunk_length - len(self.template.header)

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.run.path / "checkpoints" / stage, keep=self.config.checkpoint.keep)


def prepare(config: Config) -> Prepared:
    """Read and check everything; nothing compiles here.

    Raises:
        ConfigError, DataError, CheckpointError: see the modules that do the reading.
    """
    config.validate()
    if jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes; a run is one process over all its devices. Start one process."
        )
    mesh = make_mesh(config.mesh)
    train_texts, heldout_texts = _read_corpus(config)
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
    else:
        tokenizer = train_byte_level((t.text for t in train_texts), config.data.tokenizer_vocab_size)
    config = replace(config, model=_fit_vocabulary(config, tokenizer))
    template = make_template(tokenizer, config.data)
    split = {"training": train_texts, "held-out": heldout_texts}
    documents = {}
    for where, texts in split.items():
        documents[where] = documents_lib.tokenize(texts, tokenizer)
        short = documents_lib.check_lengths(documents[where], config.positions.min_context_tokens, where)
        if short:
            console.print(f"{short} of {len(texts)} {where} documents are too short to hold a position")
    warm = []
    if config.supervised.num_steps:
        if config.supervised.path:
            warm = read_sequences(config.supervised.path, tokenizer, template, config)
        else:
            # Beside drafts, plain text weighs like their contexts, or it would drown their few tokens.
            weight = config.supervised.context_weight if config.supervised.draft_fraction else 1.0
            warm = document_sequences(documents["training"], tokenizer, config.data.trunk_length, weight=weight)
            drafts = draft_sequences(documents["training"], tokenizer, template, config, len(warm))
            if config.supervised.draft_fraction:
                console.print(f"warm start: {len(warm):,} plain sequences, {len(drafts):,} drafts")
            warm += drafts
    corpus = {
        where: {
            "documents": len(found),
            "tokens": sum(len(d.tokens) for d in found),
            "sha256": documents_lib.fingerprint(found),
        }
        for where, found in documents.items()
    }
    run = RunDirectory(config, corpus | {"tokenizer": {"sha256": tokenizer.fingerprint}})
    tokenizer.save(run.path / "tokenizer")
    return Prepared(
        config=config,
        mesh=mesh,
        run=run,
        tokenizer=tokenizer,
        template=template,
        train_documents=documents["training"],
        heldout_documents=documents["held-out"],
        warm_sequences=warm,
    )


def _read_corpus(config: Config):
    data = config.data
    texts = documents_lib.read_texts(data.path, text_template=data.text_template)
    if data.heldout_path:
        return texts, documents_lib.read_texts(data.heldout_path, text_template=data.text_template)
    return documents_lib.split_heldout(texts, data.heldout_fraction)


def _fit_vocabulary(config: Config, tokenizer: Tokenizer):
    """The model's vocabulary: as configured, else the tokenizer's, rounded up to the tensor axis."""
    size, shards = config.model.vocab_size, config.mesh.tensor
    if size and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size}; the tokenizer has {tokenizer.vocab_size} ids and each needs an entry. "
            "Raise --model.vocab-size, or use 0."
        )
    return replace(config.model, vocab_size=size or -(-tokenizer.vocab_size // shards) * shards)


def warm_start(p: Prepared) -> Any:
    """Parameters that RPT and the control start from: random, then supervised.num_steps of supervised training."""
    config = p.config
    params = init_params(config.model, p.mesh, jax.random.key(config.run.seed))
    if not config.supervised.num_steps:
        return params
    optimizer = make_optimizer(config.supervised.optimizer, config.supervised.num_steps)
    state, checkpoints = init_state(params, optimizer, p.mesh), p.checkpoints("warm_start")
    if checkpoints.latest_step == config.supervised.num_steps:
        state, _ = checkpoints.restore(state)
    else:
        p.run.cut_metrics("warm_start", 0)
        state, flops = train_supervised(
            "warm_start",
            config,
            state,
            optimizer,
            p.mesh,
            p.warm_sequences,
            tail=p.template.tail,
            shuffle=not config.supervised.path,
            num_steps=config.supervised.num_steps,
            max_flops=None,
            log=p.run.log,
        )
        checkpoints.save(config.supervised.num_steps, state, {"flops": flops})
    checkpoints.close()
    return state.params


def choose_positions(p: Prepared, params) -> tuple[TaskSource, np.ndarray, TaskSource]:
    """(training tasks, ids of the selected training positions, held-out tasks), by the warm policy's own entropy."""
    config = p.config
    training = p.train_documents[: config.positions.max_documents or None]
    sources = []
    for name, documents in (("train", training), ("heldout", p.heldout_documents)):
        path = p.run.path / f"positions_{name}.npz"
        if path.exists():
            with np.load(path) as columns:
                table = PositionTable(**columns)
        else:
            table = score_documents(
                config.model,
                params,
                p.mesh,
                documents,
                p.token_bytes,
                bos_id=p.tokenizer.bos_id,
                window=p.window,
                stride=config.data.window_stride,
                batch_trunks=config.eval.batch_trunks,
                settings=config.positions,
                continuation_tokens=config.data.continuation_tokens,
                progress=lambda batches, name=name: _tracked(f"entropy, {name}", batches),
            )
            with path.with_suffix(".partial").open("wb") as file:
                np.savez(file, **vars(table))
            path.with_suffix(".partial").rename(path)
        sources.append(
            make_source(
                documents,
                table,
                p.template,
                p.token_bytes,
                trunk_length=config.data.trunk_length,
                stride=config.data.window_stride,
                continuation_tokens=config.data.continuation_tokens,
            )
        )
    selected = select_positions(
        sources[0].table, config.positions, stride=config.data.window_stride, seed=config.run.seed
    )
    return sources[0], selected, sources[1]


def _tracked(description: str, batches: Iterable) -> Iterable:
    batches = list(batches)
    with progress_bar(description, len(batches)) as progress:
        for number, batch in enumerate(batches, start=1):
            yield batch
            progress(number)


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Evaluates at the loop's request and logs the figures; the first and last evaluation use more positions."""

    prepared: Prepared
    source: TaskSource

    def __call__(self, step: int, state: TrainState, flops: float) -> None:
        is_end = step in (0, self.prepared.config.run.num_steps)
        figures = self.evaluate(state.params, thinking=True, final=is_end)
        self.prepared.run.log("evaluation", step, {"flops": flops, "splits": figures})

    def evaluate(self, params, *, thinking: bool, final: bool) -> dict:
        """Figures per split (`Evaluator.evaluate`); final: on eval.final_num_positions instead of num_positions."""
        p = self.prepared
        limit = p.config.eval.final_num_positions if final else p.config.eval.num_positions
        thresholds = p.config.positions.difficulty_thresholds
        splits = difficulty_splits(self.source.table, p.heldout_documents, thresholds, limit, seed=p.config.run.seed)
        evaluator = Evaluator(
            config=p.config,
            mesh=p.mesh,
            tokenizer=p.tokenizer,
            source=self.source,
            splits=splits,
            rewards=self._rewards,
        )
        return evaluator.evaluate(params, thinking=thinking)

    @cached_property
    def _rewards(self) -> dict[str, Reward]:
        """Made once: every new one would compile anew."""
        p = self.prepared
        return {
            name: make_reward(replace(p.config.reward, name=name), p.tokenizer) for name in ("prefix", "first_token")
        }


def run_rpt(
    p: Prepared, params, source: TaskSource, selected, evaluations, *, stop_at_step=None
) -> tuple[TrainState, float]:
    """Reinforcement pre-training from `params`; (state, FLOPs)."""
    config = p.config
    tasks = TrainIterator(
        source,
        selected,
        num_trunks=config.rollout.num_trunks,
        prompts_per_trunk=config.rollout.prompts_per_trunk,
        group_size=config.rollout.group_size,
        seed=config.run.seed,
    )
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    trainer = Trainer(
        config=config,
        mesh=p.mesh,
        tokenizer=p.tokenizer,
        header_length=len(p.template.header),
        reward=make_reward(config.reward, p.tokenizer),
        optimizer=optimizer,
        reference=params if config.loss.kl_coef else None,
    )
    # The first update donates its state: keep the start's own buffers for the control and the reference.
    state = init_state(jax.tree.map(lambda x: x.copy(), params), optimizer, p.mesh)
    checkpoints = p.checkpoints("rpt")
    result = train(trainer, state, tasks, p.run, checkpoints, evaluations, stop_at_step=stop_at_step)
    checkpoints.close()
    return result


def continue_supervised(
    p: Prepared, params, sequences, optimizer_config, max_flops: float, *, log, on_step
) -> TrainState:
    """Supervised training from a copy of `params` until `max_flops` are spent: what a control is."""
    optimizer = make_optimizer(optimizer_config, p.config.run.num_steps)
    state = init_state(jax.tree.map(lambda x: x.copy(), params), optimizer, p.mesh)
    state, _ = train_supervised(
        "control",
        p.config,
        state,
        optimizer,
        p.mesh,
        sequences,
        tail=p.template.tail,
        shuffle=True,
        num_steps=None,
        max_flops=max_flops,
        log=log,
        on_step=on_step,
    )
    return state


def run_control(p: Prepared, params, max_flops: float, evaluations: Evaluations, *, num_evaluations: int = 5) -> None:
    """Next-token training on the training documents at matched compute, evaluated on the way and at the end."""
    if any(r["stage"] == "control_evaluation" and r.get("final") for r in read_records(p.run.path)):
        return
    sequences = document_sequences(p.train_documents, p.tokenizer, p.config.data.trunk_length)
    p.run.cut_metrics("control", -1)
    p.run.cut_metrics("control_evaluation", -1)
    marks = list(np.linspace(0, max_flops, num_evaluations + 1)[1:-1])
    spent = [0.0]

    def on_step(step: int, state: TrainState, flops: float) -> None:
        spent[0] = flops
        if marks and flops >= marks[0]:
            marks.pop(0)
            figures = evaluations.evaluate(state.params, thinking=False, final=False)
            p.run.log("control_evaluation", step, {"flops": flops, "splits": figures})

    state = continue_supervised(
        p, params, sequences, p.config.supervised.control_optimizer, max_flops, log=p.run.log, on_step=on_step
    )
    figures = evaluations.evaluate(state.params, thinking=True, final=True)
    p.run.log("control_evaluation", int(state.step), {"flops": spent[0], "splits": figures, "final": True})
