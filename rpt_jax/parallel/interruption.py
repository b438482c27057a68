"""Early exits of a process: on a signal, at the next boundary, and on a deadline without progress.

A boundary is a point at which the host has just waited for the devices. Signals and clocks are per process, so their
state is kept in this module.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from rpt_jax.errors import Interrupted
from rpt_jax.parallel.distributed import any_process, waits_for_main

# Exit status of a run that was stopped by a signal and has saved: the same command resumes it (EX_TEMPFAIL).
RESUMABLE = 75
# Exit status of a process that made no progress, or lost its peers.
STALLED = 76

_signals: list[int] = []
_last_beat = time.monotonic()


@contextmanager
def watching(deadline_seconds: float) -> Iterator[None]:
    """In this context, handle SIGTERM and SIGINT at boundaries, and exit after `deadline_seconds` without progress.

    A second signal has its usual, immediate effect.

    Args:
        deadline_seconds: 0 waits forever.
    """
    beat()
    _signals.clear()
    done = threading.Event()
    if deadline_seconds:
        threading.Thread(target=_end_standstill, args=(deadline_seconds, done), daemon=True).start()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, _note)
    try:
        yield
    finally:
        done.set()
        _signals.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame) -> None:
    _signals.append(number)
    signal.signal(number, signal.SIG_DFL)
    name = signal.Signals(number).name
    # print() is not safe here, because the signal may have interrupted a print().
    os.write(
        2, f"{name}: stopping at the next boundary, keeping what is done; a second {name} kills at once\n".encode()
    )


def beat() -> None:
    """Record progress."""
    global _last_beat
    _last_beat = time.monotonic()


def check() -> None:
    """Handle signals at a boundary, the same one on every process.

    Raises:
        Interrupted: a process received a stop signal.
    """
    beat()
    if any_process(bool(_signals)):
        name = signal.Signals(_signals[0]).name if _signals else "a signal to another process"
        raise Interrupted(f"stopped by {name}")


def check_alone() -> None:
    """Handle signals at a boundary in work that one process does alone; with other processes, only record progress.

    Raises:
        Interrupted: the only process received a stop signal.
    """
    beat() if jax.process_count() > 1 else check()


def _end_standstill(deadline_seconds: float, done: threading.Event) -> None:
    while not done.wait(min(1.0, deadline_seconds / 4)):
        if waits_for_main():
            beat()
        elif time.monotonic() - _last_beat > deadline_seconds:
            print(
                f"no progress for distributed.deadline_seconds={deadline_seconds:g}: this process hangs, or "
                "waits for one that does. Its stacks:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(STALLED)  # nothing else stops a hanging main thread
