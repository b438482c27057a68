"""What ends a process before its work is done: a signal, which is heeded at the next boundary, and a standstill.

Signals and clocks belong to the process, so they are kept here once for all of it.
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

# Exit status of a run that was told to stop and has saved: the same command goes on. (sysexits.h, EX_TEMPFAIL)
RESUMABLE = 75
# Exit status of a process that stood still, or whose peers are gone.
STALLED = 76

_signals: list[int] = []
_last_beat = time.monotonic()


@contextmanager
def watching(deadline_seconds: float) -> Iterator[None]:
    """Until its end, SIGTERM and SIGINT are heeded at boundaries, and a standstill of so many seconds ends the process.

    A second signal has its usual, immediate effect.

    Args:
        deadline_seconds: 0 waits for ever.
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
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame) -> None:
    _signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def beat() -> None:
    """Something has moved."""
    global _last_beat
    _last_beat = time.monotonic()


def check() -> None:
    """A boundary where the host has just waited for the devices, the same one on every process.

    Raises:
        Interrupted: a process has been told to stop.
    """
    beat()
    if any_process(bool(_signals)):
        name = signal.Signals(_signals[0]).name if _signals else "a signal to another process"
        raise Interrupted(f"stopped by {name}")


def check_alone() -> None:
    """A boundary in work that one process does alone: with others beside it, it only tells that something moves.

    Raises:
        Interrupted: the only process has been told to stop.
    """
    beat() if jax.process_count() > 1 else check()


def _end_standstill(deadline_seconds: float, done: threading.Event) -> None:
    while not done.wait(min(1.0, deadline_seconds / 4)):
        if waits_for_main():
            beat()
        elif time.monotonic() - _last_beat > deadline_seconds:
            print(
                f"nothing has moved for distributed.deadline_seconds={deadline_seconds:g}: this process hangs, or "
                "waits for one that does. Where it stands:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(STALLED)  # a hanging main thread cannot be ended in any other way
