"""Operators on partial thoughts, for many trees in batches of one shape: generate steps, evaluate, judge.

A partial thought is a row that goes on after given tokens (`rollout/continued.py`). Its own tokens are read again when
it is expanded, once for each child; `Spent` counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Config
from rpt_jax.data.batches import TaskSource
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import program_shapes
from rpt_jax.rewards.base import Reward, earn
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.scoring.scalars import ScalarModel, in_units, score_tokens
from rpt_jax.search.tree import Node
from rpt_jax.sequences import completions
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.types import Rollouts

# Training steps are below 2^30 and labels below 2^31 - 2^29, so a search never reuses their noise.
_FIRST_CALL = 2**30 + 2**29 + 2**28


@dataclass
class Spent:
    """What a search has spent, over all trees.

    Attributes:
        sampled: tokens drawn, those behind a step's end included.
        reread: tokens of partial thoughts that were read again to continue them.
        scored: tokens that a value model ran.
        nodes: steps made.
        calls: batches.
    """

    sampled: int = 0
    reread: int = 0
    scored: int = 0
    nodes: int = 0
    calls: int = 0


@dataclass(kw_only=True)
class Engine:
    """Expands and judges nodes of trees; a tree belongs to a task.

    Attributes:
        config: of a run; its rollout and reward settings apply.
        mesh: that holds the parameters.
        tokenizer: of the policy.
        policy: parameters that generate.
        source: of the tasks.
        rule: where steps end.
        verifier: a reward that is 1 for right completions; also reads the predictions.
        width: children of an expanded node.
        batch: nodes expanded in a call; fewer are padded, so that shapes stay the same.
        step_tokens: most tokens of a step.
        value_model: values nodes; None: `evaluate` is not available.
        spent: so far.
    """

    config: Config
    mesh: Any
    tokenizer: Tokenizer
    policy: Any
    source: TaskSource
    rule: StepRule
    verifier: Reward
    width: int
    batch: int
    step_tokens: int
    value_model: ScalarModel | None = None
    spent: Spent = field(default_factory=Spent)

    @property
    def limit(self) -> int:
        """Return the most tokens of a completion."""
        return self.config.rollout.max_completion_tokens

    def generate(
        self, tasks: Sequence[int], nodes: Sequence[Node], *, number: int | None = None, to_the_end: bool = False
    ) -> list[list[Node]]:
        """Sample next steps behind each node, and append them as its children.

        A child that ends the completion, or reaches its limit, is terminal. `note` holds the step's log-probability.

        Args:
            tasks: of the nodes.
            nodes: not terminal.
            number: of steps behind each node, up to `width`; None: `width`.
            to_the_end: a step is the whole rest of the completion.
        Returns:
            The children of each node.
        Raises:
            Interrupted: a stop signal arrived.
        """
        made: list[list[Node]] = []
        for first in range(0, len(nodes), self.batch):
            some = slice(first, first + self.batch)
            made += self._generate(tasks[some], nodes[some], self.width if number is None else number, to_the_end)
            check()
        return made

    def _generate(self, tasks: Sequence[int], nodes: Sequence[Node], number: int, to_the_end: bool) -> list[list[Node]]:
        given = [node.all_tokens() for node in nodes]
        batch = self._tasks(tasks, self.width)
        tokens = np.zeros((self.batch, 1, self.width, self.limit), np.int32)
        lengths = np.zeros((self.batch, 1, self.width), np.int32)
        for u, of in enumerate(given):
            tokens[u, :, :, : len(of)], lengths[u] = of, len(of)
        # Rows beyond `number` draw nothing; the shape stays the same.
        ended = np.broadcast_to(np.arange(self.width) >= number, lengths.shape)
        prompts = replace(batch.prompts, prefix_tokens=tokens, prefix_lengths=lengths, prefix_ended=ended)
        batch = shard_batch(self.mesh, replace(batch, prompts=prompts))
        rollout = self.config.rollout
        rollouts = to_host(
            generate(
                self.config.model, self.policy, batch.prompts,
                rollout_key(self.config.run.seed, _FIRST_CALL + self.spent.calls),
                vocab_size=self.tokenizer.vocab_size, schedule=SCHEDULES[program_shapes(self.config)],
                **rollout.sampling | {"new_tokens": 0 if to_the_end else self.step_tokens},
            )
        )  # fmt: skip
        self.spent.calls += 1
        return [
            self._children(node, rollouts, u, number, len(given[u]), to_the_end=to_the_end)
            for u, node in enumerate(nodes)
        ]

    def _children(
        self, node: Node, rollouts: Rollouts, u: int, number: int, num_given: int, *, to_the_end: bool
    ) -> list[Node]:
        children = []
        for g in range(number):
            own = rollouts.tokens[u, g][rollouts.mask[u, g]].tolist()
            logprobs, step = rollouts.sampler_logprobs[u, g], own[num_given:]
            self.spent.sampled += len(step)
            self.spent.reread += num_given
            if not to_the_end and step:
                step = step[: self.rule.ends(step)[0] + 1]
            has_stopped = bool(step) and step[-1] in self.config.rollout.stop_ids
            total = num_given + len(step)
            note = {"logprob": float(logprobs[num_given:total].sum())}
            is_terminal = has_stopped or total >= self.limit
            children.append(node.add(Node(tokens=step, is_terminal=is_terminal, note=note)))
        self.spent.nodes += len(children)
        return children

    def evaluate(self, tasks: Sequence[int], groups: Sequence[Sequence[Node]]) -> None:
        """Set the value of nodes by the value model: the score behind their last token.

        Args:
            tasks: of each group.
            groups: up to `width` nodes each.
        """
        model = self.value_model
        for first in range(0, len(groups), self.batch):
            some = groups[first : first + self.batch]
            batch = self._tasks(tasks[first : first + self.batch], self.width)
            tokens = np.zeros((self.batch, self.width, self.limit), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for u, nodes in enumerate(some):
                for r, node in enumerate(nodes):
                    own = node.all_tokens()
                    tokens[u, r, : len(own)], mask[u, r, : len(own)] = own, True
            sequences = shard_batch(self.mesh, completions(batch.prompts, jnp.asarray(tokens), jnp.asarray(mask)))
            scores = to_host(score_tokens(model.config, model.params, sequences))
            for u, nodes in enumerate(some):
                for r, node in enumerate(nodes):
                    size = int(mask[u, r].sum())
                    node.value = float(in_units(model.objective, scores[u, r, max(0, size - 1)]))
                    self.spent.scored += size

    def judge(self, tasks: Sequence[int], leaves: Sequence[Node]) -> None:
        """Note each leaf's prediction (None: no closed box), and for accuracies whether it is right."""
        for first in range(0, len(leaves), self.batch):
            some = leaves[first : first + self.batch]
            batch = self._tasks(tasks[first : first + self.batch], 1)
            tokens, mask = np.zeros((self.batch, 1, self.limit), np.int32), np.zeros((self.batch, 1, self.limit), bool)
            for u, leaf in enumerate(some):
                own = leaf.all_tokens()
                tokens[u, 0, : len(own)], mask[u, 0, : len(own)] = own, True
            nothing = np.zeros((self.batch, 1), np.int32)
            rollouts = Rollouts(
                tokens=tokens, mask=mask, sampler_logprobs=np.zeros(tokens.shape, np.float32),
                truncated=np.zeros((self.batch, 1), bool), num_rejected=nothing,
            )  # fmt: skip
            batch, rollouts = shard_batch(self.mesh, (batch, rollouts))
            evidence, earned, _ = earn(self.verifier, {CURRENT: self.policy}, batch, rollouts)
            predictions, rewards = to_host((evidence.predictions, earned.rewards))
            for u, leaf in enumerate(some):
                text = predictions.bytes[u, 0, : predictions.lengths[u, 0]].tobytes()
                leaf.note["prediction"] = text if predictions.found[u, 0] else None
                leaf.note["right"] = bool(rewards[u, 0, 0] == 1.0)

    def _tasks(self, tasks: Sequence[int], group_size: int):
        """Return a padded batch of one prompt per trunk; rows of one task in one batch have different noise."""
        trunks = [[int(task)] for task in tasks] + [[]] * (self.batch - len(tasks))
        made = self.source.make(trunks, prompts_per_trunk=1, group_size=group_size)
        rows = np.arange(self.batch * group_size, dtype=np.int32).reshape(self.batch, 1, group_size)
        return replace(made, prompts=replace(made.prompts, row_ids=rows))
