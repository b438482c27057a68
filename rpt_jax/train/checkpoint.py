"""Checkpoints of one stage of a run: the train state, and a JSON record of everything else that a resume needs.

Orbax writes in the background and commits by an atomic rename, but it restores flipped bits silently. So a checkpoint
counts only with its manifest, the SHA-256 of every file, which is written last and verified before loading. A damaged
or unfinished checkpoint is reported and set aside, and the previous one is used.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.distributed import from_main, is_main
from rpt_jax.train.progress import console
from rpt_jax.train.run_directory import write_atomically
from rpt_jax.types import TrainState

MANIFEST = "manifest.json"
# Results of `_choose` that are not a step.
_NONE, _ALL_DAMAGED = -1, -2
_UNFINISHED = "its manifest cannot be read"


class Checkpoints:
    """Saves and restores `TrainState` with a JSON record, e.g. the data cursor.

    As a context manager, it waits on exit until everything is on disk.

    Args:
        directory: of this stage; each checkpoint is a subdirectory named by its step.
        keep: number of newest checkpoints to keep.
        step: the checkpoint to resume from; newer ones are set aside. None: the newest intact one.
        read_only: change nothing on disk, because the run may be active elsewhere.
    Attributes:
        latest_step: step of the checkpoint to restore, or of the newest save; None: there is none.
    Raises:
        CheckpointError: no intact checkpoint of `step`; or there are checkpoints, but none is intact.
    """

    def __init__(self, directory: Path, *, keep: int, step: int | None = None, read_only: bool = False):
        self._directory, self._keep, self._read_only = directory.absolute(), keep, read_only
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        found = self._choose(step) if is_main() else 0
        found = from_main(found)
        self.latest_step = None if found < 0 else found
        if found == _ALL_DAMAGED:
            raise CheckpointError(
                f"{directory} holds checkpoints, but none is intact; the stage would start from scratch. Restore one "
                f"from a backup (damaged ones are moved to {self._directory.parent / 'set_aside'}), or choose another "
                "--run.directory."
            )
        if step is not None and self.latest_step != step:
            raise CheckpointError(
                f"no intact checkpoint of step {step} in {directory}; there are steps {steps_of(self._directory)}. "
                "Set --run.resume to one of them, or to latest."
            )

    def _choose(self, step: int | None) -> int:
        """Return the newest intact step, or `step`, else _NONE or _ALL_DAMAGED; set newer checkpoints aside."""
        for leftover in self._directory.glob("*orbax-checkpoint-tmp*"):
            if not self._read_only:
                shutil.rmtree(leftover)
        steps = steps_of(self._directory)
        if step is not None:
            if step not in steps or find_damage(self._directory / str(step)):
                return _NONE
            for newer in steps[steps.index(step) + 1 :]:
                self._set_aside(self._directory / str(newer), f"the run resumes from step {step}")
            return step
        for candidate in reversed(steps):
            path = self._directory / str(candidate)
            if not (problem := find_damage(path)):
                return candidate
            console.print(f"[bold red]checkpoint {path}[/]: {problem}; it is skipped")
            self._set_aside(path, problem)
        # An interrupted first save leaves one checkpoint without a manifest; the stage then starts from scratch.
        is_first = len(steps) == 0 or (len(steps) == 1 and problem.startswith(_UNFINISHED))
        return _NONE if is_first else _ALL_DAMAGED

    def _set_aside(self, path: Path, why: str) -> None:
        """Move a checkpoint out of the run's way instead of deleting it."""
        if self._read_only:
            return
        place = self._directory.parent / "set_aside"
        place.mkdir(exist_ok=True)
        name = f"{self._directory.name}-{path.name}"
        number = sum(1 for p in place.iterdir() if p.name.split(".")[0] == name)
        target = place / f"{name}.{number}"
        path.rename(target)
        (target / "why.txt").write_text(why + "\n")

    def save(self, step: int, state: TrainState, record: dict) -> None:
        """Write a checkpoint in the background; `state` may be donated as soon as this returns.

        Args:
            step: number of steps done; nothing happens if its checkpoint is the latest.
            state: to save.
            record: to save with it, JSON-able.
        Raises:
            CheckpointError: the previous save failed, or this one cannot start.
        """
        self.wait()
        if self.latest_step == step:
            return
        path = self._directory / str(step)
        try:
            response = ocp.save_checkpointables_async(path, {"state": _saved(state), "record": record})
        except OSError as error:
            raise _unwritten(path, error) from error

        def finish() -> None:
            try:
                response.result()
                if is_main():
                    write_manifest(path)
            except Exception as error:  # the next call raises it, in the thread that can act on it
                self._failure = _unwritten(path, error)
            else:
                if is_main():
                    self._remove_old()

        self.latest_step = step
        self._writer = threading.Thread(target=finish)
        self._writer.start()

    def _remove_old(self) -> None:
        for old in steps_of(self._directory)[: -self._keep]:
            try:
                # Delete the manifest first: without it, the rest does not count as a checkpoint after an interruption.
                (self._directory / str(old) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self._directory / str(old))
            except OSError as error:  # the new one is intact; the next save tries again
                console.print(f"checkpoint {self._directory / str(old)} could not be removed ({error})")

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: the save failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the failure of the last background save if it is known; do not wait.

        Raises:
            CheckpointError: the save failed.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the checkpoint of `latest_step`, on the devices and in the shardings of `like`.

        Returns:
            (state, record).
        Raises:
            CheckpointError: there is none, or it does not match the shapes of `like`.
        """
        self.wait()
        step = self.latest_step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._directory}; start the stage from its beginning.")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(like))
        try:
            restored = ocp.load_checkpointables(self._directory / str(step), {"state": abstract, "record": None})
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {self._directory} step {step} does not fit this run ({error}); the model and optimizer "
                "settings must match those that wrote it. Choose another --run.directory."
            ) from error
        return TrainState(**{"companions": {}} | restored["state"]), _current(restored["record"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.wait()


def _saved(state: TrainState) -> dict[str, Any]:
    """Return the fields of a state to save; empty companions are left out, as in checkpoints of earlier versions."""
    return {name: value for name, value in vars(state).items() if name != "companions" or value}


def _current(record: dict) -> dict:
    """Return a record as `loop.fit` reads it; earlier versions keep the data cursor as "tasks" or "position"."""
    if "cursor" in record or "flops" not in record:
        return record
    rest = {name: value for name, value in record.items() if name not in ("tasks", "position")}
    return rest | {"cursor": record["tasks"] if "tasks" in record else {"position": record["position"]}}


def _unwritten(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} could not be written ({error}); earlier ones are untouched. Free disk space or fix the "
        "permissions, then run the same command again."
    )


def steps_of(directory: Path) -> list[int]:
    """Return the steps of the stage's checkpoints, intact or not, in ascending order."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


# --- The manifest -------------------------------------------------------------------------------------------------


def write_manifest(path: Path) -> None:
    """Write the digests of all files of a checkpoint, and of the manifest itself."""
    body = json.dumps(dict(_digests(path, _files(path))), indent=1, sort_keys=True)
    write_atomically(path / MANIFEST, _sealed(body))


def find_damage(path: Path) -> str:
    """Return a description of a checkpoint's damage; empty if every file in its manifest is as it was written."""
    try:
        text = (path / MANIFEST).read_text()
    except (OSError, ValueError) as error:
        return f"{_UNFINISHED} ({error}), so it is unfinished or damaged"
    body = text.rpartition("\n}")[0] + "\n}"
    if text != _sealed(body):
        return "its manifest is damaged"
    expected = json.loads(body)
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
        return "its manifest names files outside the checkpoint"
    missing = [name for name in expected if not (path / name).is_file()]
    if missing:
        return f"{len(missing)} file(s) are missing ({missing[0]})"
    differing = [name for name, digest in _digests(path, sorted(expected)) if digest != expected[name]]
    return f"{len(differing)} file(s) differ from their digests ({differing[0]})" if differing else ""


def _sealed(body: str) -> str:
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digests(path: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    def digest(name: str) -> str:
        with (path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        yield from zip(names, pool.map(digest, names), strict=True)
