"""A worker process that runs one judge: python -m rpt_jax.rewards.worker FUNCTION.

FUNCTION is package.module:function, path/file.py:function or path/file.pickle, a function that Python code pickled.

Requests are pickled by the parent, which is trusted; answers are JSON. Output of the function goes to stderr, so it
cannot be mistaken for an answer.
"""

import importlib.util
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
    except Exception as error:  # any exception of a user's function is a failure of this completion alone
        # Without this function's own frame.
        frames = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
        return {"fault": f"raised {type(error).__name__}: {error}", "traceback": "".join(frames)}
    # Bools and NumPy scalars are numbers; strings, None and arrays are not.
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or getattr(value, "ndim", 0):
        return {"fault": f"returned {value!r:.80}, which is not a number"}
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        return {"fault": f"returned {number}"}
    return {"reward": number}


def load_function(text: str):
    """Import or unpickle the function that FUNCTION names."""
    if text.endswith(".pickle"):
        import cloudpickle

        with open(text, "rb") as file:
            return cloudpickle.load(file)
    place, _, name = text.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    # Files beside it can be imported, as in a script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
    spec = importlib.util.spec_from_file_location(os.path.basename(place).removesuffix(".py"), place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


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
        function = load_function(sys.argv[1])
        if not callable(function):
            raise TypeError(f"{sys.argv[1]} is not callable")
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
