"""Browse a run's completions in its report: by step, split and reward, and the same position before and after.

The page holds its data and needs no network. browser.js draws it.
"""

import html
import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet

# The page holds up to this many completions and tokens (about 10 bytes each), half of them of evaluations.
MAX_COMPLETIONS, MAX_TOKENS = 8_000, 600_000
_CONTEXT_CHARACTERS = 400
_READ = (
    "position_id", "rollout", "context", "prediction", "truth", "reward", "truncated", "completion_pieces",
    "logprobs", "style", "splits",
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """A completion as read: its file's stage and step, and the columns of `_READ`."""

    stage: str
    step: int
    values: dict


def completion_browser(directory: Path, *, max_completions: int = MAX_COMPLETIONS, max_tokens: int = MAX_TOKENS) -> str:
    """Return the HTML of the browser, or a sentence if the run wrote no completions.

    If there are more completions than fit, whole positions are left out at random, and the page says how many.

    Args:
        directory: of the run.
        max_completions: that the page holds.
        max_tokens: that the page holds.
    """
    training, evaluation, older = [], [], 0
    for path in sorted((directory / "completions").glob("*.parquet")):
        named = re.fullmatch(r"(step|evaluation)_(\d+)", path.stem)
        if not named or "completion_pieces" not in (known := pyarrow.parquet.read_schema(path).names):
            older += 1  # of an earlier version, which kept no log-probabilities
            continue
        table = pyarrow.parquet.read_table(path, columns=[name for name in _READ if name in known])
        stage, step = "training" if named[1] == "step" else "evaluation", int(named[2])
        (training if stage == "training" else evaluation).extend(_Row(stage, step, v) for v in table.to_pylist())
    if not (training or evaluation):
        files = f"{older} files of an earlier version, which cannot be browsed, are in" if older else "None are in"
        return f"<p>{files} <code>completions/</code>.</p>"
    both = 2 if training and evaluation else 1
    limits = max_completions // both, max_tokens // both
    kept = [row for rows in (evaluation, training) for row in _within(rows, *limits)]
    total = len(training) + len(evaluation)
    if len(kept) == total:
        which = f"All {total:,} logged completions."
    else:
        which = f"{len(kept):,} of {total:,} logged completions, of positions drawn at random."
    files = "<code>completions/*.parquet</code>"
    script = Path(__file__).with_name("browser.js").read_text()
    return (
        f"<p>{which} {html.escape('The files with all their tokens:')} {files}.</p>"
        f"<div id='browser'><noscript>Browsing needs JavaScript.</noscript></div>"
        f"<script type='application/json' id='completion-data'>{_embedded(_compact(kept))}</script>"
        f"<script>{script}</script>"
    )


def _within(rows: list[_Row], max_completions: int, max_tokens: int) -> list[_Row]:
    """Return the rows of as many positions as fit; positions of the most evaluations first, otherwise at random."""
    groups: dict[Hashable, list[_Row]] = {}
    for row in rows:
        of_step = row.step if row.stage == "training" else None
        groups.setdefault((of_step, row.values["position_id"]), []).append(row)
    names = list(groups)
    steps = np.array([len({row.step for row in groups[name]}) for name in names])
    order = np.random.default_rng(0).permutation(len(names))
    order = order[np.argsort(-steps[order], kind="stable")]
    kept = []
    for number in order:
        group = groups[names[number]]
        tokens = sum(len(row.values["completion_pieces"]) for row in group)
        if len(group) > max_completions or tokens > max_tokens:
            continue
        max_completions, max_tokens = max_completions - len(group), max_tokens - tokens
        kept += group
    return sorted(kept, key=lambda row: (row.step, row.values["position_id"]))


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
