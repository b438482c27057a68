"""The run directory: config.json, metrics.jsonl, TensorBoard events, sampled completions.

A resumed run cuts metrics.jsonl back to the step it resumes from, so every step stands there once. Of several
processes the first writes.
"""

import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import pyarrow
import pyarrow.parquet

from rpt_jax.config import Config
from rpt_jax.config.schema import from_json, walk
from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.distributed import from_main, is_main, main_first
from rpt_jax.train.progress import console

# Written when all stages of a run are done; removed while it goes on for longer.
FINISHED = "finished.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: an interruption leaves the old one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_records(directory: Path) -> list[dict]:
    """Records of metrics.jsonl; a last line that an interruption cut off is left out."""
    path = directory / "metrics.jsonl"
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(complete, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"{path} line {number} is damaged ({error}); remove the line.") from error
    return records


def _ends_whole(path: Path) -> bool:
    """The file's last line is complete."""
    return not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")


def read_json(path: Path) -> dict:
    """A JSON file of a run directory; raises CheckpointError where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); choose another --run.directory.") from error


def read_config(directory: Path, *, say: bool = True) -> Config:
    """The config of a run, whichever version made it.

    Args:
        say: print which fields were moved or filled in.
    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: see `schema.from_json`.
    """
    config, notes = from_json(Config, json.dumps(read_json(directory / "config.json")))
    if say and notes and is_main():
        console.print(f"{directory} was made by an earlier version: {'; '.join(notes)}")
    return config


class RunDirectory:
    """Opens or creates a run directory and writes its records.

    Raises:
        CheckpointError: the directory holds a run with another config or corpus, or files that are no run.
    """

    def __init__(self, config: Config, corpus: dict, *, read_only: bool = False):
        """
        Args:
            corpus: what identifies the data; a run goes on only with its own.
            read_only: write nothing, for the run may be going on elsewhere.
        """
        self.path = Path(config.run.directory)
        self._tensorboard = None
        self._writes = is_main() and not read_only
        self._use_tensorboard = config.run.tensorboard and self._writes
        self._read_only = read_only
        with main_first("run directory"):
            self._open(config, corpus)

    def _open(self, config: Config, corpus: dict) -> None:
        saved = self.path / "config.json"
        if not is_main() and not saved.exists():
            raise CheckpointError(
                f"process 0 has opened run directory {self.path}, and it is not there for process "
                f"{jax.process_index()}; all processes must see one file system. Choose a shared --run.directory."
            )
        if saved.exists():
            _check_same_run(
                read_config(self.path, say=False),
                config,
                self.path,
                {"always", "to readers"} if self._read_only else {"always"},
            )
            _check_same_corpus(read_json(self.path / "corpus.json"), corpus, self.path)
        elif self.path.exists() and (not self.path.is_dir() or (self.path / "checkpoints").exists()):
            raise CheckpointError(
                f"run directory {self.path} exists and is not a run (no config.json); it must be new or hold a run of "
                "this config. Choose another --run.directory."
            )
        elif config.run.resume.isdigit():
            raise CheckpointError(
                f"run.resume={config.run.resume}, and {self.path} holds no run to go on with. Check --run.directory."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "versions.json", json.dumps(_versions(), indent=2))
            write_atomically(self.path / "corpus.json", json.dumps(corpus, indent=2))
        if self._writes:
            (self.path / FINISHED).unlink(missing_ok=True)
            # A step to go back to is meant once; a later reader of this file goes on from the newest.
            kept = replace(config.run, resume="latest") if config.run.resume.isdigit() else config.run
            write_atomically(saved, replace(config, run=kept).to_json())

    def remember(self, name: str, value: dict) -> None:
        """Keep `value` as <name>.json; raises CheckpointError where the run was made with another."""
        path = self.path / f"{name}.json"
        if not path.exists():
            if self._writes:
                write_atomically(path, json.dumps(value, indent=2))
        elif (old := read_json(path)) != value:
            raise CheckpointError(
                f"run directory {self.path} was made with another {name}: {old} -> {value}; a run goes on only with "
                "its own. Restore it, or choose another --run.directory."
            )

    def has_record(self, stage: str, step: int) -> bool:
        """Whether metrics.jsonl has the stage's record of this step; one answer for all processes."""
        records = read_records(self.path) if is_main() else ()
        return bool(from_main(any(r["stage"] == stage and r["step"] == step for r in records)))

    def cut_metrics(self, stage: str, step: int) -> None:
        """Forget the stage's records after `step`: it is about to write them again."""
        if not self._writes:
            return
        records = read_records(self.path)
        kept = [r for r in records if r["stage"] != stage or r["step"] <= step]
        if len(kept) == len(records) and _ends_whole(self.path / "metrics.jsonl"):
            return
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))

    def log(self, stage: str, step: int, record: dict) -> None:
        """Append one record: {"stage", "step", ...}; numbers also go to TensorBoard under the stage's name."""
        if not self._writes:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | record) + "\n")
        if not self._use_tensorboard:
            return
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter  # slow to import

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in record.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(f"{stage}/{name}", value, step)

    def write_completions(self, step: int, columns: dict[str, list]) -> None:
        """One rollout batch as completions/step_<n>.parquet."""
        directory = self.path / "completions"
        directory.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"step_{step:06d}.parquet")

    def finish(self) -> None:
        """All stages are done."""
        if self._writes:
            write_atomically(self.path / FINISHED, "{}\n")

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def _check_same_corpus(old: dict, new: dict, path: Path) -> None:
    differing = [f"{part}: {old.get(part)} -> {new[part]}" for part in new if old.get(part) != new[part]]
    if differing:
        raise CheckpointError(
            f"run directory {path} was made from other data ({'; '.join(differing)}); a run goes on only with its own. "
            "Restore the files, or choose another --run.directory."
        )


def _check_same_run(old: Config, new: Config, path: Path, free: set[str]) -> None:
    def comparable(config: Config) -> dict:
        values = {name: value for name, f, value in walk(config) if f.metadata.get("free") not in free}
        # A linear schedule ends at num_steps, so changing it changes what was already done.
        is_scheduled = config.optimizer.schedule != "constant"
        return values | {"run.num_steps": config.run.num_steps if is_scheduled else "free"}

    a, b = comparable(old), comparable(new)
    # A value that an earlier version did not keep is whatever it is resolved to now.
    unkept = {name for name, f, value in walk(old) if f.metadata.get("resolved") and not value}
    differing = [f"{name}: {a[name]} -> {b[name]}" for name in a if a[name] != b[name] and name not in unkept]
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
