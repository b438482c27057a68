"""Positions to batches of tasks: trunks with up to M cuts, shuffled, resumable anywhere.

The cursor is global (trunks handed out so far). Row ids come from the position table, so sampling noise does not depend
on where a row lies.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import jax
import numpy as np

from rpt_jax.data.documents import Document
from rpt_jax.data.positions import PositionTable, window_start
from rpt_jax.data.prompts import Template, continuation
from rpt_jax.types import TaskBatch


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """What tasks are made of; `make` turns a list of trunks into a TaskBatch.

    Attributes:
        documents, table, template: see their modules.
        token_bytes: bytes of every id.
        trunk_length: L; window and stride: document tokens.
        continuation_tokens: horizon of a continuation.
        num_bytes: Y, the widest continuation of the table, rounded up to a multiple of 8.
    """

    documents: list[Document]
    table: PositionTable
    template: Template
    token_bytes: list[bytes]
    trunk_length: int
    stride: int
    continuation_tokens: int
    num_bytes: int

    @property
    def window(self) -> int:
        return self.trunk_length - len(self.template.header)

    def group(self, position_ids, prompts_per_trunk: int) -> list[list[int]]:
        """Positions that share a window, at most `prompts_per_trunk` of them: the trunks of an epoch."""
        by_window: dict[tuple[int, int], list[int]] = {}
        for i in position_ids:
            start = window_start(int(self.table.index[i]), window=self.window, stride=self.stride)
            by_window.setdefault((int(self.table.document[i]), start), []).append(int(i))
        M = prompts_per_trunk
        return [ids[first : first + M] for ids in by_window.values() for first in range(0, len(ids), M)]

    def make(self, trunks: list[list[int]], *, prompts_per_trunk: int, group_size: int) -> TaskBatch:
        """TaskBatch of numpy arrays from lists of position ids; an empty list is a padded trunk."""
        U, M, G, E = len(trunks), prompts_per_trunk, group_size, len(self.template.tail)
        header, occurrence = self.template.header, np.zeros(U, np.int32)
        batch = dict(
            trunk_tokens=np.zeros((U, self.trunk_length), np.int32),
            trunk_lengths=np.ones((U,), np.int32),
            cuts=np.ones((U, M), np.int32),
            position_mask=np.zeros((U, M), bool),
            tail_tokens=np.broadcast_to(self.template.tail, (U, M, E)).copy(),
            tail_lengths=np.full((U, M), E, np.int32),
            continuation_bytes=np.zeros((U, M, self.num_bytes), np.uint8),
            boundary_mask=np.zeros((U, M, self.num_bytes), bool),
            target_tokens=np.zeros((U, M), np.int32),
            position_ids=np.full((U, M), -1, np.int32),
        )
        occurrences = Counter()
        for u, ids in enumerate(trunks):
            # A trunk that stands in the batch again (at the seam of two epochs) gets noise of its own.
            occurrence[u] = occurrences[tuple(ids)]
            occurrences[tuple(ids)] += 1
            for m, i in enumerate(ids):
                document, index = self.documents[self.table.document[i]], int(self.table.index[i])
                start = window_start(index, window=self.window, stride=self.stride)
                if m == 0:
                    trunk = np.concatenate([header, document.tokens[start : start + self.window]])
                    batch["trunk_tokens"][u, : len(trunk)] = trunk
                    batch["trunk_lengths"][u] = len(trunk)
                text, ends = continuation(document, index, self.token_bytes, self.continuation_tokens)
                batch["cuts"][u, m] = len(header) + index - start
                batch["position_mask"][u, m] = True
                batch["continuation_bytes"][u, m, : len(text)] = np.frombuffer(text, np.uint8)
                batch["boundary_mask"][u, m, np.asarray(ends) - 1] = True
                batch["target_tokens"][u, m] = document.tokens[index]
                batch["position_ids"][u, m] = i
        numbers = batch["position_ids"] + occurrence[:, None] * len(self.table)
        return TaskBatch(**batch, row_ids=numbers[..., None] * G + np.arange(G, dtype=np.int32))


def make_source(documents, table, template, token_bytes, *, trunk_length, stride, continuation_tokens) -> TaskSource:
    """A TaskSource whose byte width fits every position of the table."""
    widths = [0]
    lengths = [np.array([len(token_bytes[t]) for t in d.tokens]) for d in documents]
    for number, index in zip(table.document, table.index, strict=True):
        widths.append(int(lengths[number][index : index + continuation_tokens].sum()))
    return TaskSource(
        documents=documents,
        table=table,
        template=template,
        token_bytes=token_bytes,
        trunk_length=trunk_length,
        stride=stride,
        continuation_tokens=continuation_tokens,
        num_bytes=-(-max(widths) // 8) * 8,
    )


class TrainIterator:
    """Endless TaskBatches over the selected positions, reshuffled each epoch; its state is one global number."""

    def __init__(
        self, source: TaskSource, position_ids, *, num_trunks: int, prompts_per_trunk: int, group_size: int, seed: int
    ):
        self._make = lambda trunks: source.make(trunks, prompts_per_trunk=prompts_per_trunk, group_size=group_size)
        self.trunks = source.group(position_ids, prompts_per_trunk)
        order = grain.MapDataset.range(len(self.trunks)).seed(seed).shuffle().repeat()
        shards = grain.sharding.ShardOptions(shard_index=jax.process_index(), shard_count=jax.process_count())
        self._iterator = grain.experimental.ElasticIterator(
            order, num_trunks, shards, read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        return self._make([self.trunks[int(i)] for i in next(self._iterator)])

    def get_state(self) -> dict:
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        self._iterator.set_state(state)
