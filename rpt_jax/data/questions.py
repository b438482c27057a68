"""Questions with answers as tasks: a trunk is one prompt, with one cut at its end.

Records are jsonl, parquet or ArrayRecord in common layouts, recognised by their fields.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.config import DataConfig, QuestionsConfig
from rpt_jax.data.batches import Trunks, row_ids
from rpt_jax.data.layouts import LayoutError, parse_record
from rpt_jax.data.readers import has_files, read_records
from rpt_jax.data.templates import QUESTION, Template, check_marks, hint_texts, open_thought
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.tokenizer import THINK_OPEN, Tokenizer
from rpt_jax.types import TaskBatch

_ASK_BOXED = "\n\nReason step by step, then put the final answer within \\boxed{}."
_ASK_LETTER = "\n\nReason step by step, then put the letter of the right option within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its accepted answers."""

    id: str
    """File and record number."""
    messages: tuple[tuple[str, str], ...]
    """(role, content); the last message is the user's."""
    answers: tuple[str, ...]
    """Accepted answers; the letter for multiple choice. Empty if the record has none."""
    choices: tuple[str, ...] = ()
    category: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    """The record as read."""


def read_questions(path: str) -> list[Question]:
    """Read all questions of a path or glob.

    Layouts, told apart record by record (`layouts.py`): verl and Skywork-OR1 (prompt, reward_model.ground_truth);
    MMLU-Pro (question, options, answer) and SuperGPQA (with answer_letter); MMLU (question, choices, answer index); ARC
    (question.stem and choices, or question and choices.text / label, with answerKey); question or problem with answer
    (for GSM8K, the text after the last ####); MATH (problem, and solution with a box).

    A blank answer is not an error here, because real files have some.

    Raises:
        DataError: unknown layout, or no question; names file and record.
    """
    questions = [_question(record, f"{name}:{number}") for name, number, record in read_records(path)]
    if not questions:
        raise DataError(f"questions path {path!r} contains no question; it needs at least one. Check the file.")
    return questions


def read_or_recall(path: str, cache: Path) -> list[Question]:
    """Read questions and keep their records in the cache; if the files are gone, return the newest kept ones.

    Raises:
        DataError: as `read_questions`.
    """
    stem = f"questions-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    kept = sorted(cache.glob(f"{stem}-*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    if not has_files(path) and kept:
        return [_question(record, where) for where, record in map(json.loads, kept[-1].read_text().split("\n")[:-1])]
    questions = read_questions(path)
    text = "".join(json.dumps([q.id, q.record], default=str) + "\n" for q in questions)
    file = cache / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, file)
    return questions


def _question(record: dict, where: str) -> Question:
    try:
        return Question(id=where, record=record, **parse_record(record))
    except LayoutError as error:
        raise DataError(
            f"{where} has fields {sorted(map(str, record))}; a question record needs {error} (verl: prompt and "
            "reward_model.ground_truth; MMLU-Pro: question, options, answer; MMLU: question, choices, answer; ARC: "
            "question, choices, answerKey; MATH: problem and a boxed solution; or question or problem with answer). "
            "Correct the record."
        ) from error


@dataclass(frozen=True, kw_only=True)
class QuestionSource:
    """Prompts of questions as tasks; a task id is an index into `questions`.

    Attributes:
        questions: questions with their records.
        prompts: token ids of each question's trunk.
        template: its tail ends every prompt, <think> last.
        direct_prompts: the prompts without the request to reason.
        direct_tail: token ids at the end of every direct prompt; an option's letter follows.
        answer_tokens: ids of each question's first accepted answer, encoded alone.
        trunk_length: L, the longest prompt rounded up to a multiple of 16.
    """

    questions: list[Question]
    prompts: list[np.ndarray]
    template: Template
    direct_prompts: list[np.ndarray]
    direct_tail: np.ndarray
    answer_tokens: list[list[int]]
    trunk_length: int

    @property
    def num_tokens(self) -> int:
        """A, tokens of the longest answer rounded up to a multiple of 8."""
        return -(-max(1, *map(len, self.answer_tokens)) // 8) * 8

    @property
    def identity(self) -> dict[str, Any]:
        """Number of questions, and sha256 of their tokens and answers."""
        digest = hashlib.sha256()
        for question, prompt in zip(self.questions, self.prompts, strict=True):
            digest.update(prompt.tobytes() + repr(question.answers).encode())
        return {"questions": len(self.questions), "sha256": digest.hexdigest()}

    def group(self, task_ids, prompts_per_trunk: int) -> Trunks:
        """Make one trunk per question."""
        ids = np.asarray(task_ids, np.int64)
        return Trunks(ids, np.arange(1, len(ids) + 1))

    def make(
        self, trunks: list[list[int]], *, prompts_per_trunk: int, group_size: int, rows: Sequence[int] | None = None
    ) -> TaskBatch:
        """Build a TaskBatch of NumPy arrays; references have no bytes.

        Args:
            trunks: question numbers of each trunk; an empty list is padding.
            prompts_per_trunk: 1, or 2 if every second prompt shows the answer.
            group_size: G.
            rows: trunks of the batch to build; None: all.
        """
        rows = range(len(trunks)) if rows is None else rows
        return build_tasks(
            [self._trunk(trunks[row]) for row in rows],
            tail=self.template.tail,
            row_ids=row_ids(
                trunks, rows, prompts_per_trunk, len(self.questions), group_size, self.template.prompts_per_task
            ),
            trunk_length=self.trunk_length,
            num_tokens=self.num_tokens,
            hint_width=self.template.hint_width,
        )

    def _trunk(self, ids: list[int]) -> tuple[np.ndarray, list[Task]]:
        if not ids:
            return np.zeros(0, np.int32), []
        (i,) = ids
        task = Task(id=i, cut=len(self.prompts[i]), tokens=self.answer_tokens[i])
        return self.prompts[i], self.template.prompts_of(task)

    def columns(self, task_id: int) -> dict[str, Any]:
        """Return id, answers, choices, category and the record as read."""
        q = self.questions[task_id]
        return {"id": q.id, "answers": q.answers, "choices": q.choices, "category": q.category, "record": q.record}


def make_question_template(tokenizer: Tokenizer, questions: QuestionsConfig, data: DataConfig) -> Template:
    """Make the header (BOS) and tail (the assistant's turn, <think>) of every prompt.

    Raises:
        ConfigError, DataError: see `templates.make_template`.
    """
    tail = tokenizer.chat_parts()[1] if data.chat else "\n"
    check_marks(tokenizer)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    before, after = hint_texts(questions.template == "none")
    return Template(
        header=np.asarray(bos, np.int32),
        tail=np.asarray(_encode_tail(tokenizer, open_thought(tail, "\n"), data), np.int32),
        hint=tuple(_encode_tail(tokenizer, text, data) for text in (before, open_thought(after + tail, "\n"))),
    )


def make_question_source(
    questions: list[Question], tokenizer: Tokenizer, config: QuestionsConfig, data: DataConfig
) -> tuple[QuestionSource, dict[str, int]]:
    """Make the source of the questions that have an answer and fit data.trunk_length.

    Returns:
        (source, {reason: number of skipped questions}).
    Raises:
        ConfigError: no question remains.
    """
    template = make_question_template(tokenizer, config, data)

    def encode(question: Question, kind: QuestionsConfig):
        return np.concatenate([template.header, question_prompt(question, tokenizer, kind, data)]).astype(np.int32)

    prompts = [encode(q, config) for q in questions]
    # The direct prompt has no thought, but some chat templates open one.
    after = tokenizer.chat_parts()[1] if data.chat else "\n"
    direct_tail = (
        after.rstrip().removesuffix(THINK_OPEN) if after.rstrip().endswith(THINK_OPEN) else after
    ) + "Answer:"
    is_short = [len(prompt) <= data.trunk_length for prompt in prompts]
    kept = [i for i, q in enumerate(questions) if q.answers and is_short[i]]
    left_out = {
        "have no answer": sum(not q.answers for q in questions),
        "are longer than data.trunk_length": sum(bool(q.answers) and not is_short[i] for i, q in enumerate(questions)),
    }
    if not kept:
        raise ConfigError(
            f"of {len(questions)} questions {left_out['have no answer']} have no answer, and the prompts of the others "
            f"are longer than data.trunk_length={data.trunk_length} tokens (shortest: {min(map(len, prompts))}). "
            "Raise --data.trunk-length."
        )
    direct = [encode(questions[i], replace(config, template="none")) for i in kept]
    longest = max(map(len, [*(prompts[i] for i in kept), *direct]))
    source = QuestionSource(
        questions=[questions[i] for i in kept],
        prompts=[prompts[i] for i in kept],
        template=template,
        direct_prompts=direct,
        direct_tail=np.asarray(_encode_tail(tokenizer, direct_tail, data), np.int32),
        answer_tokens=[tokenizer.encode_continuation(questions[i].answers[0]) for i in kept],
        trunk_length=-(-longest // 16) * 16,
    )
    return source, left_out


def question_prompt(question: Question, tokenizer: Tokenizer, config: QuestionsConfig, data: DataConfig) -> list[int]:
    """Return the ids of a question's prompt, between the template's header and tail."""
    *before, (role, last) = question.messages
    if QUESTION in config.template:
        last = config.template.replace(QUESTION, last)
    elif config.template == "boxed":
        last += _ASK_LETTER if question.choices else _ASK_BOXED
    messages = [*before, (role, last)]
    if data.chat:
        return tokenizer.chat_prompt(messages)
    return tokenizer.encode("\n\n".join(content for _, content in messages))


def _encode_tail(tokenizer: Tokenizer, tail: str, data: DataConfig) -> list[int]:
    return tokenizer.encode_rendered(tail) if data.chat else tokenizer.encode_continuation(tail, specials=True)
