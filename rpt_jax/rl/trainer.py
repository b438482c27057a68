"""The two halves of an RL step: sample and reward completions, then update the parameters on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory, program_shapes
from rpt_jax.rewards.base import Reward, earn
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.packing import ROUNDINGS, Microbatch, pack, plan_update
from rpt_jax.rl.rows import policy_rows
from rpt_jax.rl.update import update
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import CURRENT, START
from rpt_jax.scoring.logprobs import score
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Experience, Rows, TaskBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that an RL step needs besides the state.

    Attributes:
        config: of the run.
        mesh: that holds parameters and batches.
        tokenizer: of the policy.
        header_length: trunk tokens before the document.
        reward: of the run.
        optimizer: of the RL stage.
        columns: task id -> what is known of the task (`batches.Source.columns`).
        frozen: base weights of trained adapters; None: the state holds the whole policy.
        start: the policy that RL started from, for a KL term and for requests; None if neither needs it.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    header_length: int
    reward: Reward
    optimizer: Any
    columns: Callable[[int], dict]
    frozen: Frozen | None = None
    start: Any = None

    def policy(self, state: TrainState) -> Any:
        """Return the policy's parameters, adapters included."""
        return join(self.frozen, state.params)

    def policies(self, state: TrainState) -> dict[str, Any]:
        """Return the parameters of the policies that requests may name."""
        companions = {name: join(self.frozen, tree) for name, tree in state.companions.items()}
        return {CURRENT: self.policy(state), START: self.start} | companions

    @needs_memory("a rollout", "--rollout.slots-per-trunk or --mesh.microbatch-trunks; the run resumes with them")
    def roll_out(self, policies: dict[str, Any], step: int, tasks: TaskBatch, round_number: int) -> Experience:
        """Sample G completions of each prompt with the current policy, extract their predictions and reward them."""
        born = step if tasks.prompts.born_step is None else tasks.prompts.born_step
        rollouts = generate(
            self.config.model,
            policies[CURRENT],
            tasks.prompts,
            rollout_key(self.config.run.seed, born, round_number),
            vocab_size=self.tokenizer.vocab_size,
            schedule=SCHEDULES[program_shapes(self.config)],
            **self.config.rollout.sampling,
        )
        evidence, earned, tokens_scored = earn(self.reward, policies, tasks, rollouts)
        group_mask = tasks.prompts.prompt_mask
        return Experience(
            tasks=tasks,
            rollouts=rollouts,
            predictions=evidence.predictions,
            earned=earned,
            group_mask=group_mask if earned.group_mask is None else group_mask & earned.group_mask,
            tokens_scored=tokens_scored,
        )

    @needs_memory("an update", "--mesh.microbatch-trunks; the run resumes with it")
    def learn(self, state: TrainState, experience: Experience) -> tuple[TrainState, list[dict]]:
        """Take one update per minibatch; with a single minibatch the ratio is exactly 1."""
        loss, mesh = self.config.loss, self.config.mesh
        appended = None
        if self.reward.learned is not None:
            tasks, rollouts, predictions = experience.tasks, experience.rollouts, experience.predictions
            choices = experience.earned.choices
            appended = self.reward.scorer.append(self.reward.learned, tasks, rollouts, predictions, choices)
        rows = policy_rows(
            experience, appended, loss=loss, temperature=self.config.rollout.temperature,
            header_length=self.header_length,
        )  # fmt: skip
        plans, counts = plan_update(
            experience.tasks.prompts, rows, num_minibatches=loss.num_minibatches,
            microbatch_trunks=self.config.microbatch_trunks, num_shards=mesh.trunk_shards, has_kl=loss.kl_coef > 0,
            rounding=ROUNDINGS[program_shapes(self.config)],
        )  # fmt: skip
        # Old log-probabilities are those before the first of several updates.
        old = self.policy(state) if loss.num_minibatches > 1 else None
        minibatches = [[self._microbatch(rows, m, old) for m in plan] for plan in plans]
        metrics = []
        for microbatches in minibatches:
            state, of_update = update(
                state,
                microbatches,
                loss_fn=objective_fn(self.config.model, loss),
                optimizer=self.optimizer,
                frozen=self.frozen,
            )
            metrics.append(of_update | counts)
        return state, metrics

    def _microbatch(self, rows: Rows, plan: Microbatch, old_policy) -> Rows:
        packed = pack(rows, *shard_batch(self.mesh, (plan.trunks, plan.source)))
        reference = self.start if self.config.loss.kl_coef else None

        def logprobs(params):
            if params is None:
                return None
            return score(self.config.model, params, packed.sequences, temperature=self.config.rollout.temperature)

        return replace(packed, ref_logprobs=logprobs(reference), old_logprobs=logprobs(old_policy))
