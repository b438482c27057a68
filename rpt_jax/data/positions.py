"""Selection of positions by the proxy model's entropy over its 16 most likely tokens.

The proxy sees BOS and document tokens only, without a template. The same pass gives the direct prediction (argmax and
log-probability of the true token), which evaluation compares with thinking. A corpus is scored in parts of a few
million tokens, each a parquet file. The pieces of an unfinished part are files as well, so an interrupted pass resumes
after its last piece. Later runs with the same corpus, tokenizer and proxy only read the files.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from rpt_jax.config import PositionsConfig
from rpt_jax.data.documents import Document
from rpt_jax.data.templates import TokenFacts, candidate_mask
from rpt_jax.errors import DataError, Interrupted
from rpt_jax.parallel.distributed import from_main, is_main, to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.scoring.entropy import NUM_TOP_TOKENS, Proxy, direct_statistics

_VERSION = 2
_PART_TOKENS = 2**21
# Document tokens per piece of a part, roughly: at most one piece is lost when scoring is interrupted.
_PIECE_TOKENS = 2**16
# Selectors that need no entropy of the training documents.
UNSCORED_SELECTORS = ("random", "pass_rate_band")


@dataclass(frozen=True, kw_only=True)
class PositionTable:
    """Positions as columns, ordered by document and index; row i is position id i.

    Attributes:
        document: i32 [P], index into the documents.
        index: i32 [P], token index to predict.
        num_bytes: i32 [P], bytes of the continuation within the horizon.
        entropy: f32 [P], nats; NaN if the proxy did not run.
        direct_token: i32 [P], the proxy's argmax; -1 if it did not run.
        direct_logprob: f32 [P], the proxy's log-probability of the true token, nats; NaN if it did not run.
    """

    document: np.ndarray
    index: np.ndarray
    num_bytes: np.ndarray
    entropy: np.ndarray
    direct_token: np.ndarray
    direct_logprob: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows) -> "PositionTable":
        """Return the given rows: indices, a slice or a mask."""
        return replace(self, **{name: column[rows] for name, column in vars(self).items()})

    @staticmethod
    def concatenate(tables: list["PositionTable"]) -> "PositionTable":
        """Return the rows of all tables, in order."""
        names = [f.name for f in fields(PositionTable)]
        return PositionTable(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in names})


def window_start(index, *, window: int, stride: int):
    """Return the start of the window that gives position `index` the most context: the smallest multiple of the stride
    whose window of `window` tokens ends at or after the position. `index` is an int or an array."""
    return np.maximum(0, -((window - index) // stride)) * stride


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How documents are cut into windows, for the policy and the proxy.

    Attributes:
        window: document tokens per window.
        stride: document tokens between the starts of windows.
        continuation_tokens: A, horizon of a continuation.
        min_context_tokens: fewest document tokens before a position.
    """

    window: int
    stride: int
    continuation_tokens: int
    min_context_tokens: int


def candidate_positions(
    documents: Sequence[Document], numbers, facts: TokenFacts, windows: Windows, lengths: np.ndarray
) -> PositionTable:
    """Return all positions that can be tasks, without entropies.

    Args:
        documents: all documents.
        numbers: documents to take positions of.
        facts: properties of the tokenizer's ids.
        windows: how the documents are cut.
        lengths: i64 [documents]; positions are among that many first tokens of each.
    """
    columns = {"document": [], "index": [], "num_bytes": []}
    for number in numbers:
        # A continuation may reach beyond the last position.
        tokens = np.asarray(documents[number].tokens[: lengths[number] + windows.continuation_tokens])
        mask = candidate_mask(
            tokens, facts, min_context_tokens=windows.min_context_tokens, num_tokens=windows.continuation_tokens
        )
        (index,) = np.nonzero(mask[: lengths[number]])
        ends = np.append(0, np.cumsum(facts.lengths[tokens]))
        last = np.minimum(index + windows.continuation_tokens, len(tokens))
        columns["document"].append(np.full(len(index), number, np.int32))
        columns["index"].append(index.astype(np.int32))
        columns["num_bytes"].append((ends[last] - ends[index]).astype(np.int32))
    columns = {name: np.concatenate([np.zeros(0, np.int32), *parts]) for name, parts in columns.items()}
    unknown = np.full(len(columns["index"]), np.nan, np.float32)
    return PositionTable(
        **columns, entropy=unknown, direct_token=np.full(len(unknown), -1, np.int32), direct_logprob=unknown
    )


def add_scores(
    table: PositionTable, documents: Sequence[Document], proxy: Proxy, windows: Windows, progress=iter
) -> PositionTable:
    """Run the proxy over every window that contains a position of the table.

    Args:
        table: positions to score.
        documents: the documents that the table indexes.
        proxy: the scoring model.
        windows: how the documents are cut.
        progress: wraps the iterable of batches.
    Returns:
        The table with entropies and direct predictions.
    """
    starts, firsts = _windows_of(table, windows)
    bos = [] if proxy.bos_id is None else [proxy.bos_id]
    length, U = len(bos) + windows.window + 1, proxy.batch_trunks
    results = [np.zeros(len(table), kind) for kind in (np.float32, np.int32, np.float32)]
    number, tokens = -1, None
    for first in progress(range(0, len(firsts) - 1, U)):
        jobs = [(firsts[j], firsts[j + 1]) for j in range(first, min(first + U, len(firsts) - 1))]
        tokens_UL = np.zeros((U, length), np.int32)
        for u, (row, _) in enumerate(jobs):
            start = starts[row]
            if table.document[row] != number:
                number = table.document[row]
                tokens = documents[number].tokens
            piece = tokens[start : start + windows.window + 1]
            tokens_UL[u, : len(bos)] = bos
            tokens_UL[u, len(bos) : len(bos) + len(piece)] = piece
        statistics = direct_statistics(
            proxy.config, proxy.params, shard_batch(proxy.mesh, tokens_UL), renormalize=proxy.renormalize
        )
        rows = np.arange(jobs[0][0], jobs[-1][1])
        u = np.repeat(np.arange(len(jobs)), [end - begin for begin, end in jobs])
        columns = len(bos) + table.index[rows] - starts[rows]
        for result, values in zip(results, to_host(statistics), strict=True):
            result[rows] = values[u, columns]
        check()
    # Rounding may give an entropy slightly below zero.
    return replace(table, entropy=np.maximum(results[0], 0.0), direct_token=results[1], direct_logprob=results[2])


def _windows_of(table: PositionTable, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Return where the window of each row starts in its document, and the first rows of the windows and the end."""
    starts = window_start(table.index, window=windows.window, stride=windows.stride)
    # Rows of one window are adjacent: the table is ordered, and starts increase with the index.
    is_new = np.append(True, (np.diff(starts) != 0) | (np.diff(table.document) != 0))
    return starts, np.append(np.flatnonzero(is_new[: len(table)]), len(table))


# --- A corpus in parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoredCorpus:
    """Positions of a corpus in parts; with a proxy, each part is scored once and kept on disk.

    Attributes:
        documents: the corpus.
        lengths: i64 [documents], number of first tokens of each to take positions from.
        facts: properties of the tokenizer's ids.
        windows: how the documents are cut.
        proxy: the scoring model; None leaves entropies unknown and writes nothing.
        directory: directory of the parts; its name must identify everything that they depend on (`parts_key`).
        progress: (description, iterable) -> iterable.
    """

    documents: Sequence[Document]
    lengths: np.ndarray
    facts: TokenFacts
    windows: Windows
    proxy: Proxy | None
    directory: Path
    progress: Any

    @property
    def num_parts(self) -> int:
        """Number of parts, scored or not."""
        return len(self._ranges())

    def __iter__(self) -> Iterator[PositionTable]:
        for number in range(self.num_parts):
            yield self.part(number)

    def part(self, number: int) -> PositionTable:
        """Return one part, from disk or scored now.

        Raises:
            DataError: a damaged file.
        """
        path = self._path(number)
        # All processes must agree, because they score together.
        if from_main(path.exists()):
            return _read_part(path)
        begin, end = self._ranges()[number]
        table = candidate_positions(self.documents, range(begin, end), self.facts, self.windows, self.lengths)
        return table if self.proxy is None else self._score(table, number)

    def _score(self, table: PositionTable, number: int) -> PositionTable:
        """Score a part piece by piece, each written when it is done, and join the pieces to one file."""
        path, U, scored, files = self._path(number), self.proxy.batch_trunks, [], []
        _, firsts = _windows_of(table, self.windows)
        piece = U * -(-_PIECE_TOKENS // (self.windows.stride * U))  # windows per piece
        cuts = [*firsts[:-1:piece], len(table)]
        batches = iter(self.progress(f"entropy, part {number + 1} of {self.num_parts}", range(0, len(firsts) - 1, U)))
        for begin, end in itertools.pairwise(cuts):
            file, rows = path.with_suffix(f".{len(files):05d}.parquet"), table.take(slice(begin, end))
            if from_main(file.exists()):
                scored.append(_read_part(file))
                list(itertools.islice(batches, piece // U))
            else:
                done = f"piece {len(files)} of {len(cuts) - 1} of part {number + 1} of {self.num_parts}"
                scored.append(self._score_piece(rows, batches, done))
                _write_part(scored[-1], file)
            files.append(file)
        list(batches)  # the end of the progress bar
        check()  # every process has read the pieces
        table = PositionTable.concatenate([table.take(slice(0)), *scored])
        _write_part(table, path)
        if is_main():
            for file in files:
                file.unlink(missing_ok=True)
        return table

    def _score_piece(self, rows: PositionTable, batches: Iterator, done: str) -> PositionTable:
        def advance(items):
            return (item for item, _ in zip(items, batches, strict=False))

        try:
            return add_scores(rows, self.documents, self.proxy, self.windows, advance)
        except Interrupted as stop:
            stop.add_note(f"entropies up to {done} are kept in {self.directory}")
            raise

    @property
    def is_scored(self) -> bool:
        """Return whether every part is on disk."""
        return all(self._path(number).exists() for number in range(self.num_parts))

    def _path(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.parquet"

    def _ranges(self) -> list[tuple[int, int]]:
        """Return document ranges of about `_PART_TOKENS` tokens."""
        number = np.maximum(np.cumsum(self.lengths) - 1, 0) // _PART_TOKENS
        firsts = np.flatnonzero(np.append(True, np.diff(number) != 0)[: len(number)])
        return list(zip(firsts.tolist(), [*firsts[1:].tolist(), len(number)], strict=True))


def parts_key(corpus: str, tokenizer: str, proxy: str, windows: Windows, settings: tuple) -> str:
    """Return the name of the directory of scored parts, a hash of everything that they depend on.

    Args:
        corpus: fingerprint of the documents.
        tokenizer: fingerprint of the tokenizer.
        proxy: fingerprint of the proxy.
        windows: how the documents are cut.
        settings: JSON-able settings of candidates and scores.
    """
    what = json.dumps([_VERSION, corpus, tokenizer, proxy, vars(windows), settings, _PART_TOKENS], sort_keys=True)
    return f"positions-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _write_part(table: PositionTable, path: Path) -> None:
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".partial-{os.getpid()}")
        pyarrow.parquet.write_table(pyarrow.table(vars(table)), partial_path, compression="zstd")
        os.replace(partial_path, path)


def _read_part(path: Path) -> PositionTable:
    try:
        table = pyarrow.parquet.read_table(path)
        return PositionTable(**{f.name: table[f.name].to_numpy() for f in fields(PositionTable)})
    except (pyarrow.ArrowInvalid, OSError, KeyError) as error:
        raise DataError(f"scored positions {path} are damaged ({error}); delete the file to rebuild it.") from error


# --- Selection ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selected positions, and the entropy threshold in nats; NaN if the selector uses none."""

    table: PositionTable
    threshold: float


def select_from_corpus(corpus: ScoredCorpus, settings: PositionsConfig, *, seed: int) -> Selection:
    """Select the positions to train on, part by part, so that only selected ones are in memory.

    Raises:
        DataError: the corpus has no position, or the selector keeps nothing.
    """
    threshold = {
        "entropy_threshold": lambda: settings.entropy_threshold,
        "entropy_top_fraction": lambda: top_fraction_threshold(corpus, settings.top_fraction),
    }.get(settings.selector, lambda: float("nan"))()
    kept, num_candidates, highest, logprob = [], 0, -np.inf, 0.0
    for number, table in enumerate(corpus):
        num_candidates += len(table)
        if settings.selector not in UNSCORED_SELECTORS:
            highest = max(highest, table.entropy.max(initial=-np.inf))
            logprob += float(table.direct_logprob.sum(dtype=np.float64))
        rows = select_positions(table, settings, threshold=threshold, stride=corpus.windows.stride, seed=(seed, number))
        kept.append(table.take(rows))
    if not num_candidates:
        raise DataError(
            f"none of the {len(corpus.documents)} documents has a position with {corpus.windows.min_context_tokens} "
            "tokens before it and a target that a box can hold. Use longer documents or lower "
            "--positions.min-context-tokens."
        )
    selected = PositionTable.concatenate(kept)
    if not len(selected):
        if threshold < np.log(NUM_TOP_TOKENS):  # the highest entropy over NUM_TOP_TOKENS tokens
            _check_proxy(corpus, logprob / num_candidates)
        raise DataError(
            f"no position has more than positions.entropy_threshold={threshold} nats "
            f"(highest: {highest:.3f}). Lower --positions.entropy-threshold."
        )
    return Selection(table=selected, threshold=threshold)


def _check_proxy(corpus: ScoredCorpus, mean_logprob: float) -> None:
    """Raise DataError for a proxy near chance: the entropy over its 16 most likely of many tokens is then near 0."""
    chance = -np.log(corpus.proxy.config.num_ids or corpus.proxy.config.vocab_size)
    if mean_logprob < 0.8 * chance:
        raise DataError(
            f"no position has a high entropy because the proxy is not trained enough: its mean log-probability is "
            f"{mean_logprob:.2f} nats and chance is {chance:.2f}. Train it longer, or set --proxy.path to another."
        )


def top_fraction_threshold(corpus: ScoredCorpus, fraction: float) -> float:
    """Return the entropy that a `fraction` of all positions exceeds, exactly except for ties.

    Two passes over the parts: the first counts in bins, the second sorts the bin of the threshold.
    """
    edges = np.linspace(0.0, np.log(NUM_TOP_TOKENS) + 2.0, 4097)
    counts = sum(np.histogram(t.entropy, np.append(edges, np.inf))[0] for t in corpus)
    if not counts.sum():
        return 0.0
    wanted = max(1, round(fraction * counts.sum()))
    above = counts[::-1].cumsum()[::-1]  # positions at or above each edge
    number = int(np.flatnonzero(above >= wanted)[-1])
    low, high = edges[number], np.append(edges, np.inf)[number + 1]
    inside = np.sort(np.concatenate([t.entropy[(t.entropy >= low) & (t.entropy < high)] for t in corpus]))[::-1]
    rest = wanted - (int(above[number + 1]) if number + 1 < len(above) else 0)
    # Just below the value, so that `entropy > threshold` keeps it.
    return float(np.nextafter(inside[rest - 1], np.float32(-np.inf)))


def select_positions(
    table: PositionTable, settings: PositionsConfig, *, threshold: float, stride: int, seed
) -> np.ndarray:
    """Return the rows of the table to train on, i64, ascending.

    Args:
        table: positions of a part.
        settings: how to select.
        threshold: entropy that positions must exceed, nats, except for the unfiltered fraction.
        stride: number of document tokens that share the limit on positions.
        seed: seed of the random draws.
    """
    rng = np.random.default_rng(seed)
    is_scored = settings.selector not in UNSCORED_SELECTORS
    kept = np.flatnonzero(table.entropy > threshold) if is_scored else np.arange(len(table))
    kept = _cap_per_window(rng.permutation(kept), table, stride, settings.max_positions_per_window)
    share = settings.unfiltered_fraction
    if share and is_scored:
        others = np.setdiff1d(np.arange(len(table)), kept)
        count = min(len(others), round(len(kept) * share / (1 - share)))
        kept = np.concatenate([kept, rng.choice(others, count, replace=False)])
    return np.sort(kept)


def _cap_per_window(rows, table: PositionTable, stride: int, limit: int):
    """Keep the first `limit` rows of each run of `stride` document tokens."""
    window = table.document[rows].astype(np.int64) << 32 | table.index[rows] // stride
    order = np.argsort(window, kind="stable")
    is_first = np.append(True, np.diff(window[order]) != 0)[: len(order)]
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    return rows[order[np.arange(len(order)) - first < limit]]
