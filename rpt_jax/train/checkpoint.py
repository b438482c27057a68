"""Checkpoints of one stage of a run: the train state, and a JSON record of everything else that a resume needs.

Orbax commits by an atomic rename, so an interrupted save is never picked up.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rpt_jax.errors import CheckpointError
from rpt_jax.types import TrainState


class Checkpoints:
    """Saves and restores `TrainState` with a JSON-able record, e.g. the data cursor.

    Args:
        directory: of this stage. keep: newest checkpoints kept.
    """

    def __init__(self, directory: Path, *, keep: int):
        policies = ocp.training.preservation_policies
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(), cleanup_tmp_directories=True, preservation_policy=policies.LatestN(keep)
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, record: dict) -> None:
        """Write and wait: the next update donates these very buffers."""
        if self.latest_step != step:
            self._checkpointer.save_checkpointables(step, {"state": state, "record": record})

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, on the devices and in the shardings of `like`.

        Raises:
            CheckpointError: there is none, or it does not fit the parameters.
        """
        step = self.latest_step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._directory}; start the stage from its beginning.")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            restored = self._checkpointer.load_checkpointables(step, {"state": abstract, "record": None})
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {self._directory} step {step} does not fit this run ({error}); the model and optimizer "
                "settings must be those that wrote it. Choose another --run.directory."
            ) from error
        return restored["state"], restored["record"]

    def close(self) -> None:
        self._checkpointer.close()
