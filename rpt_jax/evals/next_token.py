"""Next-token accuracy by difficulty, with and without thinking, on the same held-out positions.

Splits follow arXiv:2506.08007 §4.1: easy, medium and hard are nested, by the proxy's entropy. Every split is a uniform
sample of its positions. Every figure comes with its number of positions and its standard error.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.data.batches import TaskSource
from rpt_jax.data.documents import Document
from rpt_jax.data.positions import PositionTable, Windows, add_scores
from rpt_jax.evals.sampling import policies_of, sample
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.base import Reward, earn
from rpt_jax.rewards.prefix import first_token, prefix, prefix_match_reward
from rpt_jax.rollout.completions import completion_columns
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.scoring.entropy import Proxy
from rpt_jax.scoring.requests import AFTER_THOUGHT
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Earned, Evidence, TaskBatch


def difficulty_splits(
    table: PositionTable,
    documents: Sequence[Document],
    thresholds: tuple[float, float, float],
    limit: int,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return {split: position ids}, at most `limit` drawn uniformly from each split.

    Splits: all · settled (entropy at most the easy threshold) · easy ⊇ medium ⊇ hard · each label and label family
    of the documents ("determined/3" is also in "determined") · "hard determined", a family's share of hard. Draws
    follow one random order, so nested splits share positions.

    Args:
        table: held-out positions and their entropies.
        documents: that the table indexes.
        thresholds: entropies above which a position is easy, medium, hard, nats.
        limit: maximum positions of a split.
        seed: of the random order.
    """
    easy, medium, hard = (table.entropy > t for t in thresholds)
    masks = {"all": np.ones(len(table), bool), "settled": ~easy, "easy": easy, "medium": medium, "hard": hard}
    labels = [(number, d.labels) for number, d in enumerate(documents) if d.labels]
    rows = {(int(d), int(i)): row for row, (d, i) in enumerate(zip(table.document, table.index))} if labels else {}
    for number, document_labels in labels:
        for index, label in document_labels:
            row = rows.get((number, index))
            for name in {label, label.split("/")[0]} if row is not None else ():
                masks.setdefault(name, np.zeros(len(table), bool))[row] = True
    for family in sorted({name for name in masks if "/" not in name} - {"all", "settled", "easy", "medium", "hard"}):
        masks[f"hard {family}"] = masks[family] & hard
    order = np.random.default_rng(seed).permutation(len(table))
    plain = ("all", "settled", "easy", "medium", "hard")
    names = [*plain, *sorted(masks.keys() - set(plain), key=lambda name: (not name.startswith("hard "), name))]
    splits = {name: np.sort(order[masks[name][order]][:limit]) for name in names}
    return {name: ids for name, ids in splits.items() if len(ids)}


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates parameters on fixed positions of held-out documents.

    Attributes:
        config: of the run.
        mesh: that holds parameters and batches.
        tokenizer: of the policy.
        source: held-out tasks.
        splits: {split: position ids}, from `difficulty_splits`.
        reward: of the run; its extraction rules apply.
        progress: (name, batches) -> the same batches, shown as they are done.
        keep: called with the completions of each batch (`rollout.completions`) and their style; None: not called.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    source: TaskSource
    splits: dict[str, np.ndarray]
    reward: Reward
    progress: Callable[[str, Iterable], Iterable] = lambda _, batches: batches
    keep: Callable[[dict[str, list]], None] | None = None

    def evaluate(self, params, *, start=None, thinking: bool = True) -> dict:
        """Return figures per split: {split: {metric: {"value", "standard_error", "n"}}}.

        sampled_*: mean over k sampled rollouts at the rollout temperature. greedy_*: temperature 0. direct_*: argmax
        without thinking. pass@k, majority@k: over the sampled rollouts; majority_share: the share of them that the most
        frequent prediction has, which is a confidence. reasoned_logprob: log mean_i p(x_t | context,
        thought_i), and direct_logprob, nats. thought_tokens: mean completion length. no_prediction: share of rollouts
        without a closed box. forced_close: share of thoughts that were closed to score them. prefix, first: the two
        definitions of a correct token. reward, reward/*: the run's reward and its terms.

        Args:
            params: to evaluate.
            start: the policy that RL started from, for scoring passes that use it or the average, which evaluations do
                not have; None: `params`.
            thinking: False computes the direct figures only.
        """
        ids = np.unique(np.concatenate(list(self.splits.values())))
        columns = self._direct(params, ids)
        if thinking:
            columns |= self._thinking(policies_of(params, start), ids)
        return by_split(self.splits, ids, columns)

    def _direct(self, params, ids) -> dict[str, np.ndarray]:
        source, settings = self.source, self.config
        proxy = Proxy(
            config=settings.model,
            params=params,
            mesh=self.mesh,
            bos_id=self.tokenizer.bos_id,
            batch_trunks=settings.eval.batch_trunks,
            renormalize=settings.positions.renormalize,
        )
        windows = Windows(
            window=source.window,
            stride=source.stride,
            continuation_tokens=source.continuation_tokens,
            min_context_tokens=settings.positions.min_context_tokens,
        )
        table = add_scores(source.table.take(ids), source.documents, proxy, windows)
        targets = np.array([source.documents[d].tokens[i] for d, i in zip(table.document, table.index, strict=True)])
        predicted = table.direct_token
        batch = source.make([[int(i)] for i in ids], prompts_per_trunk=1, group_size=1)
        table_bytes, lengths = self.tokenizer.byte_table()
        known = predicted < self.tokenizer.vocab_size
        safe = np.where(known, predicted, self.tokenizer.eos_id)
        prefix = prefix_match_reward(
            table_bytes[safe], lengths[safe], batch.references.bytes[:, 0], batch.references.boundary_mask[:, 0]
        )
        return {
            "direct_prefix": np.asarray(prefix) * known,
            "direct_first": (predicted == targets).astype(np.float32),
            "direct_logprob": table.direct_logprob,
        }

    def _thinking(self, policies, ids) -> dict[str, np.ndarray]:
        settings, k = self.config, self.config.eval.num_samples
        U, M = settings.eval.batch_trunks, settings.rollout.prompts_per_trunk
        trunks = self.source.group(ids, M)
        columns: dict[str, np.ndarray] = {}
        for first in self.progress("evaluation", range(0, len(trunks), U)):
            group = [trunks[i] if i < len(trunks) else [] for i in range(first, first + U)]
            parts = {}
            for style, group_size, temperature in (("sampled", k, settings.rollout.temperature), ("greedy", 1, 0.0)):
                batch = self.source.make(group, prompts_per_trunk=M, group_size=group_size)
                parts |= self._rollout_figures(policies, batch, style, temperature)
            task_ids = batch.references.task_ids.reshape(-1)
            real = task_ids >= 0
            rows = np.searchsorted(ids, task_ids[real])
            for metric, values in parts.items():
                columns.setdefault(metric, np.zeros(len(ids), np.float32))[rows] = values.reshape(-1)[real]
        return columns

    def _rollout_figures(self, policies, batch: TaskBatch, style: str, temperature: float) -> dict[str, np.ndarray]:
        """Return figures [U, M] of one batch of rollouts."""
        U, M, G = batch.prompts.row_ids.shape
        tasks = shard_batch(self.mesh, batch)
        rollouts = sample(self.config, self.tokenizer, policies, tasks, temperature)
        evidence, earned, _ = earn(self.reward, policies, tasks, rollouts)
        if self.keep:
            predictions, columns_of = evidence.predictions, self.source.columns
            rows = completion_columns(tasks, rollouts, predictions, earned.rewards, self.tokenizer, columns_of)
            self.keep(rows | {"style": [style] * len(rows["reward"])})
        means, right, tokens_UR = to_host(_rewards(evidence, earned))
        predictions = to_host(evidence.predictions)
        found, lengths = (a.reshape(U, M, G) for a in (predictions.found, predictions.lengths))
        figures = {f"{style}_{name}": mean for name, mean in means.items()}
        figures |= {
            f"{style}_no_prediction": 1 - found.mean(-1),
            f"{style}_thought_tokens": tokens_UR.reshape(U, M, G).mean(-1),
        }
        if style == "sampled":
            texts = predictions.bytes.reshape(U, M, G, -1)
            figures["pass@k"] = right.max(-1)
            figures["majority@k"], figures["majority_share"] = _majority(texts, lengths, found, right)
            scores = self.reward.scorer.score(AFTER_THOUGHT, policies[CURRENT], tasks, rollouts, evidence.predictions)
            figures["reasoned_logprob"] = to_host(_log_mean(scores.values[..., 0], num_prompts=M))
            figures["forced_close"] = (predictions.think_end_tokens.reshape(U, M, G) == 0).mean(-1)
        return figures


@jax.jit
def _rewards(evidence: Evidence, earned: Earned):
    """Return ({figure: mean over a prompt's rollouts [U, M]}, prefix rewards [U, M, G], completion tokens [U, R])."""
    right = prefix(evidence).rewards
    rewards = {"prefix": right, "first": first_token(evidence).rewards, "reward": earned.rewards} | earned.metrics
    return {name: r.mean(-1) for name, r in rewards.items()}, right, evidence.rollouts.mask.sum(-1)


@partial(jax.jit, static_argnames="num_prompts")
def _log_mean(logprobs_UR, *, num_prompts: int):
    """Return log mean_i p(x_t | context, thought_i) of each prompt, f32 [U, M]."""
    U, R = logprobs_UR.shape
    G = R // num_prompts
    return jax.nn.logsumexp(logprobs_UR.reshape(U, num_prompts, G), axis=-1) - np.log(G)


def _majority(texts, lengths, found, correct):
    """Return (reward of the most frequent prediction, its share of the rollouts), f32 [U, M].

    The first seen wins a tie, none never wins.
    """
    U, M, G = found.shape
    result, share = np.zeros((2, U, M), np.float32)
    for u in range(U):
        for m in range(M):
            votes = [(texts[u, m, g, : lengths[u, m, g]].tobytes(), g) for g in range(G) if found[u, m, g]]
            if votes:
                winner, count = Counter(text for text, _ in votes).most_common(1)[0]
                share[u, m] = count / G
                result[u, m] = correct[u, m, next(g for text, g in votes if text == winner)]
    return result, share


def by_split(splits: dict[str, np.ndarray], ids: np.ndarray, columns: dict[str, np.ndarray]) -> dict:
    """Return {split: {metric: figures}} from columns with one value for each of the sorted `ids`."""
    return {
        name: {metric: mean_with_error(values[np.searchsorted(ids, members)]) for metric, values in columns.items()}
        for name, members in splits.items()
    }


def mean_with_error(values: np.ndarray) -> dict:
    """Return the mean over positions and its standard error (sample deviation / sqrt n; 0 for one position)."""
    n = len(values)
    error = values.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return {"value": float(values.mean()), "standard_error": float(error), "n": n}
