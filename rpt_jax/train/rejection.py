"""Rejection sampling: rewarded rollouts become examples for a cold start, with the token ids that were sampled."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def accepted_rows(rows: Iterable[dict], *, min_reward: float, per_prompt: int) -> tuple[list[dict], dict[str, int]]:
    """Select rows to learn from: correct, finished, distinct, at most `per_prompt` of a prompt, shortest first.

    Args:
        rows: with the fields of `rollout.completions.completion_columns`.
        min_reward: lowest accepted reward.
        per_prompt: maximum number of rows of a prompt.
    Returns:
        (rows, counts: rollouts, low_reward, truncated, repeated, over_limit, kept).
    """
    counts = dict.fromkeys(("rollouts", "low_reward", "truncated", "repeated", "over_limit", "kept"), 0)
    by_prompt: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
    for row in rows:
        counts["rollouts"] += 1
        completion = tuple(row["completion_tokens"])
        prompt = by_prompt[tuple(row["trunk_tokens"])]
        if row["reward"] < min_reward:
            counts["low_reward"] += 1
        elif row["truncated"]:
            counts["truncated"] += 1
        elif completion in prompt:
            counts["repeated"] += 1
        else:
            prompt[completion] = row
    kept = []
    for prompt in by_prompt.values():
        in_order = sorted(prompt.values(), key=lambda row: len(row["completion_tokens"]))
        kept += in_order[:per_prompt]
        counts["over_limit"] += len(in_order[per_prompt:])
    counts["kept"] = len(kept)
    return kept, counts


def write_examples(path: Path, rows: list[dict], *, tokenizer: str, template: str) -> None:
    """Write a file for supervised.path, one line per row: token ids and the two fingerprints.

    Args:
        path: of the file.
        rows: from `accepted_rows`.
        tokenizer: fingerprint of the tokenizer.
        template: fingerprint of the prompt template.
    """
    with path.open("w") as file:
        for row in rows:
            line = {name: row[name] for name in ("trunk_tokens", "completion_tokens")}
            file.write(json.dumps(line | {"tokenizer": tokenizer, "template": template}) + "\n")
