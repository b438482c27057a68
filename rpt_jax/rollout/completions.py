"""Completions as rows of a table: texts, tokens and log-probabilities, for parquet files and reports."""

from collections.abc import Callable

import numpy as np

from rpt_jax.parallel.distributed import to_host
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Rollouts, TaskBatch

COLUMNS = (
    "position_id", "rollout", "context", "completion", "prediction", "truth", "reward", "tokens", "truncated",
    "trunk_tokens", "completion_tokens", "completion_pieces", "logprobs",
)  # fmt: skip


def completion_columns(
    tasks: TaskBatch,
    rollouts: Rollouts,
    predictions,
    rewards,
    tokenizer: Tokenizer,
    columns: Callable[[int], dict],
) -> dict[str, list]:
    """Return the `COLUMNS` of a table with one row per rollout of a real prompt.

    `completion_pieces` are the texts of `completion_tokens`; joined, they are `completion`. `logprobs` are nats, under
    the distribution that `Rollouts.sampler_logprobs` describes.

    Args:
        tasks: the prompts.
        rollouts: of these prompts.
        predictions: `rewards.answer.Predictions`, leading dimensions [U, R].
        rewards: f32 [U, M, G].
        tokenizer: of the policy.
        columns: task id -> what is known of the task (`batches.Source.columns`).
    """
    tasks, rollouts, predictions, rewards = to_host((tasks, rollouts, predictions, rewards))
    G = rewards.shape[-1]
    table: dict[str, list] = {name: [] for name in COLUMNS}
    for u, m in zip(*np.nonzero(tasks.prompts.prompt_mask), strict=True):
        task_id = int(tasks.references.task_ids[u, m])
        trunk = tasks.prompts.trunk_tokens[u, : tasks.prompts.cuts[u, m]].tolist()
        context, truth = tokenizer.decode(trunk), _truth(columns(task_id))
        for g in range(G):
            r = m * G + g
            own = rollouts.mask[u, r]
            completion = rollouts.tokens[u, r][own].tolist()
            pieces = tokenizer.pieces(completion)
            prediction = predictions.bytes[u, r, : predictions.lengths[u, r]].tobytes()
            row = (
                task_id, g, context, "".join(pieces),
                prediction.decode("utf-8", errors="replace") if predictions.found[u, r] else None,
                truth, float(rewards[u, m, g]), len(completion), bool(rollouts.truncated[u, r]),
                trunk, completion, pieces, rollouts.sampler_logprobs[u, r][own].tolist(),
            )  # fmt: skip
            for name, value in zip(COLUMNS, row, strict=True):
                table[name].append(value)
    return table


def _truth(columns: dict) -> str:
    """Return the true continuation, as far as a prediction may reach, or the accepted answers."""
    if "answers" in columns:
        return " or ".join(columns["answers"])
    return columns["continuation"][: columns["boundaries"][-1]].decode("utf-8", errors="replace")
