"""Partial rollouts: rows that a step has not finished wait on the host and go on in a later step.

A trunk waits until all of its groups have ended; a group is trained on once, in the step in which its last row ends.
Waiting trunks come first in the next batch, which new trunks fill up, so its shape stays the same. Tokens keep the
log-probabilities that they were sampled with, and their noise: it is keyed by the step in which the trunk started.

Source: Kimi k1.5, arXiv:2501.12599 §2.6.2, which has no published code.
"""

import base64
import io
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import sharded_like
from rpt_jax.types import Rollouts, TaskBatch

_REPEATS = 4
_ARRAYS = ("row_ids", "tokens", "lengths", "logprobs", "ended", "trained")


@dataclass(kw_only=True)
class Trunk:
    """A trunk whose groups have not all ended."""

    ids: list[int]
    born: int
    """Step in which it started."""
    row_ids: np.ndarray  # i32 [M, G]
    tokens: np.ndarray  # i32 [M, G, C]
    lengths: np.ndarray  # i32 [M, G]
    logprobs: np.ndarray  # f32 [M, G, C]
    ended: np.ndarray  # bool [M, G], rows that repeat themselves
    trained: np.ndarray  # bool [M], groups that an update has had


@dataclass(kw_only=True)
class Waiting:
    """The trunks that wait, and what makes batches of them.

    Attributes:
        new_tokens: most tokens that a row draws in a step.
        limit: C, tokens at which a row ends.
        stop_ids: tokens that end a row.
        repeat_window: see `RolloutConfig`.
        trunks: in the order in which they started.
    """

    new_tokens: int
    limit: int
    stop_ids: tuple[int, ...]
    repeat_window: int = 0
    trunks: list[Trunk] = field(default_factory=list)
    _batch_ids: list[list[int]] = field(default_factory=list, repr=False)

    def next_batch(self, iterator, step: int) -> TaskBatch:
        """Return the waiting trunks and as many new ones as fit next to them, as NumPy arrays.

        Args:
            iterator: a `batches.TrainIterator`.
            step: number of the step.
        """
        fresh = iterator.take(iterator.num_trunks - len(self.trunks))
        self._batch_ids = [*(t.ids for t in self.trunks), *fresh]
        tasks = iterator.make(self._batch_ids)
        born = np.full(iterator.num_trunks, step, np.int32)
        born[: len(self.trunks)] = [t.born for t in self.trunks]
        prompts = replace(tasks.prompts, born_step=born)
        if not self.trunks:
            return replace(tasks, prompts=prompts)
        U, M, G = prompts.row_ids.shape
        # Few widths, because each is a program.
        longest = max(int(t.lengths.max()) for t in self.trunks)
        width = min(self.limit, -(-longest // self.new_tokens) * self.new_tokens)
        given = {
            "prefix_tokens": np.zeros((U, M, G, width), np.int32),
            "prefix_lengths": np.zeros((U, M, G), np.int32),
            "prefix_logprobs": np.zeros((U, M, G, width), np.float32),
            "prefix_ended": np.zeros((U, M, G), bool),
        }
        row_ids = prompts.row_ids.copy()
        for u, t in enumerate(self.trunks):
            row_ids[u], given["prefix_lengths"][u], given["prefix_ended"][u] = t.row_ids, t.lengths, t.ended
            given["prefix_tokens"][u], given["prefix_logprobs"][u] = t.tokens[..., :width], t.logprobs[..., :width]
        return replace(tasks, prompts=replace(prompts, row_ids=row_ids, **given))

    def settle(self, tasks: TaskBatch, rollouts: Rollouts) -> tuple[TaskBatch, Rollouts, Any]:
        """Take in a batch's rollouts.

        Returns:
            (tasks in which only groups that end now are real, rollouts whose `truncated` includes rows that repeat
            themselves, these rows bool [U, M, G]).
        """
        prompts, references = tasks.prompts, tasks.references
        shape = prompts.row_ids.shape
        fields = (prompts.prompt_mask, prompts.row_ids, prompts.born_step, rollouts.tokens, rollouts.mask,
                  rollouts.sampler_logprobs)  # fmt: skip
        real, row_ids, born, tokens, mask, logprobs = to_host(fields)
        tokens, mask, logprobs = (np.asarray(x).reshape(*shape, -1) for x in (tokens, mask, logprobs))
        lengths = mask.sum(-1, dtype=np.int32)
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[..., None], axis=-1)[..., 0]
        is_over = (np.isin(last, self.stop_ids) & (lengths > 0)) | (lengths >= self.limit)
        ended = np.zeros(shape, bool)
        for u, t in enumerate(self.trunks):
            ended[u] = t.ended
        for place in np.argwhere(~is_over & ~ended & real[..., None]):
            u, m, g = place
            ended[u, m, g] = repeats(tokens[u, m, g, : lengths[u, m, g]], self.repeat_window)
        finished = (is_over | ended).all(-1) & real
        trained = np.zeros(shape[:2], bool)
        for u, t in enumerate(self.trunks):
            trained[u] = t.trained
        ready = finished & ~trained
        self.trunks = [
            Trunk(
                ids=self._batch_ids[u], born=int(born[u]), row_ids=np.array(row_ids[u]), tokens=tokens[u],
                lengths=lengths[u], logprobs=logprobs[u], ended=ended[u], trained=trained[u] | ready[u],
            )
            for u in range(shape[0]) if not (finished[u] | ~real[u]).all()
        ]  # fmt: skip
        tasks = replace(
            tasks,
            prompts=replace(prompts, prompt_mask=sharded_like(prompts.prompt_mask, ready)),
            references=replace(
                references,
                task_ids=sharded_like(references.task_ids, np.where(ready, to_host(references.task_ids), -1)),
            ),
        )
        is_cut = to_host(rollouts.truncated) | ended.reshape(shape[0], -1)
        rollouts = replace(rollouts, truncated=sharded_like(rollouts.truncated, is_cut))
        return tasks, rollouts, sharded_like(references.task_ids, ended)

    def get_state(self) -> list:
        """Return the waiting trunks, JSON-able, bit for bit."""
        return [[t.ids, t.born, _packed({name: getattr(t, name) for name in _ARRAYS})] for t in self.trunks]

    def set_state(self, state: list) -> None:
        """Restore a state that `get_state` returned."""
        self.trunks = [Trunk(ids=ids, born=born, **_unpacked(text)) for ids, born, text in state]


def repeats(tokens: np.ndarray, window: int) -> bool:
    """Return whether the last `window` tokens are one piece, repeated four times or more; 0: never."""
    last = tokens[-window:]
    if not window or len(last) < window:
        return False
    return any((last[period:] == last[:-period]).all() for period in range(1, window // _REPEATS + 1))


def _packed(arrays: dict[str, np.ndarray]) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return {name: arrays[name] for name in arrays}
