"""Plots of position selection: the distribution of all and selected entropies, and a sample of coloured text."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpt_jax.analysis.reports.figures import subplots
from rpt_jax.data.documents import Document
from rpt_jax.data.positions import PositionTable, ScoredCorpus, Selection
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.train.run_directory import write_atomically

_HIGHEST = 5.0  # nats; entropy over 16 tokens is at most ln 16 = 2.77


@dataclass(frozen=True)
class EntropyCounts:
    """Histograms of entropy, of all positions and of the selected ones.

    Attributes:
        edges: f64 [102], edges of the bins, nats; the last one is infinite.
        all: i64 [101], number of positions in each bin.
        selected: i64 [101], number of selected positions in each bin.
    """

    edges: np.ndarray
    all: np.ndarray
    selected: np.ndarray


def entropy_counts(corpus: ScoredCorpus, selected: PositionTable) -> EntropyCounts:
    """Count positions in bins of 0.05 nats; only one part is in memory at a time."""
    edges = np.append(np.linspace(0, _HIGHEST, 101), np.inf)

    def count(entropy):
        return np.histogram(np.maximum(entropy, 0.0), edges)[0]

    return EntropyCounts(edges, sum(count(part.entropy) for part in corpus), count(selected.entropy))


def write_picture(path: Path, counts: EntropyCounts, threshold: float) -> None:
    """Plot the histograms on a logarithmic scale, and the share of positions at or above each entropy (PNG)."""
    figure, (left, right) = subplots(1, 2, figsize=(11, 3.8))
    middle, width = counts.edges[:-1], 0.05
    left.bar(middle, counts.all, width, align="edge", color="#c9d1d9", label=f"all, {counts.all.sum():,}")
    left.bar(
        middle, counts.selected, width, align="edge", color="#1f6feb", label=f"selected, {counts.selected.sum():,}"
    )
    share = counts.all[::-1].cumsum()[::-1] / max(1, counts.all.sum())
    right.plot(middle, share, color="#57606a")
    for axis in (left, right):
        axis.axvline(threshold, color="#d1731a", lw=1.2, label=f"threshold {threshold:.3f}")
        axis.set_xlabel("entropy over the proxy's 16 most likely tokens, nats")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        last = middle[np.flatnonzero(counts.all)[-1]] if counts.all.any() else _HIGHEST
        axis.set_xlim(0, max(threshold * 1.1, last + 0.1))
    left.set_ylabel("positions")
    right.set_ylabel("share at or above")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write_sample(
    path: Path,
    part: PositionTable,
    selection: Selection,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    num_documents: int = 6,
    num_tokens: int = 400,
) -> None:
    """Write a page with the beginnings of some documents: shade is entropy, frames mark selected positions.

    Args:
        path: of the page.
        part: scored positions that the documents are taken from, evenly spread.
        selection: selected positions and their threshold.
        documents: that the positions index.
        tokenizer: that decodes their tokens.
        num_documents: maximum number of documents.
        num_tokens: maximum number of tokens of each document.
    """
    numbers = np.unique(part.document)
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(num_documents, len(numbers))).astype(int)]
    kept = set(zip(selection.table.document.tolist(), selection.table.index.tolist(), strict=True))
    blocks, shade = [], _HIGHEST / 2
    for number in numbers:
        rows = np.flatnonzero(part.document == number)
        entropy = dict(zip(part.index[rows].tolist(), part.entropy[rows].tolist(), strict=True))
        tokens = documents[number].tokens[:num_tokens]
        text = "".join(
            _token(tokenizer, int(t), entropy.get(i), (int(number), i) in kept) for i, t in enumerate(tokens)
        )
        blocks.append(f"<h2>{html.escape(documents[number].id)}</h2><p class='text'>{text}</p>")
    write_atomically(
        path,
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Selected positions</title><style>
body {{ font: 15px/1.9 system-ui, sans-serif; max-width: 900px; margin: 2em auto }} p.text {{ white-space: pre-wrap }}
h2 {{ font-size: 14px; color: #57606a }} .kept {{ outline: 2px solid #1f6feb; border-radius: 3px }}
span {{ padding: 1px 0 }} .none {{ color: #8c959f }}</style>
<h1>Selected positions</h1><p>Shade: the proxy's entropy, from white at 0 to orange at {shade:g} nats.
<span class="kept">Framed</span>: selected (above {selection.threshold:.3f} nats, up to the limit per window, or part of
the unfiltered share).
<span class="none">Grey</span>: not a candidate, for example too early or inside a character. Hover for the entropy.</p>
{"".join(blocks)}
</html>""",
    )


def _token(tokenizer: Tokenizer, token_id: int, entropy: float | None, is_kept: bool) -> str:
    text = html.escape(tokenizer.decode([token_id]))
    if entropy is None:
        return f'<span class="none">{text}</span>'
    strength = min(1.0, entropy / (_HIGHEST / 2))
    style = f"background: rgba(240, 136, 62, {strength:.2f})"
    return f'<span style="{style}" title="{entropy:.2f} nats"{" class=kept" if is_kept else ""}>{text}</span>'
