"""Reinforcement pre-training, on one page.

A step: take tasks, roll out, read the answers and reward them, turn rewards into advantages, update. The device is kept
busy: metrics of a step are read while the next one runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from rpt_jax.data.batches import TrainIterator
from rpt_jax.errors import CheckpointError, DataError, Interrupted, RewardError
from rpt_jax.parallel.distributed import from_main
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rollout.collect import collect
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.metrics import RunDirectory, progress_bar, read_records
from rpt_jax.train.records import StepRecorder
from rpt_jax.train.trainer import Trainer
from rpt_jax.types import TrainState


def train(
    trainer: Trainer,
    state: TrainState,
    tasks: TrainIterator,
    run: RunDirectory,
    checkpoints: Checkpoints,
    evaluate: Callable[[int, Any, float], None],
    *,
    stop_at_step: int | None = None,
) -> tuple[TrainState, float]:
    """Run RL from the newest checkpoint, or from `state`, to the last step.

    Args:
        evaluate: called with (step, the policy's parameters, FLOPs so far) before the first step, every
            eval.every_steps and at the end.
        stop_at_step: stop and save here as an interruption would; None runs to run.num_steps.
    Returns:
        (state, FLOPs of all rollouts and updates).
    Raises:
        CheckpointError: the run is past its last step already; too many updates in a row were skipped for non-finite
            numbers; a checkpoint could not be written.
        Interrupted, RewardError, DataError: told to stop, in a rollout or an evaluation; a reward function failed; no
            task is left. What was done is saved.
    """
    config, recorder = trainer.config, StepRecorder(trainer, run, trainer.policy(state))
    done = 0
    if checkpoints.latest_step is not None:
        state, record = checkpoints.restore(state)
        done = record["step"]
        tasks.set_state(record["tasks"])
        recorder.flops = record["flops"]
    if done > config.run.num_steps:
        raise CheckpointError(
            f"{run.path} has done {done} steps, and run.num_steps={config.run.num_steps}. Raise --run.num-steps, or go "
            f"back with --run.resume {config.run.num_steps}."
        )
    last_evaluation = {"stage": "evaluation", "step": config.run.num_steps}
    if done == config.run.num_steps and from_main(any(r | last_evaluation == r for r in read_records(run.path))):
        return state, recorder.flops
    run.cut_metrics("rpt", done)
    run.cut_metrics("evaluation", done - 1)
    last = min(config.run.num_steps, stop_at_step or config.run.num_steps)
    position = tasks.position

    def save() -> None:
        record = {"step": done, "tasks": tasks.get_state(), "flops": recorder.flush()}
        checkpoints.save(done, state, record)

    try:
        with progress_bar("RPT", config.run.num_steps) as progress:
            while done < last:
                if done % config.eval.every_steps == 0:
                    progress(done, "evaluating")
                    evaluate(done, trainer.policy(state), recorder.flush())
                dynamic = 0 <= config.loss.dynamic_sampling_from_step <= done
                experience, spent = collect(
                    lambda: shard_batch(trainer.mesh, next(tasks), num_trunks=tasks.num_trunks),
                    partial(trainer.roll_out, trainer.policy(state), done),
                    rounds=config.loss.dynamic_sampling_rounds if dynamic else 1,
                )
                for rollouts in spent:
                    tasks.observe(rollouts.tasks, rollouts.rewards)
                state, metrics = trainer.learn(state, experience)
                recorder.add(done, experience, spent, metrics, trunks_passed_over=tasks.position[1])
                done, position = done + 1, tasks.position
                progress(done, recorder.note)
                if recorder.num_skipped >= config.loss.max_skipped_updates:
                    raise CheckpointError(
                        f"{recorder.num_skipped} updates in a row had a non-finite loss or gradient; the last good "
                        f"checkpoint is step {checkpoints.latest_step}. Lower the learning rate in a new run."
                    )
                checkpoints.raise_failure()
                if done % config.checkpoint.every_steps == 0 or done == last:
                    save()
            if last == config.run.num_steps:
                progress(last, "evaluating")
                evaluate(last, trainer.policy(state), recorder.flush())
    except (Interrupted, RewardError, DataError):
        # A step is all or nothing: the next process draws the same tasks and the same rollouts again.
        tasks.position = position
        save()
        raise
    return state, recorder.flush()
