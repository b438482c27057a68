"""A worker process that runs one judge: python -m rpt_jax.rewards.worker package.module:function.

Requests are pickled by the parent, which is trusted; answers are JSON. Output of the function goes to stderr, so it
cannot be mistaken for an answer.
"""

import importlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback


def answer(function, request) -> dict:
    """Return {"reward": float} or {"fault": description}."""
    try:
        value = function(*request)
    except Exception:  # any exception of a user's function is a failure of this completion alone
        return {"fault": "raised " + traceback.format_exc(limit=-1).strip().splitlines()[-1]}
    # Bools and NumPy scalars are numbers; strings, None and arrays are not.
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or getattr(value, "ndim", 0):
        return {"fault": f"returned {value!r:.80}, which is not a number"}
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        return {"fault": f"returned {number}"}
    return {"reward": number}


def _end_with(parent: int) -> None:
    """Exit when the parent is gone; otherwise a worker that is busy when its run is killed would never stop."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    # A scheduler signals every process of a job; this worker stops when its run does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        module, _, name = sys.argv[1].partition(":")
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{name} is not callable")
        replies.write(json.dumps({"ready": True}) + "\n")
    except BaseException as error:
        replies.write(json.dumps({"fault": f"{type(error).__name__}: {error}"}) + "\n")
        return
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        replies.write(json.dumps(answer(function, request)) + "\n")


if __name__ == "__main__":
    main()
