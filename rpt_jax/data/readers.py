"""From files to texts, one record at a time: txt, jsonl, json, parquet, ArrayRecord, globs, Hugging Face datasets.

Unusable files raise errors here, with file and line. Only the current record is in memory.
"""

import codecs
import difflib
import glob
import json
import os
import re
import string
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from rpt_jax.config import Config, DataConfig
from rpt_jax.config.schema import flag_of
from rpt_jax.errors import ConfigError, DataError

# A .txt file is read in blocks of about this size that end after a newline if possible.
_BLOCK_BYTES = 2**20
# A longer .txt file becomes several documents, because memory grows with the longest document.
_DOCUMENT_BYTES = 2**22
_HUGGING_FACE = "hf:"


@dataclass(frozen=True, kw_only=True)
class Text:
    """One document before tokenisation, or a piece of a long one."""

    id: str
    """File name and record number, stable across runs."""
    text: str
    is_continued: bool = False
    """The next text belongs to the same document."""
    labels: tuple[tuple[int, str], ...] = ()
    """(byte offset of a position, name): positions that evaluation reports under a name."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A part of the training data: its path, the template of a document, and its weight in the mixture."""

    path: str
    text_template: str
    weight: float = 1.0
    split: str = "files"


def training_corpora(data: DataConfig) -> list[Corpus]:
    """Return the parts of the training data: data.path, or data.mixture.

    Raises:
        ConfigError: an entry of data.mixture is not WEIGHT=PATH or WEIGHT=PATH=TEMPLATE.
    """
    if not data.mixture:
        return [Corpus(path=data.path, text_template=data.text_template, split=data.split)]
    parts = []
    for entry in data.mixture:
        weight, _, rest = entry.partition("=")
        path, _, template = rest.partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not (0 < value < float("inf") and path):
            raise ConfigError(
                f"data.mixture contains {entry!r}; an entry is WEIGHT=PATH or WEIGHT=PATH=TEMPLATE with a weight "
                "above 0. Correct it."
            )
        parts.append(Corpus(path=path, text_template=template or data.text_template, weight=value, split=data.split))
    return parts


def read_texts(path: str, *, text_template: str, split: str = "files") -> Iterator[Text]:
    """Yield the texts of all files that `path` names, in the order of their names; blank texts are skipped.

    Args:
        path: a .txt file (one document, or several of 4 MiB), a .jsonl, .parquet or .array_record file (one document
            per record), a glob of them, or hf:NAME[:CONFIG][:SPLIT], a dataset of the `datasets` package or a directory
            that it saved.
        text_template: str.format template over the fields of a record; backslash-n is a newline.
        split: "paragraphs" makes a document of each paragraph of a .txt file; blank lines separate them.
    Raises:
        DataError: no such file, unknown kind, empty, not UTF-8, not JSON, or a record without a needed field.
    """
    num_texts = 0
    for name, records in _sources(path):
        if is_text_file(name) and split == "paragraphs":
            records = _paragraphs(records, name)
        for number, record in enumerate(records, start=1):
            if isinstance(record, Text):
                num_texts += bool(record.text.strip())
                yield record
                continue
            text = _fill(text_template, record, name, number)
            if text.strip():
                num_texts += 1
                labels = _read_labels(record.get("position_labels"), name, number)
                yield Text(id=f"{name}:{number}", text=text, labels=labels)
    if not num_texts:
        raise DataError(
            f"data path {path!r} contains no text; at least one document must be non-empty. Check the file."
        )


def read_records(path: str) -> Iterator[tuple[str, int, dict]]:
    """Yield (file name, record number, record) of every jsonl, parquet or ArrayRecord record, or dataset row.

    Raises:
        DataError: as `read_texts`; a .txt file has no records.
    """
    for name, records in _sources(path):
        for number, record in enumerate(records, start=1):
            if isinstance(record, Text):
                raise DataError(f"{name} is plain text; records must be .jsonl, .parquet or .array_record. Convert it.")
            if record:
                yield name, number, record


def file_stamps(path: str) -> list[tuple[str, int, int]]:
    """Return (path, size in bytes, modification time in ns) of every file of `path`.

    For a dataset: (path, 0, 0), and its files if it is a local directory.
    """
    if path.startswith(_HUGGING_FACE):
        local = Path(path.removeprefix(_HUGGING_FACE).split(":")[0])
        files = sorted(local.rglob("*")) if local.is_dir() else []
        return [(path, 0, 0), *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    return [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in matching_files(path)]


def has_files(path: str) -> bool:
    """Return whether a path or glob matches a file, or names a dataset."""
    return path.startswith(_HUGGING_FACE) or any(Path(f).is_file() for f in glob.glob(path, recursive=True))


def matching_files(path: str) -> list[str]:
    """Return the sorted files of a path or glob; raise DataError if no file matches."""
    files = [f for f in sorted(glob.glob(path, recursive=True)) if Path(f).is_file()] if path else []
    if not files:
        raise DataError(no_files("data path", path) + "Correct it.")
    return files


def check_files(config: Config, *, made_in: Path | None = None) -> None:
    """Raise DataError if a path that the config names matches no file, or a run on documents names none.

    Args:
        config: of the run.
        made_in: directory whose files earlier steps of a recipe make; they may be missing.
    """
    data, questions = config.data, config.questions
    named = {
        "data.heldout_path": data.heldout_path,
        "questions.path": questions.path,
        "questions.heldout_path": questions.heldout_path,
        "supervised.path": config.supervised.path,
    }
    for setting, path in named.items():
        if path and not _is_there(path, made_in):
            raise DataError(f"{no_files(setting, path)}Correct {flag_of(setting)}.")
    if questions.path:
        return
    if not (data.path or data.mixture):
        raise DataError("data.path is empty; a run needs texts or questions. Set --data.path or --questions.path.")
    setting = "data.mixture" if data.mixture else "data.path"
    for corpus in training_corpora(data):
        if not _is_there(corpus.path, made_in):
            raise DataError(f"{no_files(setting, corpus.path)}Correct {flag_of(setting)}.")


def _is_there(path: str, made_in: Path | None) -> bool:
    return has_files(path) or (made_in is not None and made_in in Path(path).parents)


def no_files(setting: str, path: str) -> str:
    """Return the sentence that a path matches no file, what it must be, and what may be meant."""
    text = ".txt, " if setting.startswith("data") else ""
    message = (
        f"{setting}={path!r} matches no file; it must be a {text}.jsonl, .json, .parquet or .array_record file, a glob "
        "of them, or hf:DATASET. "
    )
    if Path(path).is_dir():
        return message + f"It is a directory: name its files, as in {str(Path(path) / '*.jsonl')!r}. "
    beside = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, beside, n=1, cutoff=0.75)
    return message + (f"Did you mean {str(Path(path).with_name(near[0]))!r}? " if near else "")


def _sources(path: str) -> Iterator[tuple[str, Iterable]]:
    """Yield (name within the corpus, records) of every file."""
    if path.startswith(_HUGGING_FACE):
        yield path, _read_dataset(path)
        return
    files = matching_files(path)
    root = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath([os.path.dirname(f) for f in files])
    for file in files:
        yield os.path.relpath(file, root or "."), _read_file(Path(file), os.path.relpath(file, root or "."))


def _read_file(path: Path, name: str) -> Iterator:
    if path.suffix == ".txt":
        return _read_blocks(path, name)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    if path.suffix == ".json":
        return _read_array(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".array_record", ".arrayrecord"):
        return _read_array_record(path)
    raise DataError(
        f"{path} ends in {path.suffix!r}; it must be .txt, .jsonl, .json, .parquet or .array_record. Convert or "
        "rename it."
    )


def _read_blocks(path: Path, name: str) -> Iterator[Text]:
    """Yield a .txt file in pieces that end after a newline; a document has at most `_DOCUMENT_BYTES`."""
    with path.open("rb") as file:
        held, start, document, size = file.read(_BLOCK_BYTES), 0, 1, 0
        if held.startswith(codecs.BOM_UTF8):
            warnings.warn(f"{path} begins with a byte order mark, which is left out", stacklevel=2)
            held, start = held[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        while held:
            more = file.read(_BLOCK_BYTES)
            cut = len(held)
            if more:
                newline = held.rfind(b"\n")
                cut = newline + 1 if newline >= 0 else _last_character_start(held)
            size += cut
            is_last = not more or size + 2 * _BLOCK_BYTES > _DOCUMENT_BYTES
            yield Text(id=f"{name}:{document}", text=_decode(held[:cut], path, start), is_continued=not is_last)
            if is_last:
                document, size = document + 1, 0
            start += cut
            held = held[cut:] + more


_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


def is_text_file(path: str) -> bool:
    """Return whether a file is plain text, without records."""
    return path.endswith(".txt")


def _paragraphs(pieces: Iterable[Text], name: str) -> Iterator[Text]:
    """Yield the paragraphs of a file's pieces, each as a document."""
    held, number = "", 0
    for piece in pieces:
        *whole, held = _BLANK_LINES.split(held + piece.text)
        if len(held) > _DOCUMENT_BYTES:
            whole, held = [*whole, held], ""
        for text in whole:
            if text.strip():
                number += 1
                yield Text(id=f"{name}:{number}", text=text)
    if held.strip():
        yield Text(id=f"{name}:{number + 1}", text=held)


def count_paragraphs(path: str) -> int:
    """Return the number of paragraphs in the first MiB of a .txt file."""
    with open(path, "rb") as file:
        return len(_BLANK_LINES.split(file.read(_BLOCK_BYTES).decode(errors="replace").strip()))


def _last_character_start(data: bytes) -> int:
    """Return where the last UTF-8 character of a block begins; a cut there splits no character."""
    for back in range(1, min(4, len(data) - 1) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _read_lines(path: Path) -> Iterator[dict]:
    # Binary lines end at "\n" only: strings may contain Unicode line separators.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield parse_json_line(decode_utf8(line, path, number), path, number) if line.strip() else {}


def _read_array(path: Path) -> Iterator[dict]:
    """Yield the records of a JSON array, which is held whole; a .json file of JSON lines is read as .jsonl."""
    text = decode_utf8(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, 1)
    if not text.lstrip().startswith("["):
        yield from _read_lines(path)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); it must be an array of objects. Correct the file.") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(
                f"{path} record {number} is a {type(record).__name__}; each record must be an object. Correct it."
            )
        yield record


def _read_parquet(path: Path) -> Iterator[dict]:
    """Yield records without the values that Python cannot hold, such as nanosecond times: few texts need them."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns)}
                readable = {name: values for name, values in columns.items() if values is not None}
                for row in range(batch.num_rows):
                    yield {name: values[row] for name, values in readable.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}); write it again.") from error


def _values(column: pyarrow.Array) -> list | None:
    try:
        return column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return None


def _read_array_record(path: Path) -> Iterator[dict]:
    from array_record.python.array_record_module import ArrayRecordReader  # comes with grain

    try:
        reader = ArrayRecordReader(str(path))
        num_records = reader.num_records()
        for first in range(0, num_records, 256):
            for offset, raw in enumerate(reader.read(list(range(first, min(num_records, first + 256))))):
                number = first + offset + 1
                yield parse_json_line(decode_utf8(raw, path, number), path, number)
        reader.close()
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a readable ArrayRecord file ({error}); each record must be one JSON object. Write it again."
        ) from error


def _read_dataset(path: str) -> Iterator[dict]:
    """Yield the rows of a Hugging Face dataset, without running its code."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path!r} needs the `datasets` package. Run pip install datasets, or use files.") from error
    name, config, split = ([*path.removeprefix(_HUGGING_FACE).split(":"), "", ""])[:3]
    if config and not split:
        config, split = "", config
    try:
        if Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)
            rows = rows[split or "train"] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from rows
    except DataError:
        raise
    except Exception as error:  # the library raises its own classes, OSError, ValueError and more
        raise DataError(
            f"{path!r} does not load ({error}); it must be hf:NAME[:CONFIG][:SPLIT] of a dataset. Check it."
        ) from error


def _decode(data: bytes, path: Path, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), data[error.start], start + error.start) from error


def decode_utf8(data: bytes, path: Path, line: int) -> str:
    """Decode a line; raise DataError with file and line if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path} line {line}", data[error.start], error.start) from error


def _not_utf8(where: str, byte: int, offset: int) -> DataError:
    return DataError(
        f"{where}: byte {byte:#04x} at offset {offset} is not UTF-8; text must be UTF-8. "
        "Convert the file (iconv -t utf-8)."
    )


def parse_json_line(line: str, path: Path, number: int) -> dict:
    """Parse a jsonl record; raise DataError with file and line if it is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} line {number} is not JSON ({error}); each line must be one JSON object. Correct the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{path} line {number} is a {type(record).__name__}; each line must be one JSON object. Correct the line."
        )
    return record


def _read_labels(value, path: str, number: int) -> tuple[tuple[int, str], ...]:
    try:
        return tuple((int(offset), str(label)) for offset, label in value or ())
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} record {number}: position_labels is {value!r}; it must be a list of [byte offset, name] pairs. "
            "Correct or remove it."
        ) from error


def _fill(template: str, record: dict, path: str, number: int) -> str:
    if not record:
        return ""
    try:
        used = [field for _, field, _, _ in string.Formatter().parse(template) if field]
        wrong = [f for f in used if f in record and not isinstance(record[f], str | int | float)]
        wrong += [f for f in used if isinstance(record.get(f), bool)]
        if wrong:
            kinds = ", ".join("null" if record[f] is None else type(record[f]).__name__ for f in wrong)
            raise DataError(
                f"{path} record {number}: {wrong} is {kinds}; data.text_template needs text or a number there. "
                "Correct the record, or name parts of it such as {field[0]}."
            )
        text = template.replace("\\n", "\n").format(**record)
        text.encode()
    except DataError:
        raise
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} record {number} contains half of a surrogate pair ({error}); text must be Unicode. Correct it."
        ) from error
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} record {number} has fields {sorted(record)}; data.text_template={template!r} needs {error}. "
            f"Set --data.text-template to existing fields{_example(record)}."
        ) from error
    return text


def _example(record: dict) -> str:
    """Return ", e.g. '{field}'" for the record's longest text, if it has any."""
    texts = {name: value for name, value in record.items() if isinstance(value, str) and value}
    return f", e.g. {'{' + max(texts, key=lambda name: len(texts[name])) + '}'!r}" if texts else ""
