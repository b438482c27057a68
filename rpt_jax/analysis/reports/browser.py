"""Browse a run's completions in its report: by step, split and reward, and the same position before and after.

The page holds its data and needs no network. browser.js draws it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

# The page holds up to this many completions and tokens (about 10 bytes each), half of them of evaluations.
MAX_COMPLETIONS, MAX_TOKENS = 8_000, 600_000
_CONTEXT_CHARACTERS = 400
_READ = (
    "position_id", "rollout", "context", "prediction", "truth", "reward", "truncated", "completion_pieces",
    "logprobs", "style", "splits",
)  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A file of completions: its stage and step, and the position and number of tokens of each row."""

    path: Path
    stage: str
    step: int
    positions: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class _Row:
    """A completion as read: its file's stage and step, and the columns of `_READ`."""

    stage: str
    step: int
    values: dict


def completion_browser(directory: Path, *, max_completions: int = MAX_COMPLETIONS, max_tokens: int = MAX_TOKENS) -> str:
    """Return the HTML of the browser, or a sentence if the run wrote no completions.

    If there are more completions than fit, evaluations between the first and the last are left out, then whole
    positions, at random; the page says how many it holds.

    Args:
        directory: of the run.
        max_completions: that the page holds.
        max_tokens: that the page holds; a single position may have more.
    """
    files, older = _files(directory)
    if not files:
        none = f"Files of an earlier version, which cannot be browsed: {older}, in" if older else "None are in"
        return f"<p>{none} <code>completions/</code>.</p>"
    stages = [[f for f in files if f.stage == stage] for stage in ("evaluation", "training")]
    limits = [limit // sum(map(bool, stages)) for limit in (max_completions, max_tokens)]
    chosen = [_within(of_stage, *limits) for of_stage in stages if of_stage]
    rows = [row for places in chosen for file, kept in places for row in _rows(file, kept)]
    total = sum(len(f.positions) for f in files)
    which = f"All {total:,}" if len(rows) == total else f"{len(rows):,} of {total:,}"
    of = "logged completions" + ("" if len(rows) == total else ", of positions drawn at random")
    left = f" Files of an earlier version, which cannot be browsed: {older}." if older else ""
    script = Path(__file__).with_name("browser.js").read_text()
    return (
        f"<p>{which} {of}. All are in <code>completions/*.parquet</code>.{left}</p>"
        f"<div id='browser'><noscript>Browsing needs JavaScript.</noscript></div>"
        f"<script type='application/json' id='completion-data'>{_embedded(_compact(rows))}</script>"
        f"<script>{script}</script>"
    )


def _files(directory: Path) -> tuple[list[_File], int]:
    """Return the files of a run's completions, and how many an earlier version wrote, without log-probabilities."""
    found, older = [], 0
    for path in sorted((directory / "completions").glob("*.parquet")):
        named = re.fullmatch(r"(step|evaluation)_(\d+)", path.stem)
        if not named or "completion_pieces" not in pyarrow.parquet.read_schema(path).names:
            older += 1
            continue
        table = pyarrow.parquet.read_table(path, columns=["position_id", "tokens"])
        positions, tokens = (table[name].to_numpy() for name in ("position_id", "tokens"))
        stage = "training" if named[1] == "step" else "evaluation"
        found.append(_File(path=path, stage=stage, step=int(named[2]), positions=positions, tokens=tokens))
    return found, older


def _within(files: list[_File], max_completions: int, max_tokens: int) -> list[tuple[_File, set[int]]]:
    """Return files of one stage with the positions to read, as many as fit; those of the most evaluations first."""
    is_evaluation = files[0].stage == "evaluation"
    fits = sum(len(f.tokens) for f in files) <= max_completions and sum(f.tokens.sum() for f in files) <= max_tokens
    if is_evaluation and not fits and len(files) > 2:
        files = [files[0], files[-1]]
    groups: dict[tuple, list[tuple[int, int, int]]] = {}
    for number, file in enumerate(files):
        for position in np.unique(file.positions).tolist():
            own = file.positions == position
            # A position is in several evaluations, but its training batches have nothing to do with each other.
            group = groups.setdefault((None if is_evaluation else number, position), [])
            group.append((number, int(own.sum()), int(file.tokens[own].sum())))
    names = list(groups)
    order = np.random.default_rng(0).permutation(len(names))
    order = order[np.argsort([-len(groups[names[i]]) for i in order], kind="stable")]
    kept: list[set[int]] = [set() for _ in files]
    rows = tokens = 0
    for i in order:
        rows += sum(count for _, count, _ in groups[names[i]])
        tokens += sum(length for _, _, length in groups[names[i]])
        if any(kept) and (rows > max_completions or tokens > max_tokens):
            break
        for number, _, _ in groups[names[i]]:
            kept[number].add(names[i][1])
    return list(zip(files, kept, strict=True))


def _rows(file: _File, positions: set[int]) -> list[_Row]:
    """Read the completions of some positions, in their order."""
    known = pyarrow.parquet.read_schema(file.path).names
    table = pyarrow.parquet.read_table(file.path, columns=[name for name in _READ if name in known])
    table = table.filter(pyarrow.array(np.isin(file.positions, list(positions)))).sort_by("position_id")
    return [_Row(file.stage, file.step, values) for values in table.to_pylist()]


def _compact(rows: list[_Row]) -> dict:
    """Return the rows as columns; contexts, tokens and names are stored once, log-probabilities in 0.01 nats."""
    pieces, splits, tasks = _Numbers(), _Numbers(), _Numbers()
    columns: dict[str, list] = {
        name: [] for name in ("stage", "step", "task", "greedy", "reward", "prediction", "cut", "tokens", "logprobs")
    }
    for row in rows:
        v = row.values
        # Tasks of training and of evaluation are numbered separately.
        context = v["context"]
        shown = context if len(context) <= _CONTEXT_CHARACTERS else "… " + context[-_CONTEXT_CHARACTERS:]
        members = tuple(splits[name] for name in v.get("splits") or ())
        columns["stage"].append(int(row.stage == "evaluation"))
        columns["step"].append(row.step)
        columns["task"].append(tasks[(row.stage, v["position_id"], shown, v["truth"], members)])
        columns["greedy"].append(int(v.get("style") == "greedy"))
        columns["reward"].append(round(v["reward"], 4))
        columns["prediction"].append(v["prediction"])
        columns["cut"].append(int(v["truncated"]))
        columns["tokens"].append([pieces[piece] for piece in v["completion_pieces"]])
        columns["logprobs"].append([round(-100 * x) if np.isfinite(x) else 9999 for x in v["logprobs"]])
    return columns | {
        "pieces": list(pieces), "splits": list(splits),
        "tasks": [{"position": p, "context": c, "truth": t, "splits": s} for _, p, c, t, s in tasks],
    }  # fmt: skip


class _Numbers(dict):
    """Numbers things in the order in which they are first asked for."""

    def __missing__(self, key):
        self[key] = len(self)
        return self[key]


def _embedded(data: dict) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
