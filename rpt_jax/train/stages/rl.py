"""Reinforcement pre-training: take tasks, roll out, reward, turn rewards into advantages, update."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import RolloutConfig
from rpt_jax.data.batches import TrainIterator
from rpt_jax.errors import ConfigError
from rpt_jax.models.lora import join
from rpt_jax.parallel.mesh import local_trunks, shard_batch
from rpt_jax.rewards.catalog import requested_policies
from rpt_jax.rl.deviation_filter import DeviationFilter
from rpt_jax.rl.dynamic_sampling import collect
from rpt_jax.rl.slopes import num_scorings
from rpt_jax.rl.trainer import Trainer
from rpt_jax.rl.waiting import Waiting
from rpt_jax.rollout.completions import completion_columns
from rpt_jax.scoring.companions import START, follow
from rpt_jax.train.ahead import compile_ahead
from rpt_jax.train.diagnosis import Diagnosis, diagnose_tasks
from rpt_jax.train.domains import Tasks
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.loop import fit
from rpt_jax.train.policies import fresh_state, stage_optimizer
from rpt_jax.train.recorder import experience_metrics, step_record, to_floats
from rpt_jax.train.run import Run
from rpt_jax.train.run_directory import RunDirectory
from rpt_jax.train.training import Outcome, Until
from rpt_jax.types import Experience, TrainState
from rpt_jax.work import count_tokens, num_parameters, step_flops

NAME = "rpt"


@dataclass(kw_only=True)
class ReinforcementLearning:
    """The steps of RL; a `training.Training`.

    Attributes:
        trainer: samples, rewards and updates.
        tasks: batches to train on.
        directory: where sampled completions are written.
        deviation_filter: leaves groups out of updates; None: none.
        waiting: trunks whose rollouts have not ended; None: every rollout ends in its step.
        name, also_records, log_every_steps: see `training.Training`.
    """

    trainer: Trainer
    tasks: TrainIterator
    directory: RunDirectory
    deviation_filter: DeviationFilter | None = None
    waiting: Waiting | None = None
    name: str = NAME
    also_records: tuple[str, ...] = ("evaluation",)
    log_every_steps: int = 1

    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Collect one rollout batch, over several rounds if sampling is dynamic, and update on it."""
        trainer, tasks, settings = self.trainer, self.tasks, self.trainer.config.rollout
        policies = trainer.policies(state)
        is_dynamic = 0 <= settings.dynamic_sampling_from_step <= number
        next_tasks, settle = tasks.__next__, None
        if self.waiting is not None:
            next_tasks, settle = partial(self.waiting.next_batch, tasks, number), self.waiting.settle
        experience, spent = collect(
            lambda: shard_batch(trainer.mesh, next_tasks(), num_trunks=tasks.num_trunks),
            partial(trainer.roll_out, policies, number, settle=settle),
            rounds=settings.dynamic_sampling_rounds if is_dynamic else 1,
        )
        for rollouts in spent:
            tasks.observe(rollouts.tasks.references, rollouts.earned.rewards)
        if self.deviation_filter:
            experience = self.deviation_filter.apply(experience)
        state, updates = trainer.learn(state, experience)
        state = follow(state, trainer.config.companion)
        num_params = num_parameters(trainer.policy(state))
        return state, self._outcome(number, experience, spent, updates, num_params)

    def _outcome(self, number: int, experience: Experience, spent: list, updates: list, num_params: int) -> Outcome:
        config, passed_over = self.trainer.config, self.tasks.position[1]
        metrics, counts = [experience_metrics(e) for e in spent], [count_tokens(e) for e in spent]
        masked = _masked_fraction(experience)
        num_waiting = None if self.waiting is None else len(self.waiting.trunks)
        every = config.run.completions_every_steps
        if every and number % every == 0:
            columns = completion_columns(
                experience.tasks, experience.rollouts, experience.predictions, experience.earned.rewards,
                self.trainer.tokenizer, self.trainer.columns,
            )  # fmt: skip
            self.directory.write_completions("step", number + 1, columns)

        def flops() -> float:
            return step_flops(
                num_params, [to_floats(c) for c in counts], float(updates[0]["tokens_updated"]),
                has_adapters=self.trainer.frozen is not None,
                num_scorings=num_scorings(config.loss),
            )  # fmt: skip

        def record() -> dict:
            floats = [list(map(to_floats, which)) for which in (metrics, counts, updates)]
            waiting = {} if num_waiting is None else {"trunks_waiting": num_waiting}
            return step_record(*floats, float(masked)) | {"trunks_passed_over": passed_over} | waiting

        return Outcome(flops=flops, record=record)

    def get_cursor(self) -> dict:
        """Return the state of the task iterator and of the filter."""
        cursor = self.tasks.get_state()
        if self.deviation_filter:
            cursor["deviations"] = self.deviation_filter.get_state()
        if self.waiting is not None:
            cursor["waiting"] = self.waiting.get_state()
        return cursor

    def set_cursor(self, cursor: dict) -> None:
        """Set the state of the task iterator and of the filter."""
        # A run that begins as a copy of one without the filter has none of its state.
        if self.deviation_filter and "deviations" in cursor:
            self.deviation_filter.set_state(cursor["deviations"])
        if self.waiting is not None and "waiting" in cursor:
            self.waiting.set_state(cursor["waiting"])
        own = ("deviations", "waiting")
        self.tasks.set_state({name: value for name, value in cursor.items() if name not in own})


@jax.jit
def _masked_fraction(experience: Experience):
    """Return the share of prompts that take no part in the update."""
    return 1 - jnp.sum(experience.group_mask) / jnp.maximum(1, jnp.sum(experience.tasks.prompts.prompt_mask))


def make_waiting(settings: RolloutConfig) -> Waiting:
    """Return what lets rollouts wait; nothing waits yet.

    Raises:
        ConfigError: there are several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"rollout.new_tokens_per_step={settings.new_tokens_per_step} on {jax.process_count()} processes; rollouts "
            "wait on the host of one. Set --rollout.new-tokens-per-step 0, or run one process."
        )
    return Waiting(
        new_tokens=settings.new_tokens_per_step,
        limit=settings.max_completion_tokens,
        stop_ids=settings.stop_ids,
        repeat_window=settings.repeat_window,
    )


def make_trainer(run: Run, params, tasks: Tasks) -> tuple[Trainer, TrainState]:
    """Return RL's trainer and its state at step 0."""
    config = run.config
    state, frozen = fresh_state(config, run.mesh, params, NAME)
    trainer = Trainer(
        config=config,
        mesh=run.mesh,
        tokenizer=run.tokenizer,
        header_length=len(run.template.header),
        reward=run.make_reward(tasks.source),
        optimizer=stage_optimizer(config, NAME),
        columns=tasks.source.columns,
        frozen=frozen,
        # With adapters, these are their base weights, not a copy: the policy with its adapters switched off.
        start=params if config.loss.has_reference or START in requested_policies(config.reward) else None,
    )
    return trainer, state


def run_rl(run: Run, params, tasks: Tasks, evaluations: Evaluations, *, stop_at_step: int | None = None) -> float:
    """Run reinforcement learning from `params`. The result is in the run's checkpoints.

    Args:
        run: the run.
        params: of the policy to start from.
        tasks: to train on.
        evaluations: of the run.
        stop_at_step: save and stop here, as an interruption would.
    Returns:
        FLOPs spent.
    """
    config = run.config
    iterator = TrainIterator(
        tasks.source,
        tasks.ids,
        num_trunks=config.rollout.num_trunks,
        prompts_per_trunk=config.rollout.prompts_per_trunk,
        group_size=config.rollout.group_size,
        seed=config.run.seed,
        corpora=tasks.corpora,
        weights=tasks.weights,
        band=tasks.band,
        rows=local_trunks(run.mesh, config.rollout.num_trunks),
    )
    diagnosis = Diagnosis(config)
    diagnosis.of_tasks(diagnose_tasks(tasks, config, len(run.warm_examples)))
    trainer, state = make_trainer(run, params, tasks)
    compile_ahead(trainer, state, run.template.width, run.learned_width)
    training = ReinforcementLearning(trainer=trainer, tasks=iterator, directory=run.directory)
    if config.reward.deviation_filter:
        training.deviation_filter = DeviationFilter(config.reward.deviation_filter)
    if config.rollout.new_tokens_per_step:
        training.waiting = make_waiting(config.rollout)

    def at_boundary(step, state, flops):
        figures = evaluations.at_step(step, join(trainer.frozen, state.params), flops)
        if step == 0 and figures:
            diagnosis.of_evaluation(figures)

    with run.checkpoints(NAME) as checkpoints:
        _, flops = fit(
            training,
            state,
            run.directory,
            checkpoints,
            Until(steps=config.run.num_steps),
            save_every_steps=config.checkpoint.every_steps,
            max_skipped_updates=config.run.max_skipped_updates,
            at_boundary=at_boundary,
            watch=diagnosis.add,
            stop_at_step=stop_at_step,
        )
    return flops
