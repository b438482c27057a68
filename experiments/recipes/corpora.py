"""Corpora of the recipes: GSM8K solutions with labelled results, and Python's language documentation."""

import json
import re
from pathlib import Path
from pydoc_data import topics

from rpt_jax.data.readers import read_records
from rpt_jax.errors import DataError

# A computation and its result, as GSM8K annotates it: 48/2 = <<48/2=24>>24 clips.
_COMPUTED = re.compile(r"<<[^<>]*?=([^<>=]*)>>")
_FINAL = "#### "


def gsm8k_document(question: str, answer: str) -> dict:
    """Return a solved question as {"text", "position_labels"}, without the annotations of its computations.

    The first digit of a result is labelled determined/computed if the text repeats the annotated result there, and that
    of the final answer determined/copied: the text before them leaves no choice. Byte offsets.
    """
    text, labels, end = f"{question}\n\n", [], 0
    for found in _COMPUTED.finditer(answer):
        text += answer[end : found.start()]
        end = found.end()
        result = found[1].strip()
        # The text may write 1,000 or 0.50 where the annotation has 1000 or .5: then it is not labelled.
        if result[:1].isdigit() and re.match(rf"{re.escape(result)}(?![\d.,]*\d)", answer[end:]):
            labels.append([len(text.encode()), "determined/computed"])
    body, mark, final = answer[end:].rpartition(_FINAL)
    text += body + mark
    if mark and final[:1].isdigit():
        labels.append([len(text.encode()), "determined/copied"])
    return {"text": text + final, "position_labels": labels}


def write_gsm8k(path: Path, out: Path) -> None:
    """Write GSM8K's {"question", "answer"} records as documents.

    Raises:
        DataError: a record without one of the two.
    """
    documents = []
    for name, number, record in read_records(str(path)):
        if not isinstance(record.get("question"), str) or not isinstance(record.get("answer"), str):
            raise DataError(
                f"{name} line {number} has fields {sorted(record)}; a record of GSM8K has the strings question and "
                "answer. Correct the path."
            )
        documents.append(gsm8k_document(record["question"], record["answer"]))
    out.write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_python_docs(out: Path) -> None:
    """Write the language documentation that every Python installation carries, one document per topic."""
    lines = [json.dumps({"text": text.strip()}) + "\n" for _, text in sorted(topics.topics.items())]
    out.write_text("".join(lines))
