"""Accuracy on questions with answers: thinking (sampled and greedy) and, for multiple choice, direct.

Zero-shot evaluation (arXiv:2506.08007 Table 3) and the evaluation of RL on questions (Table 2). Every figure comes with
its number of questions and standard error.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config, RewardConfig
from rpt_jax.data.layouts import LETTERS
from rpt_jax.data.questions import Question, QuestionSource
from rpt_jax.evals.next_token import by_split
from rpt_jax.evals.sampling import policies_of, sample
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.base import Reward, earn, parse_terms
from rpt_jax.rewards.catalog import VERIFIERS
from rpt_jax.rewards.judges import named_letter
from rpt_jax.rollout.completions import completion_columns
from rpt_jax.scoring.logprobs import score
from rpt_jax.search.best_of_n import pass_at_k
from rpt_jax.sequences import shared_branches
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Earned, Rollouts, TaskBatch


def category_splits(questions: list[Question], limit: int, *, seed: int) -> dict[str, np.ndarray]:
    """Return {split: question numbers}, at most `limit` drawn uniformly: "all", and each of several categories."""
    order = np.random.default_rng(seed).permutation(len(questions))
    names = sorted({q.category for q in questions if q.category})
    splits = {"all": np.sort(order[:limit])}
    for name in names if len(names) > 1 else ():
        members = [i for i in order if questions[i].category == name]
        splits[name] = np.sort(members[:limit])
    return splits


def verification(
    config: RewardConfig, source: QuestionSource, make: Callable[[tuple[str, ...]], Reward]
) -> dict[str, Reward | str]:
    """Return the fields of `QuestionEvaluator` that tell right answers, whatever the reward is.

    Args:
        config: of the reward. If its first term is a verifier, that decides.
        source: the questions; without such a term, they are judged by choice if all have options, else by math.
        make: terms -> a reward for these questions.
    """
    first, *others = parse_terms(config.terms)
    if first.name not in VERIFIERS:
        return {"verifier": make(("choice" if all(q.choices for q in source.questions) else "math",))}
    return {"right_metric": f"reward/{first.name}"} if others or first.weight != 1 else {}


@dataclass(frozen=True, kw_only=True)
class QuestionEvaluator:
    """Evaluates parameters on fixed questions.

    Attributes:
        config: of the run.
        mesh: that holds parameters and batches.
        tokenizer: of the policy.
        source: the questions.
        splits: {split: question numbers}, from `category_splits`.
        reward: of the run.
        verifier: decides which answers are right, by a reward of 1; None: the run's reward does.
        right_metric: metric of the run's reward that decides instead, such as reward/math; empty: the reward itself.
        progress: (name, batches) -> the same batches, shown as they are done.
        keep: see `next_token.Evaluator`.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    source: QuestionSource
    splits: dict[str, np.ndarray]
    reward: Reward
    verifier: Reward | None = None
    right_metric: str = ""
    progress: Callable[[str, Iterable], Iterable] = lambda _, batches: batches
    keep: Callable[[dict[str, list]], None] | None = None

    def evaluate(self, params, *, start=None, thinking: bool = True) -> dict:
        """Return figures per split: {split: {metric: {"value", "standard_error", "n"}}}.

        sampled: share of right answers, mean over k samples at the rollout temperature. greedy: the same
        at temperature 0. pass@2, 4 .. k (unbiased), majority@k: over the samples. reward, thought_tokens, truncated,
        no_prediction: means. direct: share of multiple-choice questions whose correct letter has the highest
        likelihood without thinking; absent from a split with other questions.

        Args:
            params: to evaluate.
            start: the policy that RL started from (`next_token.Evaluator.evaluate`).
            thinking: False computes the direct figures only.
        """
        ids = np.unique(np.concatenate(list(self.splits.values())))
        columns = self._direct(params, ids)
        if thinking:
            columns |= self._thinking(policies_of(params, start), ids)
        results = by_split(self.splits, ids, columns)
        return {name: {m: f for m, f in cells.items() if not np.isnan(f["value"])} for name, cells in results.items()}

    def _batches(self, ids):
        """Yield batches of eval.batch_trunks question numbers, the last one padded with None."""
        size = self.config.eval.batch_trunks
        for first in range(0, len(ids), size):
            chosen = ids[first : first + size].tolist()
            yield slice(first, first + len(chosen)), chosen + [None] * (size - len(chosen))

    def _direct(self, params, ids) -> dict[str, np.ndarray]:
        """Return whether a correct letter is the most likely after "Answer:"; NaN for questions without options."""
        source = self.source
        num_options = max(len(source.questions[i].choices) for i in ids)
        if not num_options:
            return {}
        letters = [self.tokenizer.encode_continuation(f" {letter}") for letter in LETTERS[:num_options]]
        width, tail = max(map(len, letters)), source.direct_tail
        own = np.zeros((num_options, width), np.int32)
        for row, letter in enumerate(letters):
            own[row, : len(letter)] = letter
        own_mask = np.arange(width) < np.array([[len(letter)] for letter in letters])
        result = np.full(len(ids), np.nan, np.float32)
        for place, chosen in self._batches(ids):
            U = len(chosen)
            trunks = np.zeros((U, source.trunk_length), np.int32)
            cuts = np.ones(U, np.int32)
            for u, i in enumerate(chosen):
                if i is not None:
                    prompt = source.direct_prompts[i]
                    trunks[u, : len(prompt)], cuts[u] = prompt, len(prompt)
            sequences = shared_branches(trunks, cuts, tail, own, own_mask)
            logprobs = score(self.config.model, params, shard_batch(self.mesh, sequences), temperature=1.0)
            totals = np.where(own_mask, to_host(logprobs), 0.0).sum(-1)
            right = []
            for i, total in zip(chosen[: place.stop - place.start], totals):
                question = source.questions[i]
                options = total[: len(question.choices)]
                right.append(LETTERS[options.argmax()] in question.answers if len(options) else np.nan)
            result[place] = right
        return {"direct": result}

    def _thinking(self, policies, ids) -> dict[str, np.ndarray]:
        settings, k = self.config, self.config.eval.num_samples
        columns: dict[str, np.ndarray] = {}
        for place, chosen in self.progress("evaluation", self._batches(ids)):
            trunks = [[] if i is None else [i] for i in chosen]
            for style, group_size, temperature in (("sampled", k, settings.rollout.temperature), ("greedy", 1, 0.0)):
                batch = shard_batch(self.mesh, self.source.make(trunks, prompts_per_trunk=1, group_size=group_size))
                rollouts = sample(settings, self.tokenizer, policies, batch, temperature)
                evidence, earned, _ = earn(self.reward, policies, batch, rollouts)
                rewards, predictions = earned.rewards, evidence.predictions
                if self.keep:
                    columns_of = self.source.columns
                    rows = completion_columns(batch, rollouts, predictions, rewards, self.tokenizer, columns_of)
                    self.keep(rows | {"style": [style] * len(rows["reward"])})
                right = self._right(policies, batch, rollouts, earned)
                rollouts, rewards, right, predictions = to_host((rollouts, rewards, right, predictions))
                figures = self._figures(style, rollouts, rewards[:, 0], right[:, 0] == 1, predictions, chosen)
                for metric, values in figures.items():
                    columns.setdefault(metric, np.zeros(len(ids), np.float32))[place] = values
        return columns

    def _right(self, policies, batch: TaskBatch, rollouts: Rollouts, earned: Earned):
        """Return f32 [U, M, G], 1 for right answers: a reward of one's own, or shaped by length, does not tell."""
        if self.verifier is not None:
            return earn(self.verifier, policies, batch, rollouts)[1].rewards
        return earned.metrics[self.right_metric] if self.right_metric else earned.rewards

    def _figures(self, style: str, rollouts, rewards_UG, right_UG, predictions, chosen) -> dict[str, list[float]]:
        """Return figures per question of the batch, without padding."""
        num_real, k = sum(i is not None for i in chosen), rewards_UG.shape[1]
        right = right_UG[:num_real]
        figures = {style: right.mean(-1)}
        if style == "sampled":
            figures["reward"] = rewards_UG[:num_real].mean(-1)
            counts = right.sum(-1)
            for size in [2**i for i in range(1, k.bit_length()) if 2**i < k] + [k]:
                figures[f"pass@{size}"] = [pass_at_k(k, int(n), size) for n in counts]
            votes = self._votes(predictions, chosen[:num_real])
            figures[f"majority@{k}"] = [_majority(v, r) for v, r in zip(votes, right)]
            figures["thought_tokens"] = rollouts.mask.sum(-1)[:num_real].mean(-1)
            figures["truncated"] = rollouts.truncated[:num_real].mean(-1)
            figures["no_prediction"] = 1 - predictions.found[:num_real].mean(-1)
        return figures

    def _votes(self, predictions, chosen: list[int]) -> list[list[str | None]]:
        """Return the vote of each rollout: an option's letter, or the answer without outer space; None: no vote."""
        texts, lengths, found = predictions.bytes, predictions.lengths, predictions.found
        votes = []
        for u, number in enumerate(chosen):
            row, has_options = [], bool(self.source.questions[number].choices)
            for r in range(texts.shape[1]):
                text = texts[u, r, : lengths[u, r]].tobytes().decode(errors="replace").strip()
                vote = (named_letter(text) or text) if has_options else text
                row.append(vote if found[u, r] else None)
            votes.append(row)
        return votes


def _majority(votes: list[str | None], right: np.ndarray) -> float:
    """Return whether the most frequent answer is correct; the first seen wins a tie."""
    counted = Counter(v for v in votes if v is not None)
    return float(right[votes.index(counted.most_common(1)[0][0])]) if counted else 0.0
