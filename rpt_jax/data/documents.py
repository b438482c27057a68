"""Tokenised documents on disk: written once as a stream, then read as memory-mapped slices.

A corpus is never in memory as a whole. A store is a directory of tokens.i32 (the tokens of all documents),
documents.parquet (id, length, corpus, labels) and meta.json, written last.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from rpt_jax.data.readers import Corpus, Text, file_stamps, has_files, read_texts
from rpt_jax.errors import DataError
from rpt_jax.tokenizer import Tokenizer

_VERSION = 1
# Characters to encode at once: the tokenizer needs a hundred times their size in memory.
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, kw_only=True)
class Document:
    """One tokenised document."""

    id: str
    """File name and record number."""
    tokens: np.ndarray
    """i32 [length], without special tokens."""
    labels: tuple[tuple[int, str], ...] = ()
    """(token index, name) of each labelled position."""
    corpus: int = 0
    """Part of the mixture that it belongs to."""


class Documents(Sequence[Document]):
    """All or some documents of a store, read on access.

    Attributes:
        fingerprint: sha256 of the store.
        numbers: i64 [number of documents], documents of the store in this view.
    """

    def __init__(self, path: Path, table: pyarrow.Table, fingerprint: str, numbers: np.ndarray | None = None):
        self._path, self._table, self.fingerprint = path, table, fingerprint
        lengths = table["length"].to_numpy()
        self._ends = np.cumsum(lengths)
        self.numbers = np.arange(len(lengths)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Document:
        number = int(self.numbers[index])
        row = {name: self._table[name][number].as_py() for name in ("id", "length", "corpus", "labels")}
        length, begin = row["length"], int(self._ends[number]) - row["length"]
        # Map one document at a time: the pages of a map of the whole file would add up to the corpus.
        tokens = np.memmap(self._path, "<i4", "r", 4 * begin, (length,)) if length else np.zeros(0, np.int32)
        return Document(
            id=row["id"],
            tokens=tokens,
            labels=tuple((label["index"], label["name"]) for label in row["labels"]),
            corpus=row["corpus"],
        )

    @property
    def lengths(self) -> np.ndarray:
        """i64 [number of documents], number of tokens of each."""
        return self._table["length"].to_numpy()[self.numbers]

    @property
    def corpora(self) -> np.ndarray:
        """i32 [number of documents], mixture part of each."""
        return self._table["corpus"].to_numpy()[self.numbers]

    def take(self, numbers: np.ndarray) -> "Documents":
        """Return a view of some of these documents, in the given order."""
        return Documents(self._path, self._table, self.fingerprint, self.numbers[numbers])


def open_documents(corpora: list[Corpus], tokenizer: Tokenizer, cache: Path, progress=iter) -> Documents:
    """Open the documents of a corpus or mixture, from the cache or by reading and tokenising them.

    If the files are gone, the cache's newest store of the same paths, templates and tokenizer is opened.

    Args:
        corpora: parts of the mixture.
        tokenizer: the policy's tokenizer.
        cache: directory of stores; a store is named by its files (path, size, time), templates and tokenizer.
        progress: wraps the iterable of texts.
    Raises:
        DataError: see `readers.read_texts`; text that the tokenizer cannot spell; a label inside a token.
    """
    source = _source(corpora, tokenizer)
    if not all(has_files(c.path) for c in corpora) and (kept := _newest_store(cache, source)):
        return read_store(kept)
    stamps = [(c.text_template, file_stamps(c.path), *_split_of(c)) for c in corpora]
    key = hashlib.sha256(repr((_VERSION, stamps, tokenizer.fingerprint)).encode()).hexdigest()[:16]
    directory = cache / f"documents-{key}"
    if not (directory / "meta.json").exists():
        texts = (
            (number, text)
            for number, c in enumerate(corpora)
            for text in read_texts(c.path, text_template=c.text_template, split=c.split)
        )
        write_store(progress(texts), tokenizer, directory, source)
    return read_store(directory)


def _source(corpora: list[Corpus], tokenizer: Tokenizer) -> list:
    """Return what a store is made from, JSON-able, whatever its files hold."""
    return [*([c.path, c.text_template, *_split_of(c)] for c in corpora), tokenizer.fingerprint]


def _split_of(corpus: Corpus) -> list[str]:
    """Return what names a split in a store's key; nothing for the usual one, so that earlier stores are found."""
    return [] if corpus.split == "files" else [corpus.split]


def _newest_store(cache: Path, source: list) -> Path | None:
    """Return the newest store in the cache that was made from `source`."""
    found = []
    for path in cache.glob("documents-*/meta.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text()).get("source") == source:
                found.append((path.stat().st_mtime_ns, path.parent))
    return max(found)[1] if found else None


def write_store(
    texts: Iterable[tuple[int, Text]], tokenizer: Tokenizer, directory: Path, source: Sequence = ()
) -> None:
    """Tokenise (part of the mixture, text) pairs into a store directory, in bounded memory. It keeps `source`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.partial-", dir=directory.parent))
    try:
        _write_files(texts, tokenizer, partial, source)
        # If several runs share the cache, the first one's store is kept; all are equal.
        with contextlib.suppress(OSError):
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(texts: Iterable[tuple[int, Text]], tokenizer: Tokenizer, partial: Path, source: Sequence) -> None:
    digest, columns = hashlib.sha256(), {"id": [], "length": [], "corpus": [], "labels": []}
    is_open = False  # True while the last document continues
    with (partial / "tokens.i32").open("wb") as file:
        for corpus, text, ids in _encode(texts, tokenizer):
            if not is_open:
                digest.update(text.id.encode() + b"\0")
                for name, value in (("id", text.id), ("length", 0), ("corpus", corpus), ("labels", [])):
                    columns[name].append(value)
                columns["labels"][-1] = _token_labels(text, ids, tokenizer)
            data = np.asarray(ids, "<i4").tobytes()
            digest.update(data)
            file.write(data)
            columns["length"][-1] += len(ids)
            is_open = text.is_continued
    labels = pyarrow.list_(pyarrow.struct({"index": pyarrow.int64(), "name": pyarrow.string()}))
    kinds = (pyarrow.string(), pyarrow.int64(), pyarrow.int32(), labels)
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), partial / "documents.parquet")
    meta = {"version": _VERSION, "sha256": digest.hexdigest(), "tokens": sum(columns["length"]), "source": source}
    (partial / "meta.json").write_text(json.dumps(meta))


def read_store(directory: Path) -> Documents:
    """Open a store.

    Raises:
        DataError: it is damaged.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text())
        table = pyarrow.parquet.read_table(directory / "documents.parquet")
        path, size = directory / "tokens.i32", int(meta["tokens"])
        if path.stat().st_size != 4 * size:
            raise ValueError(f"tokens.i32 has {path.stat().st_size} bytes for {size} tokens")
        return Documents(path, table, str(meta["sha256"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"tokenised documents in {directory} are damaged ({error}); delete that directory to rebuild them."
        ) from error


def _encode(texts: Iterable[tuple[int, Text]], tokenizer: Tokenizer) -> Iterator[tuple[int, Text, list[int]]]:
    """Yield texts with their ids, encoded many at a time."""
    held: list[tuple[int, Text]] = []
    size, follows = 0, False

    def flush():
        for (corpus, text), ids in zip(held, tokenizer.encode_batch([t.text for _, t in held]), strict=True):
            yield corpus, text, _checked(text, ids, tokenizer)
        held.clear()

    for corpus, text in texts:
        if follows and tokenizer.adds_space:
            # A later piece of a document must not get the space of a first word.
            yield from flush()
            yield corpus, text, _checked(text, tokenizer.encode_continuation(text.text), tokenizer, continues=True)
            size = 0
        else:
            held.append((corpus, text))
            size += len(text.text)
        follows = text.is_continued
        if size >= _BATCH_CHARACTERS:
            yield from flush()
            size = 0
    yield from flush()


def _checked(text: Text, ids: list[int], tokenizer: Tokenizer, *, continues: bool = False) -> list[int]:
    if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
        raise DataError(
            f"document {text.id} contains {ids.count(tokenizer.unk_id)} piece(s) outside the tokenizer's vocabulary; "
            "their bytes would be lost. Use a tokenizer with byte fallback, or leave --data.tokenizer empty."
        )
    if piece := tokenizer.unspeakable(text.text):
        raise DataError(
            f"document {text.id} contains {piece!r}, which the tokenizer can only read as a control token or a byte. "
            "Remove it from the text, or use another tokenizer."
        )
    if (spelled := tokenizer.misspelled(text.text, ids, continues=continues)) is not None:
        raise DataError(
            f"document {text.id} is encoded to tokens with the bytes {spelled[:200]!r}...; they must join to its text. "
            "Use a byte-level BPE, SentencePiece or tiktoken vocabulary."
        )
    return ids


def _token_labels(text: Text, ids: list[int], tokenizer: Tokenizer) -> list[dict]:
    if not text.labels:
        return []
    starts, offset = {}, 0
    for index, token_id in enumerate(ids):
        starts.setdefault(offset, index)
        offset += len(tokenizer.token_bytes(token_id))
    for byte_offset, name in text.labels:
        if byte_offset not in starts:
            raise DataError(
                f"document {text.id}: label {name!r} at byte {byte_offset} is not the start of a token; "
                "labels must be at token boundaries. Correct the offset."
            )
    return [{"index": starts[byte_offset], "name": name} for byte_offset, name in text.labels]


def split_heldout(
    documents: Documents, fraction: float, tokenizer: Tokenizer
) -> tuple[Sequence[Document], Sequence[Document]]:
    """Hold out the last `fraction` of each corpus's documents, or of the lines of a single document.

    Returns:
        (training documents, held-out documents).
    Raises:
        DataError: a single document has no line break to cut at.
    """
    if len(documents) == 1:
        return _split_lines(documents[0], fraction, tokenizer)
    train, heldout = [], []
    for corpus in np.unique(documents.corpora):
        numbers = np.flatnonzero(documents.corpora == corpus)
        if len(numbers) == 1:
            raise DataError(
                f"part {corpus + 1} of data.mixture is one document, {documents[int(numbers[0])].id}; holding "
                "it out would leave nothing to train on. Set --data.heldout-path."
            )
        cut = min(len(numbers) - 1, max(1, round(len(numbers) * (1 - fraction))))
        train.append(numbers[:cut])
        heldout.append(numbers[cut:])
    return documents.take(np.concatenate(train)), documents.take(np.concatenate(heldout))


def _split_lines(only: Document, fraction: float, tokenizer: Tokenizer) -> tuple[list[Document], list[Document]]:
    """Cut after the line-ending token closest to 1 - fraction of the tokens."""
    ends_line = np.array([tokenizer.token_bytes(i).endswith(b"\n") for i in range(tokenizer.vocab_size)])
    cuts = np.flatnonzero(ends_line[only.tokens[:-1]]) + 1
    if not len(cuts):
        raise DataError(
            f"document {only.id} is a single line; {fraction:.0%} of its lines cannot be held out. "
            "Set --data.heldout-path, or use more documents."
        )
    cut = int(cuts[np.argmin(abs(cuts - (1 - fraction) * len(only.tokens)))])
    parts = (("[train]", only.tokens[:cut]), ("[heldout]", only.tokens[cut:]))
    train, heldout = ([Document(id=only.id + tag, tokens=tokens)] for tag, tokens in parts)
    return train, heldout


def first(documents: Sequence[Document], number: int) -> Sequence[Document]:
    """Return up to `number` documents, taken from the parts of a mixture in turn."""
    if not isinstance(documents, Documents):
        return documents[:number]
    corpora = documents.corpora
    rank = np.zeros(len(corpora), int)
    for corpus in np.unique(corpora):
        rank[corpora == corpus] = np.arange((corpora == corpus).sum())
    return documents.take(np.sort(np.lexsort((corpora, rank))[:number]))


def lengths_of(documents: Sequence[Document]) -> np.ndarray:
    """Return the number of tokens of each document, i64."""
    return documents.lengths if isinstance(documents, Documents) else np.array([len(d.tokens) for d in documents])


def first_tokens(documents: Sequence[Document], number: int) -> np.ndarray:
    """Return how many first tokens of each document are among the first `number` tokens of all, i64; 0: all are.

    The parts of a mixture share the number equally.
    """
    lengths = lengths_of(documents)
    if not number:
        return lengths
    corpora = documents.corpora if isinstance(documents, Documents) else np.zeros(len(documents), int)
    kept, every = np.zeros_like(lengths), np.unique(corpora)
    for corpus in every:
        (rows,) = np.nonzero(corpora == corpus)
        before = np.cumsum(lengths[rows]) - lengths[rows]
        kept[rows] = np.clip(number // len(every) - before, 0, lengths[rows])
    return kept


def view_fingerprint(documents: Sequence[Document]) -> str:
    """Return the sha256 of exactly these documents: of the store and their numbers, or of their ids and tokens."""
    digest = hashlib.sha256()
    if isinstance(documents, Documents):
        digest.update(documents.fingerprint.encode() + documents.numbers.astype("<i8").tobytes())
        return digest.hexdigest()
    for document in documents:
        digest.update(document.id.encode() + b"\0" + np.asarray(document.tokens, "<i4").tobytes())
    return digest.hexdigest()


def check_lengths(documents: Sequence[Document], min_context_tokens: int, where: str, max_tokens: int = 0) -> int:
    """Return the number of documents that are too short for a position.

    Args:
        documents: to take positions of.
        min_context_tokens: fewest tokens before a position.
        where: what the documents are for, in messages.
        max_tokens: positions are among that many first tokens of the documents; 0: anywhere.
    Raises:
        DataError: no document can have a position.
    """
    lengths = lengths_of(documents)
    too_short = int((lengths <= min_context_tokens).sum())
    if too_short == len(documents):
        raise DataError(
            f"all {too_short} {where} documents have at most positions.min_context_tokens={min_context_tokens} "
            f"tokens (longest: {lengths.max(initial=0)}); a document needs more than that to have a "
            "position. Use longer documents or lower --positions.min-context-tokens."
        )
    if first_tokens(documents, max_tokens).max() <= min_context_tokens:
        raise DataError(
            f"the first max_tokens={max_tokens} tokens of the {where} documents are too few for a position, which "
            f"needs positions.min_context_tokens={min_context_tokens} before it in its document. Raise "
            f"--{'eval' if where == 'held-out' else 'positions'}.max-tokens."
        )
    return too_short
