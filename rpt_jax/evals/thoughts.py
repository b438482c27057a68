"""Whether the thought matters: the answer after the policy's own thought, another position's, filler, and none.

Everything but the thought stays the same: context, template, and the marks that close the thought and open the box. The
answer is read from the distribution of its first token, after each thought and for the mixture over a position's
thoughts (`scoring/answers.py`). If thoughts carry information about their own position, "own" beats "other"; if they
only give time to compute, "filler" does as well.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.data.batches import TaskSource
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.evals.sampling import policies_of, sample
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.base import make_reader
from rpt_jax.rewards.prefix import prefix_match_reward
from rpt_jax.scoring.requests import AFTER_THOUGHT, DIRECT_ANSWER, OPEN, Kept, Scorer
from rpt_jax.tokenizer import THINK_CLOSE, Tokenizer
from rpt_jax.types import TaskBatch

OWN, OTHER, FILLER, NONE, DIRECT = "own thought", "other's thought", "filler", "no thought", "direct"
CONDITIONS = (OWN, OTHER, FILLER, NONE, DIRECT)
_FILLER = "."


@dataclass(frozen=True, kw_only=True)
class ThoughtEvaluator:
    """Reads a policy's answers after different thoughts, at fixed positions of held-out documents.

    Attributes:
        config: of the run; eval.num_samples thoughts per position at the rollout temperature.
        mesh: that holds parameters and batches.
        tokenizer: of the policy.
        source: held-out tasks.
        splits: {split: position ids}, from `next_token.difficulty_splits`.
        scorer: of the run.
        progress: (name, batches) -> the same batches, shown as they are done.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    source: TaskSource
    splits: dict[str, np.ndarray]
    scorer: Scorer
    progress: Callable[[str, Iterable], Iterable] = lambda _, batches: batches

    def evaluate(self, params) -> dict:
        """Return {split: {condition: {metric: {"value", "standard_error", "n"}}}}.

        correct: the most likely first token is a right prediction, mean over thoughts. mixture_correct: the same of the
        mixture. logprob: of the true token under the mixture, nats. calibration_error: of the mixture's confidence.
        own_minus_logprob, own_minus_correct: own thought minus this condition, paired by position (mixture).
        """
        ids = np.unique(np.concatenate(list(self.splits.values())))
        thoughts = self._own(params, ids)
        n = len(ids)
        columns = {}
        for name, of_all in (
            (OWN, thoughts),
            # Ids are in the order of the documents, so half of them lie between a position and the other.
            (OTHER, _taken(thoughts, (np.arange(n) + n // 2) % n)),
            (FILLER, self._filler(thoughts)),
            (NONE, _none(n)),
            (DIRECT, None),
        ):
            columns[name] = self._answers(params, ids, name, of_all)
        return {split: _figures(columns, np.searchsorted(ids, members)) for split, members in self.splits.items()}

    def _batches(self, ids, group_size: int):
        """Yield (tasks, rows [U, M] of the positions in `ids`, -1 for padding)."""
        U, M = self.config.eval.batch_trunks, self.config.rollout.prompts_per_trunk
        trunks = self.source.group(ids, M)
        for first in range(0, len(trunks), U):
            group = [trunks[i] if i < len(trunks) else [] for i in range(first, first + U)]
            batch = self.source.make(group, prompts_per_trunk=M, group_size=group_size)
            task_ids = batch.references.task_ids
            yield batch, np.where(task_ids >= 0, np.searchsorted(ids, task_ids), -1)

    def _own(self, params, ids) -> Kept:
        """Sample k thoughts of each position; NumPy arrays [n, k, ...]."""
        settings, k = self.config, self.config.eval.num_samples
        C = settings.rollout.max_completion_tokens
        shape = (len(ids), k)
        found = Kept(
            tokens=np.zeros((*shape, C), np.int32), length=np.zeros(shape, np.int32), stub=np.zeros(shape, np.int32)
        )
        read = make_reader(settings.reward, self.tokenizer)
        for batch, rows in self.progress("thoughts", self._batches(ids, k)):
            tasks = shard_batch(self.mesh, batch)
            rollouts = sample(settings, self.tokenizer, policies_of(params, None), tasks, settings.rollout.temperature)
            predictions, _ = read(rollouts, tasks.references.bytes.shape[-1])
            kept = to_host(self.scorer.kept(AFTER_THOUGHT, rollouts, predictions.think_end_tokens))
            real = rows >= 0
            for all_values, values in zip(jax.tree.leaves(found), jax.tree.leaves(kept)):
                all_values[rows[real]] = values.reshape(*rows.shape, k, *values.shape[2:])[real]
        return found

    def _filler(self, thoughts: Kept) -> Kept:
        """Return as many filler tokens as each thought has before its mark, left open."""
        _, lengths_V = self.tokenizer.byte_table()
        starts = self.scorer.replaced_bytes(thoughts.stub)
        ends = np.cumsum(lengths_V[thoughts.tokens], axis=-1)
        kept = np.where(thoughts.length > 0, np.take_along_axis(ends, thoughts.length[..., None] - 1, -1)[..., 0], 0)
        mark = kept + starts - np.where(thoughts.stub == OPEN, 0, len(THINK_CLOSE))
        begins = ends - lengths_V[thoughts.tokens]
        inside = np.arange(thoughts.tokens.shape[-1]) < thoughts.length[..., None]
        # A token without bytes lies before the mark if it ends there.
        size = (inside & ((begins < mark[..., None]) | (ends <= mark[..., None]))).sum(-1)
        filler = self.tokenizer.encode_continuation(_FILLER)[0]
        size = size.astype(np.int32)
        return Kept(tokens=np.full_like(thoughts.tokens, filler), length=size, stub=np.full_like(size, OPEN))

    def _answers(self, params, ids, name: str, thoughts: Kept | None) -> dict[str, np.ndarray]:
        """Return figures [n] of each position."""
        k = 1 if thoughts is None else thoughts.length.shape[1]
        request = DIRECT_ANSWER if thoughts is None else AFTER_THOUGHT
        columns = {
            name: np.zeros(len(ids), np.float32) for name in ("correct", "mixture_correct", "logprob", "confidence")
        }
        for batch, rows in self.progress(name, self._batches(ids, k)):
            tasks, kept = shard_batch(self.mesh, batch), None
            if thoughts is not None:
                of_batch = _taken(thoughts, np.maximum(rows, 0))
                kept = shard_batch(self.mesh, jax.tree.map(_by_row, of_batch))
            answers = to_host(self.scorer.answers(request, params, tasks, kept))
            real = rows >= 0
            values = {
                "correct": self._is_right(answers.tokens.reshape(*rows.shape, k), batch).mean(-1),
                "mixture_correct": self._is_right(answers.mixture_tokens[..., :1], batch)[..., 0],
                "logprob": answers.mixture_logprobs,
                "confidence": answers.mixture_probabilities[..., 0],
            }
            for metric, of_all in values.items():
                columns[metric][rows[real]] = of_all[real]
        return columns

    def _is_right(self, tokens_UMk: np.ndarray, batch: TaskBatch) -> np.ndarray:
        """Return whether tokens are right predictions (arXiv:2506.08007 eq. 3), f32 like `tokens`."""
        table, lengths = self.tokenizer.byte_table()
        known = tokens_UMk < self.tokenizer.vocab_size
        flat = np.where(known, tokens_UMk, 0).reshape(-1)
        k = tokens_UMk.shape[-1]
        truth = [
            np.repeat(a.reshape(-1, a.shape[-1]), k, axis=0)
            for a in (batch.references.bytes, batch.references.boundary_mask)
        ]
        right = prefix_match_reward(table[flat], lengths[flat], *truth)
        return np.asarray(right).reshape(tokens_UMk.shape) * known


def _taken(thoughts: Kept, rows) -> Kept:
    """Return the thoughts of these positions."""
    return jax.tree.map(lambda x: x[rows], thoughts)


def _by_row(x_UMk):
    return x_UMk.reshape(len(x_UMk), -1, *x_UMk.shape[3:])


def _none(n: int) -> Kept:
    return Kept(
        tokens=np.zeros((n, 1, 1), np.int32), length=np.zeros((n, 1), np.int32), stub=np.full((n, 1), OPEN, np.int32)
    )


def _figures(columns: dict[str, dict[str, np.ndarray]], rows: np.ndarray) -> dict:
    figures = {}
    for condition, of_all in columns.items():
        here = {name: values[rows] for name, values in of_all.items()}
        own = {name: columns[OWN][name][rows] for name in ("logprob", "mixture_correct")}
        cells = {name: mean_with_error(here[name]) for name in ("correct", "mixture_correct", "logprob", "confidence")}
        cells["calibration_error"] = calibration_error(here["confidence"], here["mixture_correct"])
        if condition != OWN:
            cells["own_minus_logprob"] = mean_with_error(own["logprob"] - here["logprob"])
            cells["own_minus_correct"] = mean_with_error(own["mixture_correct"] - here["mixture_correct"])
        figures[condition] = cells
    return figures


def calibration_error(confidence, correct, *, num_bins: int = 10, num_resamples: int = 200) -> dict:
    """Return the expected calibration error and its bootstrap standard error, {"value", "standard_error", "n"}.

    Predictions are binned by confidence in bins of equal width; the error is sum over bins of n_b / n times
    |mean correct - mean confidence|. Source: Guo et al., arXiv:1706.04599 eq. 3. It is biased upwards for small n.

    Args:
        confidence: f32 [n], in [0, 1].
        correct: f32 [n], 0 or 1.
        num_bins: of equal width.
        num_resamples: of the bootstrap over positions, with a fixed seed.
    """
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.asarray(correct, np.float64) - confidence

    def error(rows) -> float:
        return float(np.abs(np.bincount(bins[rows], gaps[rows], minlength=num_bins)).sum() / len(rows))

    n, rng = len(gaps), np.random.default_rng(0)
    resampled = [error(rng.integers(0, n, n)) for _ in range(num_resamples)]
    return {"value": error(np.arange(n)), "standard_error": float(np.std(resampled)), "n": n}
