"""What `loop.fit` needs to know of one kind of training: its steps, what they leave behind, and where they end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rpt_jax.types import TrainState


@dataclass(frozen=True)
class Outcome:
    """What a step leaves behind, still on the devices.

    Attributes:
        flops: FLOPs of the step. record: its record, "skipped" among it. Both may wait for the devices.
    """

    flops: Callable[[], float]
    record: Callable[[], dict]


@dataclass(frozen=True)
class Until:
    """Where training ends: after so many steps, or with the step that has spent so many FLOPs."""

    steps: int | None = None
    flops: float | None = None

    def is_reached(self, step: int, flops: float) -> bool:
        return step >= self.steps if self.steps is not None else flops >= self.flops

    def percent(self, step: int, flops: float) -> int:
        """Of the way, at most 100."""
        return min(100, round(100 * (step / self.steps if self.steps is not None else flops / max(self.flops, 1.0))))


class Training(Protocol):
    """One kind of step.

    Attributes:
        name: of its records and checkpoints.
        also_records: stages of other records that belong to a step, such as evaluations.
        log_every_steps: how often a step's record is kept; the last one is in any case.
    """

    name: str
    also_records: tuple[str, ...]
    log_every_steps: int

    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Step `number`, counted from 0. Raises Interrupted, RewardError or DataError before it changes the state."""
        ...

    def get_cursor(self) -> dict:
        """JSON-able: where the data stands."""
        ...

    def set_cursor(self, cursor: dict) -> None: ...
