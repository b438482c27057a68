"""Judges of answers to questions: plain Python that rewards/host.py runs in worker processes.

A judge is called as judge(completion, prediction, columns) -> float. `prediction` is the string in the last box after
the thought, or None; columns["answers"] are the accepted answers.
"""

import re


def choice(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the prediction names an accepted letter: B, (B), B., or B and its text."""
    return float(prediction is not None and named_letter(prediction.decode(errors="replace")) in columns["answers"])


def named_letter(text: str) -> str | None:
    """Return the letter that an answer begins with, in upper case, or None.

    A and I are also words, so they count only before punctuation or the end.
    """
    found = re.match(r"\s*(?:\\(?:text|math)(?:bf|rm|sf)?\{)?\s*(\(?)([A-Za-z])\)?(?![A-Za-z'])(\s+\w)?", text)
    if not found or (found[3] and not found[1] and found[2] in "AaI"):
        return None
    return found[2].upper()


def exact(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the prediction, without outer whitespace, is an accepted answer."""
    return float(prediction is not None and prediction.decode(errors="replace").strip() in columns["answers"])
