"""The interface between `loop.fit` and one kind of training: its steps, their outcomes, and when it ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rpt_jax.types import TrainState


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step, still on the devices. Reading a field may wait for them.

    Attributes:
        flops: returns the FLOPs of the step.
        record: returns the step's record, which includes "skipped".
    """

    flops: Callable[[], float]
    record: Callable[[], dict]


@dataclass(frozen=True)
class Until:
    """When training ends: after `steps` steps, or with the step that reaches `flops` FLOPs. One of the two is set."""

    steps: int | None = None
    flops: float | None = None

    def is_reached(self, step: int, flops: float) -> bool:
        """Return whether training ends after this many steps and FLOPs."""
        return step >= self.steps if self.steps is not None else flops >= self.flops

    def percent(self, step: int, flops: float) -> int:
        """Return the progress in percent, at most 100."""
        return min(100, round(100 * (step / self.steps if self.steps is not None else flops / max(self.flops, 1.0))))


class Training(Protocol):
    """One kind of training.

    Attributes:
        name: stage of its records.
        also_records: stages of other records that belong to its steps, such as evaluations.
        log_every_steps: interval of the steps whose records are kept; the last step's is always kept.
    """

    name: str
    also_records: tuple[str, ...]
    log_every_steps: int

    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Run step `number`, counted from 0.

        Raises:
            Interrupted, RewardError, DataError: before the state changes.
        """
        ...

    def get_cursor(self) -> dict:
        """Return the current position in the data, JSON-able."""
        ...

    def set_cursor(self, cursor: dict) -> None:
        """Continue the data from a position that `get_cursor` returned."""
        ...
