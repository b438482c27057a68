"""The judge of mathematical answers, math-verify; a separate module because its import takes seconds."""

from functools import lru_cache

from math_verify import parse, verify


def math(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if math-verify finds the prediction equal to an accepted answer; only the worker limits its time."""
    if prediction is None:
        return 0.0
    found = _parse(prediction.decode(errors="replace"))
    return float(any(verify(list(_parse(answer)), list(found), timeout_seconds=None) for answer in columns["answers"]))


@lru_cache(maxsize=10_000)
def _parse(text: str) -> tuple:
    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))
