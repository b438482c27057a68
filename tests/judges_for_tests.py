"""User rewards that behave, and that misbehave in every way."""

import os
import time

import numpy as np


def length(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    print("chatter on stdout is no answer")
    return len(completion) / 10 + (0 if prediction is None else 1) + columns.get("bonus", 0)


def by_column(completion, prediction, columns):
    """What columns["do"] says: raise, hang, die, or return that value."""
    values = {"none": None, "nan": float("nan"), "inf": float("inf"), "string": "1.0", "list": [1.0],
              "array": np.ones(3), "bool": True, "numpy": np.float32(0.5), "one": 1.0}  # fmt: skip
    do = columns["do"]
    if do == "raise":
        raise ValueError("on purpose")
    if do == "hang":
        time.sleep(60)
    if do == "die":
        os._exit(3)
    return values[do]


def only_when_tried(completion, prediction, columns):
    """Fail on every completion but those that a run tries it on."""
    if not completion.startswith(b"a thought"):
        raise LookupError("no answer to this")
    return 1.0


not_callable = 3
