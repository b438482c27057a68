"""Judges of answers to questions: plain Python that rewards/host.py runs in worker processes.

A judge is called as judge(completion, prediction, columns) -> float. `prediction` is the string in the last box after
the thought, or None; columns["answers"] are the accepted answers.
"""

import re


def choice(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the prediction names an accepted letter: B, (B), B., or B and its text."""
    return float(prediction is not None and named_letter(prediction.decode(errors="replace")) in columns["answers"])


def named_letter(text: str) -> str | None:
    """Return the one letter that an answer names, in upper case; None if it names none, or several.

    Decoration and lead-ins are ignored: (B), $B$, **B**, \\text{B}, Option B, The answer is B. The letter may be
    followed by a mark and the option's text: B. Paris. In "A cat" and "I think" the letter is a word.
    """
    text = _LEAD_IN.sub("", _undecorated(text))
    found = re.match(r"\(?([A-Za-z])(?![A-Za-z'])", text)
    if not found:
        return None
    letter, rest = found[1].upper(), text[found.end() :]
    marked = re.match(r"\s*[.):,;\]-]+\s*", rest)
    # What follows the mark is the option's text, unless it is another letter.
    following = rest[marked.end() :] if marked else rest
    if _NEXT_LETTER.match(following):
        return None
    is_text = bool(re.search(r"\w", following))
    if marked or not is_text:
        return letter
    # Without a mark, the letter may be a word, or one of several.
    return None if letter in "AI" or re.search(r"(?<![\w'])[B-HJ-Z](?![\w'])", following) else letter


# A letter alone, or joined by a comma, a slash, "or" and the like.
_NEXT_LETTER = re.compile(r"(?i:\s*(?:and|or|[,/&+;|-])\s*)*\(?[A-Za-z]\)?\s*(?:$|[.,;/&)|]|(?i:and|or)\b)")
_LEAD_IN = re.compile(
    r"(?i)^(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my)\s+)?(?:(?:right|correct|best|final)\s+)?"
    r"(?:answer|option|choice|letter)\b(?:\s+(?:option|choice|letter))?(?:\s+(?:is|would be))?[\s:=*_]*"
    r"(?:(?:option|choice|letter)\b\s*:?\s*)?"
)
_COMMAND = re.compile(r"\\(?:text|math)?(?:bf|rm|sf|tt|it|normal|up|mathrm)?\s*\{(.*)\}\.?$", re.DOTALL)


def _undecorated(text: str) -> str:
    """Take off what surrounds an answer as a whole: spaces, quotes, $, *, _, brackets, \\text{...}."""
    while True:
        stripped = text.strip().strip("$*_`\"'\u201c\u201d ")
        if found := _COMMAND.match(stripped):
            stripped = found[1]
        elif (
            len(stripped) > 1
            and stripped[0] + stripped[-1] in ("()", "[]", "{}")
            and not set(stripped[1:-1]) & set("()[]{}")
        ):
            stripped = stripped[1:-1]
        if stripped == text:
            return text
        text = stripped


def exact(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the prediction, without outer whitespace, is an accepted answer."""
    return float(prediction is not None and prediction.decode(errors="replace").strip() in columns["answers"])
