"""The run directory: config.json, metrics.jsonl, TensorBoard events, sampled completions, and its progress bars.

Only the first process writes. A resumed run cuts metrics.jsonl back to the step it resumes from, so every step stands
there once.
"""

import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rpt_jax.config import Config
from rpt_jax.errors import CheckpointError

console = Console(stderr=True)

# What may differ when a run directory is used again: how long it goes on and what it writes on the way.
_FREE_FIELDS = {
    "run": ("directory", "num_steps", "completions_every_steps", "tensorboard"),
    "checkpoint": ("every_steps", "keep"),
}


@contextmanager
def progress_bar(description: str, total: int) -> Iterator:
    """A rich progress bar; yields update(completed, note)."""
    columns = (
        TextColumn("[bold]{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda completed, note="": progress.update(task, completed=completed, note=note)


class RunDirectory:
    """Opens or creates a run directory and writes its records.

    Raises:
        CheckpointError: the directory holds a run with another config, or files that are no run.
    """

    def __init__(self, config: Config):
        self.path = Path(config.run.directory)
        self._is_writer = jax.process_index() == 0
        existing = self.path / "config.json"
        if existing.exists():
            _check_same_run(Config.from_json(existing.read_text()), config, self.path)
        elif self.path.exists() and (not self.path.is_dir() or (self.path / "checkpoints").exists()):
            raise CheckpointError(
                f"run directory {self.path} exists and is not a run (no config.json); it must be new or hold a run of "
                "this config. Choose another --run.directory."
            )
        self._tensorboard = None
        if self._is_writer:
            self.path.mkdir(parents=True, exist_ok=True)
            existing.write_text(config.to_json())
            self.write_json("versions.json", _versions())
            if config.run.tensorboard:
                from tensorboardX import SummaryWriter  # slow to import

                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        self.metrics_path = self.path / "metrics.jsonl"

    def cut_metrics(self, stage: str, step: int) -> None:
        """Forget the stage's records after `step`: it is about to write them again."""
        if self._is_writer and self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines()
            kept = [s for s in lines if (r := json.loads(s))["stage"] != stage or r["step"] <= step]
            self.metrics_path.write_text("".join(f"{s}\n" for s in kept))

    def log(self, stage: str, step: int, record: dict) -> None:
        """Append one record: {"stage", "step", ...}; numbers also go to TensorBoard under the stage's name."""
        if not self._is_writer:
            return
        with self.metrics_path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | record) + "\n")
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{stage}/{name}", value, step)

    def records(self, stage: str) -> list[dict]:
        if not self.metrics_path.exists():
            return []
        return [r for line in self.metrics_path.read_text().splitlines() if (r := json.loads(line))["stage"] == stage]

    def write_json(self, name: str, value: dict) -> None:
        if self._is_writer:
            (self.path / name).write_text(json.dumps(value, indent=2))

    def write_completions(self, step: int, columns: dict[str, list]) -> None:
        """One rollout batch as completions/step_<n>.parquet."""
        if self._is_writer:
            directory = self.path / "completions"
            directory.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"step_{step:06d}.parquet")

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def _check_same_run(old: Config, new: Config, path: Path) -> None:
    def comparable(config: Config) -> dict:
        values = json.loads(config.to_json())
        for section, names in _FREE_FIELDS.items():
            for name in names:
                values[section].pop(name)
        # A linear schedule ends at num_steps, so changing it changes what was already done.
        if config.optimizer.schedule != "constant":
            values["run"]["num_steps"] = config.run.num_steps
        return values

    a, b = comparable(old), comparable(new)
    differing = [f"{s}.{n}: {a[s][n]} -> {b[s][n]}" for s in a for n in a[s] if a[s][n] != b[s][n]]
    if differing:
        raise CheckpointError(
            f"run directory {path} holds a run with another config ({'; '.join(differing)}); a run goes on only with "
            "its own. Choose another --run.directory, or undo these settings."
        )


def _versions() -> dict:
    from importlib.metadata import version

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "not a git checkout"
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
    device = jax.devices()[0]
    return {
        "commit": commit,
        "python": platform.python_version(),
        "devices": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "packages": {name: version(name) for name in packages},
    }


def to_host(metrics: dict) -> dict:
    """Device scalars to Python floats."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
