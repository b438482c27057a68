"""The two halves of an RL step: sample and reward completions, then update the parameters on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rpt_jax.config import Config
from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory, program_shapes
from rpt_jax.rewards.base import Reward, earn
from rpt_jax.rl.critic import score_values
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.packing import ROUNDINGS, Microbatch, pack, plan_update, unpack
from rpt_jax.rl.rows import policy_rows
from rpt_jax.rl.slopes import batch_slopes, corrected, needs_slopes
from rpt_jax.rl.surrogates import kl_term
from rpt_jax.rl.update import update
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import CURRENT, START
from rpt_jax.scoring.logprobs import score
from rpt_jax.scoring.requests import Request
from rpt_jax.sequences import completions
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Earned, Experience, Rollouts, Rows, TaskBatch, TrainState

# Of the rollouts' own tokens, under the distribution that sampled them.
_COMPLETION = Request(name="completion", policy=START, keep="nothing", target="completion", is_tempered=True)


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
    def roll_out(
        self,
        policies: dict[str, Any],
        step: int,
        tasks: TaskBatch,
        round_number: int,
        settle: Callable[[TaskBatch, Rollouts], tuple[TaskBatch, Rollouts, Any]] | None = None,
    ) -> Experience:
        """Sample G completions of each prompt with the current policy, extract their predictions and reward them.

        Args:
            policies: that the reward's requests may name.
            step: number of the step, which keys the noise of fresh rows.
            tasks: on the mesh.
            round_number: of dynamic sampling.
            settle: `Waiting.settle`, if rows may wait; None: all end.
        """
        born = step if tasks.prompts.born_step is None else tasks.prompts.born_step
        rollouts = generate(
            self.config.model,
            policies[CURRENT],
            tasks.prompts,
            rollout_key(self.config.run.seed, born, round_number),
            vocab_size=self.tokenizer.vocab_size,
            schedule=SCHEDULES[program_shapes(self.config)],
            **self.config.rollout.step_sampling,
        )
        sampled_mask = None
        if settle is not None:
            sampled_mask = tasks.prompts.prompt_mask
            tasks, rollouts, repeats_UMG = settle(tasks, rollouts)
        evidence, earned, tokens_scored = earn(self.reward, policies, tasks, rollouts)
        if settle is not None:
            earned = self._settled(tasks, rollouts, earned, repeats_UMG)
        group_mask = tasks.prompts.prompt_mask
        return Experience(
            tasks=tasks,
            rollouts=rollouts,
            predictions=evidence.predictions,
            earned=earned,
            group_mask=group_mask if earned.group_mask is None else group_mask & earned.group_mask,
            tokens_scored=tokens_scored,
            sampled_mask=sampled_mask,
        )

    def _settled(self, tasks: TaskBatch, rollouts: Rollouts, earned: Earned, repeats_UMG) -> Earned:
        """Let rows that repeat themselves pay; mask tokens of earlier steps, if the config says so."""
        settings, lengths = self.config.rollout, tasks.prompts.prefix_lengths
        if settings.repeat_window:
            earned = replace(
                earned,
                rewards=earned.rewards - settings.repeat_penalty * repeats_UMG,
                metrics=earned.metrics | {"repeat_fraction": repeats_UMG.astype(jnp.float32)},
            )
        if settings.earlier_tokens == "train" or lengths is None:
            return earned
        C = rollouts.mask.shape[-1]
        is_new = jnp.arange(C) >= lengths.reshape(rollouts.mask.shape[:2])[..., None]
        return replace(earned, token_mask=is_new if earned.token_mask is None else earned.token_mask & is_new)

    @needs_memory("an update", "--mesh.microbatch-trunks; the run resumes with it")
    def learn(self, state: TrainState, experience: Experience) -> tuple[TrainState, list[dict]]:
        """Take one update per minibatch; with a single minibatch the ratio is exactly 1."""
        loss, mesh = self.config.loss, self.config.mesh
        appended = None
        if self.reward.learned is not None:
            tasks, rollouts, predictions = experience.tasks, experience.rollouts, experience.predictions
            choices = experience.earned.choices
            appended = self.reward.scorer.append(self.reward.learned, tasks, rollouts, predictions, choices)
        penalties = self._penalties(experience)
        rows = policy_rows(
            experience, appended, penalties, self._values(state, experience), loss=loss,
            temperature=self.config.rollout.temperature, header_length=self.header_length,
        )  # fmt: skip
        plans, counts = plan_update(
            experience.tasks.prompts, rows, num_minibatches=loss.num_minibatches,
            microbatch_trunks=self.config.microbatch_trunks, num_shards=mesh.trunk_shards,
            keeps_all=loss.needs_all_rows, rounding=ROUNDINGS[program_shapes(self.config)],
        )  # fmt: skip
        if penalties is not None:
            counts["kl"] = _mean_over(penalties, experience.rollouts.mask) / loss.kl_coef
        every = [m for plan in plans for m in plan]
        if loss.needs_old:
            rows = replace(rows, old_logprobs=self._logprobs(self.policy(state), rows, every))
        if loss.has_kl_term or loss.objective == "dpo":
            rows = replace(rows, ref_logprobs=self._logprobs(self.start, rows, every))
        if loss.correction.mode != "none":
            rows = corrected(loss, rows)
        metrics = []
        for number, plan in enumerate(plans):
            own, shift = rows, 0.0
            if needs_slopes(loss):
                logprobs = self._logprobs(self.policy(state), rows, plan)
                own, shift = batch_slopes(loss, rows, logprobs, number, experience.earned.rewards)
            state, of_update = update(
                state,
                [pack(own, *shard_batch(self.mesh, (m.trunks, m.source))) for m in plan],
                loss_fn=objective_fn(self.config.model, loss),
                optimizer=self.optimizer,
                frozen=self.frozen,
            )
            metrics.append(of_update | counts | {"loss": of_update["loss"] + shift})
        return state, metrics

    def _logprobs(self, params, rows: Rows, microbatches: Sequence[Microbatch]):
        """Return the log-probabilities of the rows' tokens, f32 [U, R, T]; 0 for those of no microbatch."""
        total, temperature = jnp.zeros(rows.row.shape, jnp.float32), self.config.rollout.temperature
        for m in microbatches:
            places = shard_batch(self.mesh, (m.trunks, m.source))
            values = score(self.config.model, params, pack(rows, *places).sequences, temperature=temperature)
            total = unpack(total, values, *places)
        return total

    def _penalties(self, experience: Experience):
        """Return what the KL divergence costs each sampled token, f32 [U, R, C]; None: nothing."""
        loss = self.config.loss
        if not (loss.kl_coef and loss.kl_in == "reward"):
            return None
        # Without references, prompts that show theirs keep it: this is the divergence of what was sampled.
        tasks, rollouts = replace(experience.tasks, references=None), experience.rollouts
        scored = self.reward.scorer.score(_COMPLETION, self.start, tasks, rollouts, None)
        return loss.kl_coef * kl_term(loss.kl_estimator, rollouts.sampler_logprobs, scored.values)

    def _values(self, state: TrainState, experience: Experience):
        """Return the critic's value before each sampled token, f32 [U, R, C]; None: there is no critic."""
        if not self.config.loss.has_critic:
            return None
        rollouts, prompts = experience.rollouts, experience.tasks.prompts
        sequences = completions(prompts, rollouts.tokens, rollouts.mask)
        at_once = self.reward.scorer.at_once(prompts)
        return score_values(self.config.model, self.policy(state), sequences, trunks_at_once=at_once)


@jax.jit
def _mean_over(x_URC, mask_URC):
    return jnp.mean(x_URC, where=mask_URC)
