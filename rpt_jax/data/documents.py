"""Files to tokenised documents. Every way a corpus can be unusable is found here, with file and line."""

import glob
import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Text:
    """One document before tokenisation."""

    id: str
    """File name and record number: stable across runs."""
    text: str
    labels: tuple[tuple[int, str], ...] = ()
    """(byte offset of a position, name): positions that evaluation reports by name."""


@dataclass(frozen=True, kw_only=True)
class Document:
    id: str
    tokens: np.ndarray
    """i32 [length], the corpus's own tokens, no special tokens."""
    labels: tuple[tuple[int, str], ...] = ()
    """(token index of a position, name)."""


def read_texts(path: str, *, text_template: str) -> list[Text]:
    """Read .txt (one document a file), .jsonl or .parquet (one a record) files.

    Args:
        path: a file or a glob.
        text_template: str.format template over a record's fields; backslash-n in it is a newline.
    Raises:
        DataError: no such file, unknown kind, empty, not UTF-8, not JSON, or a record without a needed field.
    """
    files = sorted(glob.glob(path, recursive=True)) if path else []
    files = [f for f in files if Path(f).is_file()]
    if not files:
        raise DataError(
            f"data path {path!r} matches no file; it must name a .txt, .jsonl or .parquet file or a glob of them. "
            "Set --data.path."
        )
    texts = []
    for name in files:
        for number, record in enumerate(_read_records(Path(name)), start=1):
            text = _fill(text_template, record, name, number)
            if text.strip():
                labels = _read_labels(record.get("position_labels"), name, number)
                texts.append(Text(id=f"{Path(name).name}:{number}", text=text, labels=labels))
    if not texts:
        raise DataError(f"data path {path!r} holds no text; at least one document must be non-empty. Check the file.")
    return texts


def _read_records(path: Path) -> Iterator[dict]:
    if path.suffix == ".txt":
        yield {"text": decode_utf8(path.read_bytes(), path, 0)}
    elif path.suffix == ".jsonl":
        # On "\n" only: strings may hold Unicode line separators.
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if line.strip():
                yield parse_json_line(decode_utf8(line, path, number), path, number)
    elif path.suffix == ".parquet":
        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file ({error}); write it anew.") from error
    else:
        raise DataError(f"{path} ends in {path.suffix!r}; .txt, .jsonl and .parquet are read. Convert or rename it.")


def decode_utf8(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path} line {line}" if line else str(path)
        raise DataError(
            f"{where}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; text must be UTF-8. "
            "Convert the file (iconv -t utf-8)."
        ) from error


def parse_json_line(line: str, path: Path, number: int) -> dict:
    """One jsonl record; raises DataError with file and line where it is not a JSON object."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} line {number} is not JSON ({error}); each line must be one object.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number} is a {type(record).__name__}; each line must be one JSON object.")
    return record


def _read_labels(value, path: str, number: int) -> tuple[tuple[int, str], ...]:
    try:
        return tuple((int(offset), str(label)) for offset, label in value or ())
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} record {number}: position_labels is {value!r}; it must be a list of [byte offset, name] pairs. "
            "Correct or remove it."
        ) from error


def _fill(template: str, record: dict, path: str, number: int) -> str:
    used = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    nulls = [field for field in used if field in record and record[field] is None]
    if nulls:
        raise DataError(f"{path} record {number}: {nulls} is null; data.text_template needs text in it. Fill it.")
    try:
        return template.replace("\\n", "\n").format(**record)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} record {number} has fields {sorted(record)}; data.text_template={template!r} needs {error}. "
            "Set --data.text-template to the fields that are there."
        ) from error


def tokenize(texts: list[Text], tokenizer: Tokenizer) -> list[Document]:
    """Encode each document once, without special tokens, and move its labels to token indices.

    Raises:
        DataError: a text holds what the tokenizer cannot spell, or a label's byte offset is not the start of a token.
    """
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch([t.text for t in texts]), strict=True):
        if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            raise DataError(
                f"document {text.id} holds {ids.count(tokenizer.unk_id)} piece(s) outside the tokenizer's vocabulary; "
                "their bytes would be lost. Use a tokenizer with byte fallback, or none at all to have one trained."
            )
        labels = _token_labels(text, ids, tokenizer) if text.labels else ()
        documents.append(Document(id=text.id, tokens=np.asarray(ids, np.int32), labels=labels))
    return documents


def _token_labels(text: Text, ids: list[int], tokenizer: Tokenizer) -> tuple[tuple[int, str], ...]:
    starts, offset = {}, 0
    for index, token_id in enumerate(ids):
        starts.setdefault(offset, index)
        offset += len(tokenizer.token_bytes(token_id))
    for byte_offset, name in text.labels:
        if byte_offset not in starts:
            raise DataError(
                f"document {text.id}: label {name!r} at byte {byte_offset} is not the start of a token; "
                "labels must lie on token boundaries. Correct the offset."
            )
    return tuple((starts[byte_offset], name) for byte_offset, name in text.labels)


def split_heldout(texts: list[Text], fraction: float) -> tuple[list[Text], list[Text]]:
    """The last `fraction` of the documents, or of the only document's lines, is held out."""
    if len(texts) == 1:
        (only,) = texts
        lines = only.text.splitlines(keepends=True)
        cut = max(1, round(len(lines) * (1 - fraction)))
        parts = ["".join(lines[:cut]), "".join(lines[cut:])]
        train, heldout = (Text(id=f"{only.id}{tag}", text=p) for tag, p in zip(("[train]", "[heldout]"), parts))
        if not heldout.text.strip():
            raise DataError(
                f"document {only.id} has {len(lines)} line(s), too few to hold out {fraction:.0%} of them. "
                "Set --data.heldout-path, or give more documents."
            )
        return [train], [heldout]
    cut = min(len(texts) - 1, max(1, round(len(texts) * (1 - fraction))))
    return texts[:cut], texts[cut:]


def fingerprint(documents: list[Document]) -> str:
    """sha256 over ids and tokens: what positions, tasks and resuming depend on."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode() + b"\0" + document.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def check_lengths(documents: list[Document], min_context_tokens: int, where: str) -> int:
    """Number of documents without any position (too short); raises DataError when that is all of them."""
    too_short = sum(len(d.tokens) <= min_context_tokens for d in documents)
    if too_short == len(documents):
        raise DataError(
            f"all {too_short} {where} documents have at most positions.min_context_tokens={min_context_tokens} "
            f"tokens (longest: {max(len(d.tokens) for d in documents)}); a document needs more than that to have a "
            "position. Give longer documents or lower --positions.min-context-tokens."
        )
    return too_short
