"""Rewards that are Python functions: run in worker processes, with a time limit and a failure policy.

A call that raises, hangs, or returns a non-finite value is a failure of that one completion; no value is ever guessed
or reused. A function is ordinary code with the user's rights: it is isolated from the run's state, not from the
machine.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import numpy as np

from rpt_jax.config import RewardConfig
from rpt_jax.errors import ConfigError, RewardError
from rpt_jax.parallel.distributed import gathered, to_host
from rpt_jax.parallel.interruption import beat
from rpt_jax.parallel.mesh import sharded_like
from rpt_jax.types import Earned, Evidence

# Time limit for a worker to import its function; math libraries take seconds on a busy machine.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Fault:
    """A call that gave no reward: what happened, and the traceback if it raised."""

    what: str
    traceback: str = ""


class _Worker:
    """A worker process and its pipes; replaced when it hangs or dies."""

    def __init__(self, function: str, time_limit: float):
        self._function, self._time_limit = function, time_limit
        self._process: subprocess.Popen | None = None

    def call(self, request: tuple) -> float | Fault:
        """Return the reward, or the failure."""
        try:
            if self._process is None:
                self.start()
            self._process.stdin.write(pickle.dumps(request))
            self._process.stdin.flush()
            reply = self._receive(self._time_limit)
        except (BrokenPipeError, EOFError, ValueError):
            self.stop()
            return Fault("ended its process")
        if reply is None:
            self.stop()
            return Fault(f"took longer than reward.time_limit_seconds={self._time_limit}")
        return reply["reward"] if "reward" in reply else Fault(reply["fault"], reply.get("traceback", ""))

    def start(self) -> None:
        """Start the process and wait until it has imported its function; raise ConfigError if it fails."""
        # What this process can import, the worker can: a callable may come from a script's own directory.
        paths = os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rpt_jax.rewards.worker", self._function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        try:
            reply = self._receive(_START_SECONDS)
        except (EOFError, ValueError):
            reply = {"fault": "its process ended"}
        if reply is None or "fault" in reply:
            self.stop()
            problem = f"importing it took over {_START_SECONDS:g} s" if reply is None else reply["fault"]
            raise ConfigError(
                f"reward.function={self._function!r} cannot be used ({problem}); it must be package.module:function, "
                "importable from the working directory, or path/file.py:function. Correct --reward.function."
            )

    def _receive(self, seconds: float) -> dict | None:
        """Return the next reply, or None after `seconds` without one."""
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def stop(self) -> None:
        if self._process is not None:
            # Including processes that the function started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # unwritten data for a dead process is not needed
                    stream.close()
            self._process = None


# What a policy may write: an answer, an empty box, and no box at all.
_TRIALS = (
    (b"a thought</think>\\boxed{42}", b"42"),
    (b"a thought</think>\\boxed{}", b""),
    (b"a thought without an end", None),
)


def check_function(config: RewardConfig, columns: dict) -> None:
    """Import reward.function and call it on made-up completions: with a prediction, an empty one, and none.

    Args:
        config: of the reward.
        columns: of a task of the run.
    Raises:
        ConfigError: it cannot be imported; or it fails on the call and reward.on_fault is "fail".
    """
    worker = _Worker(config.function, config.time_limit_seconds)
    worker.start()
    for completion, prediction in _TRIALS:
        result = worker.call((completion, prediction, columns))
        if isinstance(result, Fault) and config.on_fault == "fail":
            worker.stop()
            raise ConfigError(
                f"reward.function={config.function!r} {result.what} when it was tried on completion {completion!r}, "
                f"prediction {prediction!r} and columns {columns!r:.500}; it must return a finite number for any "
                "completion. Correct it, or set --reward.on-fault zero to count such failures.\n" + result.traceback
            )
    worker.stop()


def store_function(function: Callable, directory: Path) -> str:
    """Write a Python function into a run directory, with all that it uses, and return its name for reward.function.

    Raises:
        ConfigError: it is not callable, or cannot be pickled.
    """
    if not callable(function):
        raise ConfigError(f"reward={function!r} is not callable; it must be function(completion, prediction, columns).")
    try:
        content = cloudpickle.dumps(function)
    except Exception as error:  # pickling runs code of the objects that the function uses
        raise ConfigError(
            f"reward={function!r} cannot be pickled for its worker processes ({type(error).__name__}: {error}). Move "
            "what it uses into a module, or create it inside the function."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    # Named by its content, so that a run notices another function.
    path = directory / f"reward-{hashlib.sha256(content).hexdigest()[:16]}.pickle"
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
    return str(path)


class JudgePool:
    """Worker processes that call one function on many completions.

    Raises:
        ConfigError: the function cannot be imported.
    """

    def __init__(self, function: str, *, num_workers: int, time_limit: float):
        self._workers = [_Worker(function, time_limit) for _ in range(num_workers)]
        self._workers[0].start()

    def judge(self, requests: list[tuple]) -> list[float | Fault]:
        """Return a reward or a failure for each (completion, prediction, columns), in order."""
        results: list[Any] = [None] * len(requests)
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for item in enumerate(requests):
            waiting.put(item)

        def work(worker: _Worker) -> None:
            while True:
                try:
                    number, request = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    results[number] = worker.call(request)
                except Exception as error:  # a thread must not die with its completions ungraded
                    worker.stop()
                    results[number] = Fault(f"could not be called ({type(error).__name__}: {error})")
                beat()  # many slow completions are still progress

        threads = [
            threading.Thread(target=work, args=(w,), daemon=True) for w in self._workers[: max(1, len(requests))]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def __del__(self):
        self.close()


def make_host_reward_fn(
    config: RewardConfig, function: str, tokenizer, columns: Callable[[int], dict], *, width: int, on_fault: str
) -> Callable[[Evidence], Earned]:
    """Make a reward function that calls `function` on the host.

    Args:
        config: of the reward.
        function: as in reward.function.
        tokenizer: of the policy.
        columns: task id -> the columns that the function receives.
        width: maximum length of a prediction in bytes; a longer one counts as none.
        on_fault: "fail" or "zero".
    Raises:
        ConfigError: the function cannot be imported.
    """
    pool = JudgePool(function, num_workers=config.num_workers, time_limit=config.time_limit_seconds)

    def judge(evidence: Evidence) -> Earned:
        shape = evidence.tasks.prompts.row_ids.shape
        rows, ids, requests = _requests(evidence, tokenizer, columns, width)
        rewards, faults = np.zeros(np.prod(shape), np.float32), np.zeros(np.prod(shape), bool)
        complaint = trace = ""
        for row, task, result, request in zip(rows, ids, pool.judge(requests), requests, strict=True):
            if isinstance(result, Fault):
                faults[row] = True
                where = f"on task {task} ({request[2]!r:.200}), completion {request[0]!r:.200}"
                complaint, trace = (complaint, trace) if complaint else (f"{result.what} {where}", result.traceback)
            else:
                rewards[row] = result
        # Sum over processes: one of them graded the completion, the others hold 0.
        rewards, faults = gathered(rewards).sum(0), gathered(faults).any(0)
        if on_fault == "fail" and faults.any():
            raise RewardError(
                f"reward {function!r} {complaint or 'failed on another process, which reports more'}. Fix the "
                "function, or set --reward.on-fault zero to count such failures." + (trace and f"\n{trace}")
            )
        task_ids = evidence.tasks.references.task_ids
        rewards, faults = (sharded_like(task_ids, x.reshape(shape)) for x in (rewards, faults))
        return Earned(rewards=rewards, faults=faults, metrics={})

    return judge


def make_equivalence_fn(
    config: RewardConfig, function: str, *, width: int
) -> Callable[[Evidence], tuple[jax.Array, jax.Array]]:
    """Make a function that tells which predictions of a group a judge takes for equal.

    Two different predictions are equal if the judge accepts one where the other is the accepted answer. It returns
    (bool [U, M, G, G], reflexive and symmetric; bool [U, M, G], a comparison with this rollout's prediction failed, and
    counts as unequal).

    Args:
        config: of the reward.
        function: package.module:function of a judge.
        width: maximum length of a prediction in bytes; a longer one counts as none.
    """
    pool = JudgePool(function, num_workers=config.num_workers, time_limit=config.time_limit_seconds)

    def same(evidence: Evidence):
        shape, task_ids = evidence.tasks.prompts.row_ids.shape, evidence.tasks.references.task_ids
        groups = _distinct_predictions(evidence, width)
        pairs = [(u, m, one, two) for (u, m), of in groups.items() for one, two in itertools.combinations(of, 2)]
        equal, faults = np.zeros((*shape, shape[-1]), bool), np.zeros(shape, bool)
        own = pairs[jax.process_index() :: jax.process_count()]
        requests = [(b"", two, {"answers": (one.decode(errors="replace"),)}) for *_, one, two in own]
        for (u, m, one, two), result in zip(own, pool.judge(requests), strict=True):
            rows, others = groups[u, m][one], groups[u, m][two]
            faults[u, m, rows + others] |= isinstance(result, Fault)
            equal[u, m][np.ix_(rows, others)] = not isinstance(result, Fault) and result == 1
        equal, faults = gathered(equal).any(0), gathered(faults).any(0)
        for (u, m), of in groups.items():
            for rows in of.values():
                equal[u, m][np.ix_(rows, rows)] = True
        equal |= np.swapaxes(equal, -1, -2) | np.eye(shape[-1], dtype=bool)
        return sharded_like(task_ids, equal), sharded_like(task_ids, faults)

    return same


def _distinct_predictions(evidence: Evidence, width: int) -> dict[tuple[int, int], dict[bytes, list[int]]]:
    """Return {(u, m) of each real prompt: {prediction: its rollouts}}; empty and longer predictions are left out."""
    predictions, shape = evidence.predictions, evidence.tasks.prompts.row_ids.shape
    fields = (predictions.bytes, predictions.lengths, predictions.found, evidence.tasks.references.task_ids)
    texts, lengths, found, task_ids = to_host(fields)
    texts, lengths, found = texts.reshape(*shape, -1), lengths.reshape(shape), found.reshape(shape)
    groups: dict[tuple[int, int], dict[bytes, list[int]]] = {}
    for u, m in np.argwhere(task_ids >= 0).tolist():
        of = groups.setdefault((u, m), {})
        for g in np.flatnonzero(found[u, m] & (lengths[u, m] > 0) & (lengths[u, m] <= width)).tolist():
            of.setdefault(texts[u, m, g, : lengths[u, m, g]].tobytes(), []).append(g)
    return groups


def _requests(evidence: Evidence, tokenizer, columns: Callable[[int], dict], width: int):
    """Return (rows u * R + r that this process grades, their task ids, the arguments of each call)."""
    rollouts, predictions = evidence.rollouts, evidence.predictions
    fields = (rollouts.tokens, rollouts.mask, predictions.bytes, predictions.lengths, predictions.found)
    *fields, task_ids = to_host((*fields, evidence.tasks.references.task_ids))
    tokens, mask, texts, lengths, found = (x.reshape(-1, *x.shape[2:]) for x in fields)
    ids = np.repeat(task_ids.ravel(), evidence.tasks.prompts.row_ids.shape[-1])
    # One process grades each completion, because two machines may not agree on a time limit.
    rows = np.flatnonzero(ids >= 0)[jax.process_index() :: jax.process_count()]
    requests = []
    for row in rows:
        completion = b"".join(tokenizer.token_bytes(int(t)) for t in tokens[row][mask[row]])
        # No answer to a question is longer than the window.
        has_answer = found[row] and lengths[row] <= width
        prediction = texts[row, : lengths[row]].tobytes() if has_answer else None
        requests.append((completion, prediction, columns(int(ids[row]))))
    return rows, ids[rows], requests
