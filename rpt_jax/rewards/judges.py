"""Judges of answers to questions: plain Python, run by rewards/host.py in processes of their own.

A judge is called as judge(completion, prediction, columns) -> float. `prediction` is the string in the last box after
the thought, None where there is none; columns["answers"] are the accepted answers.
"""

import re


def choice(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """1 if the prediction names the right letter: B, (B), B., or B and its text."""
    return float(prediction is not None and named_letter(prediction.decode(errors="replace")) in columns["answers"])


def named_letter(text: str) -> str | None:
    """The letter that an answer names, upper case; None where it begins with none.

    A and I are words too: they are letters only before a mark or the end.
    """
    found = re.match(r"\s*(?:\\(?:text|math)(?:bf|rm|sf)?\{)?\s*(\(?)([A-Za-z])\)?(?![A-Za-z'])(\s+\w)?", text)
    if not found or (found[3] and not found[1] and found[2] in "AaI"):
        return None
    return found[2].upper()


def exact(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """1 if the prediction, outer whitespace aside, is an accepted answer."""
    return float(prediction is not None and prediction.decode(errors="replace").strip() in columns["answers"])
