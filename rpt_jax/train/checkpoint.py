"""Checkpoints of one stage of a run: the train state, and a JSON record of everything else that a resume needs.

Orbax writes in the background and commits by an atomic rename, but it restores flipped bits without a word. So a
checkpoint counts only with its manifest, the SHA-256 of every file, which is written last and verified before loading.
A damaged or unfinished one is named and set aside, and the one before it is taken.
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
# In place of a step.
_NONE, _ALL_DAMAGED = -1, -2
_UNFINISHED = "its manifest cannot be read"


class Checkpoints:
    """Saves and restores `TrainState` with a JSON-able record, e.g. the data cursor; a context that ends when all is
    on disk.

    Args:
        directory: of this stage; a checkpoint is its subdirectory, named by the step.
        keep: newest checkpoints kept.
        step: the one to go on from; newer ones are set aside. None: the newest that is whole.
        read_only: touch nothing, for the run may be going on elsewhere.
    Raises:
        CheckpointError: no whole checkpoint of `step`; or there are checkpoints, and none of them is whole.
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
                f"{directory} holds checkpoints and none of them is whole; the stage would begin anew. Restore one of "
                f"{self._directory.parent / 'set_aside'} from a copy, or choose another --run.directory."
            )
        if step is not None and self.latest_step != step:
            raise CheckpointError(
                f"no whole checkpoint of step {step} in {directory}; there are steps {steps_of(self._directory)}. "
                "Choose one with --run.resume, or latest."
            )

    def _choose(self, step: int | None) -> int:
        """The newest whole checkpoint, or `step`; sets aside what is newer. Else _NONE or _ALL_DAMAGED."""
        for leftover in self._directory.glob("*orbax-checkpoint-tmp*"):
            if not self._read_only:
                shutil.rmtree(leftover)
        steps = steps_of(self._directory)
        if step is not None:
            if step not in steps or find_damage(self._directory / str(step)):
                return _NONE
            for newer in steps[steps.index(step) + 1 :]:
                self._set_aside(self._directory / str(newer), f"the run goes on from step {step}")
            return step
        for candidate in reversed(steps):
            path = self._directory / str(candidate)
            if not (problem := find_damage(path)):
                return candidate
            console.print(f"[bold red]checkpoint {path}[/]: {problem}; it is passed over")
            self._set_aside(path, problem)
        # A first save that was interrupted leaves one checkpoint without a manifest: that is a beginning.
        is_first = len(steps) == 0 or (len(steps) == 1 and problem.startswith(_UNFINISHED))
        return _NONE if is_first else _ALL_DAMAGED

    def _set_aside(self, path: Path, why: str) -> None:
        """Out of the way of the run, in case anybody still wants it."""
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
        """Write in the background; `state` may be donated as soon as this returns.

        Raises:
            CheckpointError: the save before this one failed.
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
            except Exception as error:  # raised by the next call, in the thread that can act on it
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
                # A checkpoint without its manifest is none: an interruption here leaves nothing half deleted.
                (self._directory / str(old) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self._directory / str(old))
            except OSError as error:  # the new one is whole; the next save tries again
                console.print(f"checkpoint {self._directory / str(old)} could not be removed ({error})")

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            CheckpointError: it failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Waits for nothing.

        Raises:
            CheckpointError: the last save in the background is known to have failed.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, on the devices and in the shardings of `like`.

        Raises:
            CheckpointError: there is none, or it does not fit the parameters.
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
                "settings must be those that wrote it. Choose another --run.directory."
            ) from error
        return TrainState(**{"companions": {}} | restored["state"]), _current(restored["record"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.wait()


def _saved(state: TrainState) -> dict[str, Any]:
    """What is written of a state: a run without companions, such as every one of an earlier version, keeps none."""
    return {name: value for name, value in vars(state).items() if name != "companions" or value}


def _current(record: dict) -> dict:
    """A record as `loop.fit` reads it; earlier versions named the data cursor after the stage's own."""
    if "cursor" in record or "flops" not in record:
        return record
    rest = {name: value for name, value in record.items() if name not in ("tasks", "position")}
    return rest | {"cursor": record["tasks"] if "tasks" in record else {"position": record["position"]}}


def _unwritten(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} could not be written ({error}); earlier ones are untouched. Make room, or mend the "
        "permissions, and start the same command again."
    )


def steps_of(directory: Path) -> list[int]:
    """Steps of the stage's checkpoints, whole or not, in order."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


# --- The manifest -------------------------------------------------------------------------------------------------


def write_manifest(path: Path) -> None:
    """Digests of all files of a checkpoint, and of the manifest itself."""
    body = json.dumps(dict(_digests(path, _files(path))), indent=1, sort_keys=True)
    write_atomically(path / MANIFEST, _sealed(body))


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words; empty where every file is as it was written."""
    try:
        text = (path / MANIFEST).read_text()
    except (OSError, ValueError) as error:
        return f"{_UNFINISHED} ({error}): it was never finished, or is damaged"
    body = text.rpartition("\n}")[0] + "\n}"
    if text != _sealed(body):
        return "its manifest is damaged"
    expected = json.loads(body)
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
        return "its manifest names files outside of it"
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
