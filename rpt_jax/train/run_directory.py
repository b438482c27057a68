"""The run directory: config.json, metrics.jsonl, TensorBoard events, sampled completions.

A resumed run cuts metrics.jsonl back to the step it resumes from, so every step appears there once. If there are
several processes, process 0 writes.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import pyarrow
import pyarrow.parquet

from rpt_jax.config import Config
from rpt_jax.config.schema import from_json, walk
from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.distributed import from_main, is_main, main_first
from rpt_jax.parallel.programs import Compilations
from rpt_jax.train.progress import console

# Written when all stages of a run are done; removed when the run starts again, e.g. to continue for longer.
FINISHED = "finished.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole; an interruption leaves the old one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_records(directory: Path) -> list[dict]:
    """Read the records of metrics.jsonl; see `_read_lines`."""
    return _read_lines(directory / "metrics.jsonl")


def read_seconds(directory: Path, stage: str) -> list[float]:
    """Return the wall times of a stage's steps, in seconds and in order. A step that was done twice counts once."""
    by_step = {r["step"]: r["seconds"] for r in _read_lines(directory / "times.jsonl") if r["stage"] == stage}
    return [by_step[step] for step in sorted(by_step)]


def _read_lines(path: Path) -> list[dict]:
    """Read the records of a JSONL file, except a last line that an interruption cut off.

    Raises:
        CheckpointError: another line is damaged.
    """
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(complete, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(
                f"{path} line {number} is damaged ({error}); it must be JSON. Remove the line."
            ) from error
    return records


def _ends_whole(path: Path) -> bool:
    """Return whether the file's last line is complete."""
    return not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")


def read_json(path: Path) -> dict:
    """Read a JSON file of a run directory.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); choose another --run.directory.") from error


def read_config(directory: Path, *, say: bool = True) -> Config:
    """Read the config of a run, made by this version or an earlier one.

    Args:
        directory: of the run.
        say: print which fields were moved or filled in.
    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: see `schema.from_json`.
    """
    config, notes = from_json(Config, json.dumps(read_json(directory / "config.json")))
    if say and notes and is_main():
        console.print(f"{directory} was made by an earlier version: {'; '.join(notes.values())}")
    return config


class RunDirectory:
    """Opens or creates a run directory and writes its records.

    Attributes:
        path: of the directory.
    Raises:
        CheckpointError: the directory holds a run with another config or corpus, or files that are not a run.
    """

    def __init__(self, config: Config, corpus: dict, *, read_only: bool = False, judges: bool = False):
        """
        Args:
            config: of the run.
            corpus: JSON-able, identifies the data; a run resumes only with the same data.
            read_only: write nothing to an existing run, because it may be active elsewhere.
            judges: the data and all settings but those that made the policy may differ from the run's.
        """
        self.path = Path(config.run.directory)
        self._tensorboard = None
        self._writes = is_main() and not read_only
        self._use_tensorboard = config.run.tensorboard and self._writes
        self._read_only, self._judges = read_only, judges
        with main_first("run directory"):
            self._open(config, corpus)

    def _open(self, config: Config, corpus: dict) -> None:
        saved = self.path / "config.json"
        if not is_main() and not saved.exists():
            raise CheckpointError(
                f"process 0 has opened run directory {self.path}, but process {jax.process_index()} does not find it; "
                "all processes must share a file system. Choose a shared --run.directory."
            )
        if saved.exists():
            free = {"always", "to readers"} if self._read_only else {"always"}
            apart = _MAY_DIFFER_IN_JUDGING if self._judges else ()
            _check_same_run(read_config(self.path, say=False), config, self.path, free, apart)
            old = read_json(self.path / "corpus.json")
            if self._judges and _reads_other_data(read_config(self.path, say=False), config):
                old, corpus = ({"tokenizer": of.get("tokenizer")} for of in (old, corpus))
            _check_same_corpus(old, corpus, self.path)
        elif self.path.exists() and (not self.path.is_dir() or (self.path / "checkpoints").exists()):
            raise CheckpointError(
                f"run directory {self.path} exists but is not a run (no config.json); it must be new or hold a run of "
                "this config. Choose another --run.directory."
            )
        elif config.run.resume.isdigit():
            raise CheckpointError(
                f"run.resume={config.run.resume}, but {self.path} holds no run to resume. Check --run.directory."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "versions.json", json.dumps(_versions(), indent=2))
            write_atomically(self.path / "corpus.json", json.dumps(corpus, indent=2))
        if self._writes:
            (self.path / FINISHED).unlink(missing_ok=True)
            # A step to go back to applies to this start only; later readers of this file use the newest checkpoint.
            kept = replace(config.run, resume="latest") if config.run.resume.isdigit() else config.run
            write_atomically(saved, replace(config, run=kept).to_json())

    def remember(self, name: str, value: dict) -> None:
        """Keep `value` as <name>.json.

        Raises:
            CheckpointError: the run was made with another value.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            if self._writes:
                write_atomically(path, json.dumps(value, indent=2))
        elif (old := read_json(path)) != value and not (self._judges and name == "proxy"):
            raise CheckpointError(
                f"run directory {self.path} was made with another {name}: {old} -> {value}; it must stay the "
                "same. Restore it, or choose another --run.directory."
            )

    def keep(self, name: str, value: dict) -> None:
        """Write `value` as <name>.json, unless the run is only read."""
        if self._writes:
            write_atomically(self.path / f"{name}.json", json.dumps(value, indent=2))

    @property
    def is_read_only(self) -> bool:
        """Return whether the run may be active elsewhere, so that nothing of it changes."""
        return self._read_only

    def has_record(self, stage: str, step: int) -> bool:
        """Return whether metrics.jsonl has the stage's record of this step; all processes get the same answer."""
        records = read_records(self.path) if is_main() else ()
        return bool(from_main(any(r["stage"] == stage and r["step"] == step for r in records)))

    def cut_metrics(self, stage: str, step: int) -> None:
        """Remove the stage's records and completions after `step`, which it is about to write again."""
        if not self._writes:
            return
        for path in (self.path / "completions").glob(f"{'step' if stage == 'rpt' else stage}_*.parquet"):
            if int(path.stem.rpartition("_")[2]) > step:
                path.unlink()
        records = read_records(self.path)
        kept = [r for r in records if r["stage"] != stage or r["step"] <= step]
        if len(kept) == len(records) and _ends_whole(self.path / "metrics.jsonl"):
            return
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))

    def log(self, stage: str, step: int, record: dict) -> None:
        """Append one record {"stage", "step", ...}; scalars also go to TensorBoard under the stage's name."""
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

    def log_programs(self, stage: str, step: int, found: Compilations) -> None:
        """Append the programs compiled since the last record to programs.jsonl. They depend on the cache."""
        record = {"stage": stage, "step": step} | vars(found)
        if self._writes:
            with (self.path / "programs.jsonl").open("a") as file:
                file.write(json.dumps(record | {"seconds": round(found.seconds, 2)}) + "\n")

    def log_seconds(self, stage: str, step: int, seconds: float) -> None:
        """Append the wall time of a step to times.jsonl. The last line of a step that was done twice counts."""
        if self._writes:
            with (self.path / "times.jsonl").open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, "seconds": round(seconds, 3)}) + "\n")

    def write_completions(self, name: str, step: int, columns: dict[str, list]) -> None:
        """Write rows (`rollout.completions`) to completions/<name>_<step>.parquet, as a whole or not at all."""
        if not self._writes:
            return
        path = self.path / "completions" / f"{name}_{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        pyarrow.parquet.write_table(pyarrow.table(columns), partial, compression="zstd")
        os.replace(partial, path)

    def finish(self) -> None:
        """Mark all stages of the run as done."""
        if self._writes:
            write_atomically(self.path / FINISHED, "{}\n")

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _check_same_corpus(old: dict, new: dict, path: Path) -> None:
    differing = [f"{part}: {old.get(part)} -> {new[part]}" for part in new if old.get(part) != new[part]]
    if differing:
        raise CheckpointError(
            f"run directory {path} was made from other data ({'; '.join(differing)}); a run must keep its data. "
            "Restore the files, or choose another --run.directory."
        )


# Sections of the settings that an evaluation reads. The policy was made with the others.
_MAY_DIFFER_IN_JUDGING = ("run", "data", "questions", "positions", "proxy", "steps", "rollout", "reward", "eval")


def _check_same_run(old: Config, new: Config, path: Path, free: set[str], apart: Sequence[str] = ()) -> None:
    def comparable(config: Config) -> dict:
        values = {name: value for name, f, value in walk(config) if f.metadata.get("free") not in free}
        values = {n: value for n, value in values.items() if n.split(".")[0] not in apart}
        # A linear schedule ends at num_steps, so another num_steps would change the steps already done.
        is_scheduled = config.optimizer.schedule != "constant"
        return values | {"run.num_steps": config.run.num_steps if is_scheduled else "free"}

    a, b = comparable(old), comparable(new)
    # A resolved value that an earlier version did not store is not compared.
    unkept = {name for name, f, value in walk(old) if f.metadata.get("resolved") and not value}
    differing = [f"{name}: {a[name]} -> {b[name]}" for name in a if a[name] != b[name] and name not in unkept]
    if differing:
        raise CheckpointError(
            f"run directory {path} holds a run with another config ({'; '.join(differing)}); a run must keep "
            "its config. Choose another --run.directory, or undo these changes."
        )


def _reads_other_data(old: Config, new: Config) -> bool:
    """Return whether the settings name other texts or questions, so that other data are meant."""

    def named(config: Config) -> tuple:
        # The cache is where tokens are kept, not what they are.
        data = replace(config.data, cache="", tokenizer="")
        return data, config.questions, config.eval.max_documents

    return named(old) != named(new)


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
