"""Reinforcement pre-training, on one page.

A step: take tasks -> roll out -> read the answers and reward them -> advantages -> update. The device is kept busy:
metrics of a step are read while the next one runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from rpt_jax.config import Config
from rpt_jax.data.pipeline import TrainIterator
from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.reward import Reward
from rpt_jax.rl.scoring import direct_logprobs, score
from rpt_jax.rl.update import policy_batch, policy_loss, split_minibatches, update
from rpt_jax.rollout.collect import collect
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.metrics import RunDirectory, progress_bar
from rpt_jax.train.records import StepRecorder
from rpt_jax.types import Experience, TaskBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a step needs beside the state. `reference` is the policy that RPT started from; None without a KL term."""

    config: Config
    mesh: Any
    tokenizer: Tokenizer
    header_length: int
    reward: Reward
    optimizer: Any
    reference: Any = None

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
        passes = {"direct_logprobs": partial(direct_logprobs, header_length=self.header_length, bos_id=self.tokenizer.bos_id)}
        requested = {name: passes[name](self.config.model, params, tasks) for name in self.reward.requests}
        rewards, predictions = self.reward.fn(rollouts, tasks, requested)
        return Experience(
            tasks=tasks, rollouts=rollouts, rewards=rewards, predictions=predictions, group_mask=tasks.position_mask
        )

    def learn(self, state: TrainState, experience: Experience) -> tuple[TrainState, list[dict]]:
        """One update per minibatch; with a single minibatch the ratio is exactly 1."""
        loss, temperature = self.config.loss, self.config.rollout.training_temperature
        batch = policy_batch(experience, loss=loss, header_length=self.header_length)
        score_fn = partial(score, num_completion=batch.completion_mask.shape[-1], temperature=temperature)
        if self.reference is not None:
            batch = replace(batch, ref_logprobs=score_fn(self.config.model, self.reference, batch.sequences))
        if loss.num_minibatches > 1:
            batch = replace(batch, old_logprobs=score_fn(self.config.model, state.params, batch.sequences))
        metrics = []
        for minibatch in split_minibatches(batch, loss.num_minibatches):
            size = minibatch.advantages.shape[0]
            state, step_metrics = update(
                state,
                minibatch,
                loss_fn=self.loss_fn,
                optimizer=self.optimizer,
                num_microbatches=size // (loss.microbatch_trunks or size),
            )
            metrics.append(step_metrics)
        return state, metrics

    @cached_property
    def loss_fn(self):
        """(params, batch) -> loss; one object, so that the update compiles once."""
        return partial(policy_loss, self.config.model, self.config.loss, self.config.rollout.training_temperature)


def train(
    trainer: Trainer,
    state: TrainState,
    tasks: TrainIterator,
    run: RunDirectory,
    checkpoints: Checkpoints,
    evaluate: Callable[[int, TrainState, float], None],
    *,
    stop_at_step: int | None = None,
) -> tuple[TrainState, float]:
    """Run RPT from the newest checkpoint, or from `state`, to the last step.

    Args:
        evaluate: called with (step, state, FLOPs so far) before the first step, every eval.every_steps and at the end.
        stop_at_step: stop and save here as an interruption would; None runs to run.num_steps.
    Returns:
        (state, FLOPs of all rollouts and updates).
    Raises:
        CheckpointError: too many updates in a row were skipped for non-finite numbers.
    """
    config, first, recorder = trainer.config, 0, StepRecorder(trainer.config, trainer.tokenizer, run, state.params)
    if checkpoints.latest_step is not None:
        state, record = checkpoints.restore(state)
        first = record["step"]
        tasks.set_state(record["tasks"])
        recorder.flops = record["flops"]
    run.cut_metrics("rpt", first)
    run.cut_metrics("evaluation", first - 1)
    last = min(config.run.num_steps, stop_at_step or config.run.num_steps)
    with progress_bar("RPT", config.run.num_steps) as progress:
        for step in range(first, last):
            if step % config.eval.every_steps == 0:
                evaluate(step, state, recorder.flush())
            dynamic = 0 <= config.loss.dynamic_sampling_from_step <= step
            experience, spent = collect(
                lambda: shard_batch(trainer.mesh, next(tasks)),
                partial(trainer.roll_out, state.params, step),
                rounds=config.loss.dynamic_sampling_rounds if dynamic else 1,
            )
            state, metrics = trainer.learn(state, experience)
            recorder.add(step, experience, spent, metrics)
            progress(step + 1, recorder.note)
            if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == last:
                flops = recorder.flush()
                if recorder.num_skipped > config.loss.max_skipped_updates:
                    raise CheckpointError(
                        f"{recorder.num_skipped} updates in a row had a non-finite loss or gradient; the last good "
                        f"checkpoint is step {checkpoints.latest_step}. Lower the learning rate and resume."
                    )
                checkpoints.save(step + 1, state, {"step": step + 1, "tasks": tasks.get_state(), "flops": flops})
        if last == config.run.num_steps:
            evaluate(last, state, recorder.flush())
    return state, recorder.flush()
