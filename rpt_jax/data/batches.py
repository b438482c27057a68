"""From positions to batches of tasks: trunks with up to M cuts, shuffled, sharded by process, resumable anywhere.

The cursor is global (number of trunks visited), so a run may resume with another number of processes. Row ids come from
the position table, so sampling noise depends neither on a row's place in the batch nor on its process.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from rpt_jax.data.documents import Document
from rpt_jax.data.positions import PositionTable, window_start
from rpt_jax.data.templates import Template, continuation
from rpt_jax.errors import DataError
from rpt_jax.parallel.distributed import to_host
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.types import References, TaskBatch


@dataclass(frozen=True)
class Trunks(Sequence):
    """Lists of task ids that share a trunk, as two arrays."""

    ids: np.ndarray
    """i64 [tasks], ordered by trunk."""
    ends: np.ndarray
    """i64 [trunks], cumulative number of tasks."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> list[int]:
        return self.ids[(self.ends[number - 1] if number else 0) : self.ends[number]].tolist()


class Source(Protocol):
    """Where tasks come from: positions of documents, or questions."""

    def group(self, task_ids, prompts_per_trunk: int) -> Trunks:
        """Group tasks into trunks."""
        ...

    def make(
        self, trunks: list[list[int]], *, prompts_per_trunk: int, group_size: int, rows: Sequence[int] | None = None
    ) -> TaskBatch:
        """Build a TaskBatch of NumPy arrays."""
        ...

    def columns(self, task_id: int) -> dict[str, Any]:
        """Return the fields of a task that a host reward may use."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Positions of documents as tasks; a task id is a row of `table`.

    Attributes:
        documents: the corpus.
        table: positions in the documents.
        template: the prompt template.
        token_bytes: bytes of every id.
        trunk_length: L.
        stride: document tokens between the starts of windows.
        continuation_tokens: A, horizon of a continuation.
        num_bytes: Y, the longest continuation of the table rounded up to a multiple of 8.
    """

    documents: Sequence[Document]
    table: PositionTable
    template: Template
    token_bytes: list[bytes]
    trunk_length: int
    stride: int
    continuation_tokens: int
    num_bytes: int

    @property
    def window(self) -> int:
        """Document tokens that fit in a trunk after the header."""
        return self.trunk_length - len(self.template.header)

    def group(self, task_ids, prompts_per_trunk: int) -> Trunks:
        """Group positions that share a window, with at most `prompts_per_trunk` prompts to a trunk."""
        num_positions = prompts_per_trunk // self.template.prompts_per_task
        ids = np.sort(np.asarray(task_ids, np.int64))
        starts = window_start(self.table.index[ids], window=self.window, stride=self.stride)
        documents = self.table.document[ids]
        is_new = np.append(True, (np.diff(documents) != 0) | (np.diff(starts) != 0))[: len(ids)]
        # A window with more than M positions becomes several trunks.
        first = np.maximum.accumulate(np.where(is_new, np.arange(len(ids)), 0))
        is_first = (np.arange(len(ids)) - first) % num_positions == 0
        return Trunks(ids, np.append(np.flatnonzero(is_first)[1:], len(ids)))

    def make(
        self, trunks: list[list[int]], *, prompts_per_trunk: int, group_size: int, rows: Sequence[int] | None = None
    ) -> TaskBatch:
        """Build a TaskBatch of NumPy arrays.

        Args:
            trunks: position ids of each trunk; an empty list is padding.
            prompts_per_trunk: M.
            group_size: G.
            rows: trunks of the batch to build; None: all.
        """
        rows = range(len(trunks)) if rows is None else rows
        return build_tasks(
            [self._trunk(trunks[row]) for row in rows],
            tail=self.template.tail,
            row_ids=row_ids(
                trunks, rows, prompts_per_trunk, len(self.table), group_size, self.template.prompts_per_task
            ),
            trunk_length=self.trunk_length,
            num_bytes=self.num_bytes,
            num_tokens=self.continuation_tokens,
            hint_width=self.template.hint_width,
        )

    def _trunk(self, ids: list[int]) -> tuple[np.ndarray, list[Task]]:
        """Return the tokens of the shared window, and the tasks of the positions."""
        if not ids:
            return np.zeros(0, np.int32), []
        document, header, tasks = self.documents[self.table.document[ids[0]]], self.template.header, []
        start = window_start(int(self.table.index[ids[0]]), window=self.window, stride=self.stride)
        for i in ids:
            index = int(self.table.index[i])
            text, ends = continuation(document, index, self.token_bytes, self.continuation_tokens)
            tokens = document.tokens[index : index + self.continuation_tokens]
            task = Task(id=i, cut=len(header) + index - start, text=text, boundaries=ends, tokens=tokens)
            tasks += self.template.prompts_of(task)
        return np.concatenate([header, document.tokens[start : start + self.window]]), tasks

    def columns(self, task_id: int) -> dict[str, Any]:
        """Return document, index, continuation (bytes), boundaries (lengths in bytes at which tokens end)."""
        document, index = self.documents[self.table.document[task_id]], int(self.table.index[task_id])
        text, ends = continuation(document, index, self.token_bytes, self.continuation_tokens)
        return {"document": document.id, "index": index, "continuation": text, "boundaries": ends}


def row_ids(
    trunks: list[list[int]],
    rows: Sequence[int],
    num_prompts: int,
    num_tasks: int,
    group_size: int,
    prompts_per_task: int = 1,
) -> np.ndarray:
    """Return row ids, i32 [rows, M, G], unique even if a trunk occurs twice in a batch that spans two epochs.

    Args:
        trunks: task ids of each trunk of the global batch.
        rows: trunks to return ids for.
        num_prompts: M.
        num_tasks: number of tasks in the source.
        group_size: G.
        prompts_per_task: a task's prompts are neighbours; they have ids of their own.
    """
    occurrences, occurrence = Counter(), np.zeros(len(trunks), np.int32)
    for u, ids in enumerate(trunks):
        occurrence[u] = occurrences[tuple(ids)]
        occurrences[tuple(ids)] += 1
    numbers = np.full((len(rows), num_prompts // prompts_per_task), -1, np.int32)
    for u, row in enumerate(rows):
        numbers[u, : len(trunks[row])] = trunks[row]
    numbers += occurrence[np.asarray(rows, int), None] * num_tasks
    numbers = numbers[..., None] * prompts_per_task + np.arange(prompts_per_task, dtype=np.int32)
    numbers = numbers.reshape(len(rows), num_prompts)
    return numbers[..., None] * group_size + np.arange(group_size, dtype=np.int32)


def make_source(
    documents, table: PositionTable, template, token_bytes, *, trunk_length, stride, continuation_tokens
) -> TaskSource:
    """Make a TaskSource whose byte width fits every position of the table."""
    return TaskSource(
        documents=documents,
        table=table,
        template=template,
        token_bytes=token_bytes,
        trunk_length=trunk_length,
        stride=stride,
        continuation_tokens=continuation_tokens,
        num_bytes=-(-int(table.num_bytes.max(initial=1)) // 8) * 8,
    )


class PassRates:
    """Mean rewards of tasks so far, for the selector pass_rate_band."""

    def __init__(self, low: float, high: float):
        self._low, self._high = low, high
        self._seen: dict[int, tuple[float, int]] = {}

    def add(self, references: References, rewards_UMG: np.ndarray) -> None:
        """Add the rewards f32 [U, M, G] of a batch to the means; padding is ignored."""
        for i, rewards in zip(references.task_ids.ravel(), rewards_UMG.reshape(-1, rewards_UMG.shape[-1])):
            if i >= 0:
                total, count = self._seen.get(int(i), (0.0, 0))
                self._seen[int(i)] = (total + float(rewards.sum()), count + len(rewards))

    def accepts(self, ids: list[int]) -> bool:
        """Return whether one of the trunk's tasks is unseen or has a pass rate inside the band."""
        seen = [self._seen.get(i) for i in ids]
        return any(s is None or self._low <= s[0] / s[1] <= self._high for s in seen)

    def get_state(self) -> list:
        """Return [task id, sum of rewards, number of rewards] of every task seen, for a checkpoint."""
        return [[i, total, count] for i, (total, count) in self._seen.items()]

    def set_state(self, state: list) -> None:
        """Restore a state that `get_state` returned."""
        self._seen = {int(i): (float(total), int(count)) for i, total, count in state}


class TrainIterator:
    """Endless TaskBatches over the given tasks, reshuffled each epoch.

    Args:
        source: builds the batches.
        task_ids: tasks to iterate over.
        num_trunks: U, trunks in the global batch.
        prompts_per_trunk: M.
        group_size: G.
        seed: seed of the shuffle.
        corpora: i64 [trunks], mixture part of each trunk; unused if there is one part.
        weights: sampling weight of each part; each part is reshuffled in its own epochs.
        band: (low, high); trunks whose tasks all have pass rates outside are skipped and counted.
        rows: trunks of the global batch to build (`mesh.local_trunks`); None: all.
    """

    def __init__(
        self,
        source: Source,
        task_ids,
        *,
        num_trunks: int,
        prompts_per_trunk: int,
        group_size: int,
        seed: int,
        corpora=None,
        weights: Sequence[float] = (1.0,),
        band: tuple[float, float] | None = None,
        rows: Sequence[int] | None = None,
    ):
        self._make = lambda trunks: source.make(
            trunks, prompts_per_trunk=prompts_per_trunk, group_size=group_size, rows=rows
        )
        self.trunks = source.group(task_ids, prompts_per_trunk)
        self.num_trunks = num_trunks
        self._order = _make_order(len(self.trunks), corpora, weights, seed)
        self._rates = None if band is None else PassRates(*band)
        self.position = (0, 0)
        """(trunks visited, trunks skipped) since the run started."""

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        return self.make(self.take(self.num_trunks))

    def make(self, trunks: list[list[int]]) -> TaskBatch:
        """Build the batch of these trunks, given by their task ids."""
        return self._make(trunks)

    def take(self, number: int) -> list[list[int]]:
        """Return the task ids of the next trunks.

        Raises:
            DataError: all trunks are outside the band.
        """
        picked, refused = [], 0
        following, passed_over = self.position
        while len(picked) < number:
            ids = self.trunks[int(self._order[following])]
            following += 1
            if self._rates is None or self._rates.accepts(ids):
                picked.append(ids)
                refused = 0
            else:
                passed_over, refused = passed_over + 1, refused + 1
            if refused > 2 * len(self.trunks):
                raise DataError(
                    f"all {len(self.trunks)} trunks have pass rates outside positions.pass_rate_band; nothing is left "
                    "to learn from. Widen --positions.pass-rate-band, or use more text."
                )
        self.position = (following, passed_over)
        return picked

    def observe(self, references: References, rewards_UMG) -> None:
        """Record the tasks' rewards f32 [U, M, G] if there is a band; without one, do not wait for them."""
        if self._rates is not None:
            self._rates.add(*to_host((references, rewards_UMG)))

    def get_state(self) -> dict:
        """Return the cursor, and the pass rates if there is a band, for a checkpoint."""
        following, passed_over = self.position
        state = {"next": following, "passed_over": passed_over}
        return state if self._rates is None else state | {"rates": self._rates.get_state()}

    def set_state(self, state: dict) -> None:
        """Restore a state that `get_state` returned."""
        self.position = (state["next"], state["passed_over"])
        if self._rates is not None:
            self._rates.set_state(state["rates"])


def _make_order(num_trunks: int, corpora, weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Return endless trunk numbers with random access."""
    if len(weights) == 1:
        return grain.MapDataset.range(num_trunks).seed(seed).shuffle().repeat()
    parts, shares = [], []
    for corpus, weight in enumerate(weights):
        (numbers,) = np.nonzero(np.asarray(corpora) == corpus)
        if not len(numbers):
            raise DataError(
                f"part {corpus + 1} of data.mixture has no task; each part needs at least one. Remove it "
                "or loosen the selection."
            )
        order = grain.MapDataset.range(len(numbers)).seed(seed + corpus).shuffle().repeat()
        parts.append(order.map(lambda i, numbers=numbers: int(numbers[i])))
        shares.append(weight)
    return grain.MapDataset.mix(parts, shares)
