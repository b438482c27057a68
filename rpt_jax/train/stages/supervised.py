"""Next-token and completion-only training: the objective of RPT with likelihood terms alone.

The warm start (documents and worked thoughts) and the control (documents at matched compute) use it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rpt_jax.config import Config
from rpt_jax.data.examples import Example
from rpt_jax.models.lora import join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.update import update
from rpt_jax.sequences import one_completion_each, trunks_alone
from rpt_jax.train.recorder import to_floats
from rpt_jax.train.stages.examples import ExampleTraining, example_order
from rpt_jax.train.training import Outcome
from rpt_jax.types import Rows, Sequences, TrainState
from rpt_jax.work import num_parameters, update_flops


@dataclass(kw_only=True)
class Supervised(ExampleTraining):
    """The steps of supervised training; a `training.Training`."""

    _stream: Iterator | None = field(default=None, repr=False)

    @needs_memory("supervised training", "--supervised.batch-size, in a new run")
    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Update on the next batch."""
        if self._stream is None:
            self._stream = batches(self.examples, self.config, self.tail, shuffle=self.shuffle, position=self.position)
        rows, num_tokens, self.position = next(self._stream)
        num_params = num_parameters(join(self.frozen, state.params))
        state, metrics = update(
            state,
            [shard_batch(self.mesh, rows)],
            loss_fn=objective_fn(self.config.model, self.config.loss),
            optimizer=self.optimizer,
            frozen=self.frozen,
        )
        flops = update_flops(num_params, num_tokens, has_adapters=self.frozen is not None)
        return state, Outcome(flops=lambda: flops, record=lambda: to_floats(metrics))

    def set_cursor(self, cursor: dict) -> None:
        """Continue from a position."""
        super().set_cursor(cursor)
        self._stream = None


def make_batch(examples: list[Example], config: Config, tail) -> Rows:
    """Build dense NumPy Rows, one trunk per example; R is 1 if any example has a completion, else 0.

    Args:
        examples: of the batch; their number is U.
        config: sets L, data.trunk_length, and C, rollout.max_completion_tokens.
        tail: ids that end every prompt.
    """
    U, L, C = len(examples), config.data.trunk_length, config.rollout.max_completion_tokens
    trunk_tokens, trunk_weights = np.zeros((U, L), np.int32), np.zeros((U, L), np.float32)
    cuts, tokens, mask = np.ones(U, np.int32), np.zeros((U, C), np.int32), np.zeros((U, C), bool)
    is_given = np.zeros((U, 1, C), bool)
    for u, e in enumerate(examples):
        trunk_tokens[u, : len(e.trunk)] = e.trunk
        trunk_weights[u, e.first : len(e.trunk)] = e.weight
        if e.completion is not None:
            cuts[u] = len(e.trunk)
            tokens[u, : len(e.completion)] = e.completion
            mask[u, : len(e.completion)] = True
            is_given[u, :, : e.given] = True
    if not mask.any():
        return _weighted(trunks_alone(trunk_tokens), trunk_weights)
    return _weighted(one_completion_each(trunk_tokens, cuts, tail, tokens, mask), trunk_weights, is_given)


def make_packed_batch(
    next_example: Callable[[], Example], num_rows: int, config: Config, tail
) -> tuple[Rows, int, int]:
    """Pack examples into trunks, in order.

    A trunk is trunk_length + tail + max_completion_tokens long, so that every example fits. Each example goes to the
    first trunk with enough space. The batch is complete when no trunk has space for one, which starts the next batch.
    Prompt, tail and completion are one segment of the trunk; completion tokens have weight 1, tail and given ones 0.

    Args:
        next_example: returns the next example; the last one that it returns is not taken.
        num_rows: U, number of trunks.
        config: sets the length of a trunk.
        tail: ids that end every prompt.
    Returns:
        (NumPy Rows without branches, number of examples taken, number of their tokens).
    """
    L = config.data.trunk_length + len(tail) + config.rollout.max_completion_tokens
    tokens, weights = np.zeros((num_rows, L), np.int32), np.zeros((num_rows, L), np.float32)
    segments, used = np.zeros((num_rows, L), np.int32), np.zeros(num_rows, int)
    taken = 0
    while True:
        example = next_example()
        size = example.num_tokens(len(tail))
        rows = np.flatnonzero(used + size <= L)
        if not len(rows):
            break
        row, start = rows[0], used[rows[0]]
        completion = [] if example.completion is None else [*tail, *example.completion]
        tokens[row, start : start + size] = [*example.trunk, *completion]
        weights[row, start + example.first : start + len(example.trunk)] = example.weight
        if completion:
            weights[row, start + size - len(example.completion) + example.given : start + size] = 1.0
        segments[row, start : start + size] = taken + 1
        used[row] += size
        taken += 1
    return _weighted(trunks_alone(tokens, segments), weights), taken, int(used.sum())


def _weighted(sequences: Sequences, trunk_weights, is_given=False) -> Rows:
    """Build Rows whose weights sum to 1, without a policy term; given completion tokens have none."""
    mask = sequences.branch_mask
    learned = mask & ~np.asarray(is_given)
    total = max(1e-9, trunk_weights.sum() + learned.sum())
    return Rows(
        sequences=sequences,
        row=np.where(mask, np.arange(mask.shape[1], dtype=np.int32)[:, None], -1),
        policy_weights=None,
        advantages=None,
        likelihood_weights=(learned / total).astype(np.float32),
        trunk_weights=(trunk_weights / total).astype(np.float32),
        temperature=np.ones(mask.shape, np.float32),
        sampler_logprobs=None,
        old_logprobs=None,
        ref_logprobs=None,
    )


def batches(
    examples: Sequence[Example], config: Config, tail, *, shuffle: bool, position: int = 0
) -> Iterator[tuple[Rows, int, int]]:
    """Yield batches endlessly as (Rows, number of tokens, examples taken so far). Each example is used once per epoch.

    Args:
        examples: to learn.
        config: of the run.
        tail: ids that end every prompt.
        shuffle: reshuffle the examples each epoch.
        position: number of examples taken before the first batch.
    """
    order = example_order(len(examples), shuffle=shuffle, seed=config.run.seed)
    size = config.supervised.batch_size
    while True:
        if config.supervised.pack:
            following = (examples[order[i]] for i in itertools.count(position))
            batch, taken, num_tokens = make_packed_batch(following.__next__, size, config, tail)
        else:
            rows = [examples[order[position + i]] for i in range(size)]
            batch, taken = make_batch(rows, config, tail), size
            num_tokens = sum(e.num_tokens(len(tail)) for e in rows)
        position += taken
        yield batch, num_tokens, position
