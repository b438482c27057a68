"""Ask a policy to go on from the ends of steps, and judge where it gets to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import program_shapes
from rpt_jax.reward_models.labels import Question
from rpt_jax.rewards.base import Reward, earn
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train.domains import Source
from rpt_jax.train.run import Run

# Training steps are below 2^30, so labels never reuse their noise.
_STEP = 2**30 + 2**29


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A completion to label.

    Attributes:
        task: number of its task in the source.
        tokens: ids of the completion, the stop token included.
        ends: indices of the tokens at which its steps end.
        is_right: judged as a whole.
    """

    task: int
    tokens: list[int]
    ends: list[int]
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """Samples continuations of solutions; the same ones however questions are batched.

    Attributes:
        run: whose settings of rollouts apply.
        policy: parameters that continue.
        source: of the tasks.
        verifier: a reward that is 1 for right completions.
        num_samples: n, continuations of a question.
        batch: questions of a call; fewer are padded.
    """

    run: Run
    policy: Any
    source: Source
    verifier: Reward
    num_samples: int
    batch: int

    @cached_property
    def _most_steps(self) -> int:
        return self.run.config.rollout.max_completion_tokens + 1

    def answer(self, solutions: Sequence[Solution]) -> Callable[[Sequence[Question]], list[int]]:
        """Return questions -> number of right continuations of each, for `Answers.ask`.

        Raises:
            Interrupted: a stop signal arrived.
        """

        def ask(questions: Sequence[Question]) -> list[int]:
            right: list[int] = []
            for first in range(0, len(questions), self.batch):
                right += self._of_batch(solutions, questions[first : first + self.batch])
                check()
            return right

        return ask

    def _of_batch(self, solutions: Sequence[Solution], questions: Sequence[Question]) -> list[int]:
        config, n, limit = self.run.config, self.num_samples, self.run.config.rollout.max_completion_tokens
        padding = self.batch - len(questions)
        trunks = [[solutions[i].task] for i, _ in questions] + [[]] * padding
        tasks = self.source.make(trunks, prompts_per_trunk=1, group_size=n)
        tokens, lengths = np.zeros((self.batch, 1, n, limit), np.int32), np.zeros((self.batch, 1, n), np.int32)
        # Noise is keyed by solution and step, so that batches do not matter; solutions of one task differ.
        rows = np.zeros((self.batch, 1, n), np.int32)
        for u, (i, k) in enumerate(questions):
            given = solutions[i].tokens[: solutions[i].ends[k - 1] + 1] if k else []
            tokens[u, :, :, : len(given)], lengths[u] = given, len(given)
            rows[u] = ((i * self._most_steps + k) * n + np.arange(n)) % 2**31
        prompts = replace(tasks.prompts, row_ids=rows, prefix_tokens=tokens, prefix_lengths=lengths)
        tasks = shard_batch(self.run.mesh, replace(tasks, prompts=prompts))
        rollouts = generate(
            config.model, self.policy, tasks.prompts, rollout_key(config.run.seed, _STEP),
            vocab_size=self.run.tokenizer.vocab_size, schedule=SCHEDULES[program_shapes(config)],
            **config.rollout.sampling,
        )  # fmt: skip
        _, earned, _ = earn(self.verifier, {CURRENT: self.policy}, tasks, rollouts)
        right = to_host(earned.rewards)[:, 0] == 1.0
        return right.sum(-1)[: len(questions)].tolist()


def solutions_of(rows: Sequence[dict], rule: StepRule) -> list[Solution]:
    """Return sampled rows (`rollout.completions`, with "right") as solutions."""
    return [
        Solution(
            task=row["position_id"], tokens=row["completion_tokens"], ends=rule.ends(row["completion_tokens"]),
            is_right=bool(row["right"]),
        )
        for row in rows
    ]  # fmt: skip
