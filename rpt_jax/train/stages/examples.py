"""What the stages that learn examples of a file share: their fields, and the order of the examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from rpt_jax.config import Config
from rpt_jax.models.lora import Frozen

# Completions are padded to a multiple of this many tokens, so that few programs compile.
_WIDTH_STEP = 32


@dataclass(kw_only=True)
class ExampleTraining:
    """Part of a `training.Training` that takes each example once per epoch.

    Attributes:
        name, also_records, log_every_steps: see `training.Training`.
        config: of the run; supervised.batch_size examples make an update.
        mesh: that holds parameters and batches.
        optimizer: of the stage.
        examples: to learn.
        tail: ids that end every prompt.
        shuffle: reshuffle the examples each epoch; otherwise they keep their order.
        frozen: base weights of the state's adapters; None: the state holds the whole policy.
        position: number of examples taken.
    """

    name: str
    config: Config
    mesh: Any
    optimizer: Any
    examples: Sequence[Any]
    tail: Any
    shuffle: bool = True
    frozen: Frozen | None = None
    also_records: tuple[str, ...] = ()
    log_every_steps: int = 10
    position: int = 0

    @cached_property
    def order(self) -> grain.MapDataset:
        """Return the indices of the examples, endlessly."""
        return example_order(len(self.examples), shuffle=self.shuffle, seed=self.config.run.seed)

    def take(self) -> list[Any]:
        """Take the examples of the next update."""
        first, self.position = self.position, self.position + self.config.supervised.batch_size
        return [self.examples[self.order[i]] for i in range(first, self.position)]

    def get_cursor(self) -> dict:
        """Return {"position": number of examples taken}."""
        return {"position": self.position}

    def set_cursor(self, cursor: dict) -> None:
        """Continue from a position."""
        self.position = cursor["position"]


def example_order(num_examples: int, *, shuffle: bool, seed: int) -> grain.MapDataset:
    """Return endless indices, in file order or reshuffled each epoch."""
    order = grain.MapDataset.range(num_examples)
    return (order.seed(seed).shuffle() if shuffle else order).repeat()


def padded(
    trunks: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], config: Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return prompts and their completions as arrays.

    Args:
        trunks: token ids of U prompts.
        completions: token ids of up to R completions of each.
        config: sets L, data.trunk_length, and the most of C, rollout.max_completion_tokens.
    Returns:
        (trunk_tokens i32 [U, L], their lengths i32 [U], tokens i32 [U, R, C], mask bool [U, R, C]).
    """
    U, R = len(trunks), max(map(len, completions))
    longest = max(len(completion) for of in completions for completion in of)
    C = min(config.rollout.max_completion_tokens, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
    trunk_tokens, lengths = np.zeros((U, config.data.trunk_length), np.int32), np.zeros(U, np.int32)
    tokens, mask = np.zeros((U, R, C), np.int32), np.zeros((U, R, C), bool)
    for u, (trunk, of) in enumerate(zip(trunks, completions, strict=True)):
        trunk_tokens[u, : len(trunk)], lengths[u] = trunk, len(trunk)
        for r, completion in enumerate(of):
            tokens[u, r, : len(completion)], mask[u, r, : len(completion)] = completion, True
    return trunk_tokens, lengths, tokens, mask
