"""The two halves of a step: completions with rewards from parameters, new parameters from completions with rewards."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.reward import Reward
from rpt_jax.rl.packing import Microbatch, pack, plan_update
from rpt_jax.rl.scoring import direct_logprobs, score
from rpt_jax.rl.update import policy_batch, policy_loss_fn, update
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Experience, TaskBatch, TrainBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a step needs beside the state.

    Attributes:
        columns: what is known of a task, by its id (`batches.Source.columns`).
        frozen: what the trained adapters sit on; None: the state holds the whole policy.
        reference: the policy that RL started from; None without a KL term.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    header_length: int
    reward: Reward
    optimizer: Any
    columns: Callable[[int], dict]
    frozen: Frozen | None = None
    reference: Any = None

    def policy(self, state: TrainState) -> Any:
        """The parameters that sample and are judged."""
        return join(self.frozen, state.params)

    def roll_out(self, params, step: int, tasks: TaskBatch, round_number: int) -> Experience:
        """Sample G completions for each prompt, read their predictions and reward them."""
        rollouts = generate(
            self.config.model,
            params,
            tasks,
            rollout_key(self.config.run.seed, step, round_number),
            eos_id=self.tokenizer.eos_id,
            vocab_size=self.tokenizer.vocab_size,
            **self.config.rollout.sampling,
        )
        direct = partial(direct_logprobs, header_length=self.header_length, bos_id=self.tokenizer.bos_id)
        passes = {"direct_logprobs": direct}
        requested = {name: passes[name](self.config.model, params, tasks) for name in self.reward.requests}
        rewards, predictions, faults = self.reward.fn(rollouts, tasks, requested)
        return Experience(
            tasks=tasks,
            rollouts=rollouts,
            rewards=rewards,
            predictions=predictions,
            faults=faults,
            group_mask=tasks.position_mask,
        )

    def learn(self, state: TrainState, experience: Experience) -> tuple[TrainState, list[dict]]:
        """One update per minibatch; with a single minibatch the ratio is exactly 1."""
        loss = self.config.loss
        batch = policy_batch(experience, loss=loss, header_length=self.header_length)
        plans, counts = plan_update(experience, batch, loss, self.config.mesh.trunk_shards)
        # Old log-probabilities are those before the first of several updates.
        old = self.policy(state) if loss.num_minibatches > 1 else None
        loss_fn = policy_loss_fn(self.config.model, loss, self.config.rollout.temperature)
        minibatches = [[self._microbatch(batch, m, old) for m in plan] for plan in plans]
        metrics = []
        for microbatches in minibatches:
            state, of_update = update(
                state, microbatches, loss_fn=loss_fn, optimizer=self.optimizer, frozen=self.frozen
            )
            metrics.append(of_update | counts)
        return state, metrics

    def _microbatch(self, batch: TrainBatch, plan: Microbatch, old_policy) -> TrainBatch:
        packed = pack(batch, *shard_batch(self.mesh, (plan.trunks, plan.source)))
        temperature = self.config.rollout.temperature

        def logprobs(params):
            return (
                None if params is None else score(self.config.model, params, packed.sequences, temperature=temperature)
            )

        return replace(packed, ref_logprobs=logprobs(self.reference), old_logprobs=logprobs(old_policy))
