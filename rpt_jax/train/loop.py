"""The training loop: RL, supervised training and the control all run through `fit`.

`fit` handles saving, resuming, skipped updates, interruption, progress and metrics. Each stage in `stages/` defines its
step: reinforcement pre-training takes tasks, rolls out, rewards and updates (`stages/rl.py`).
"""

from collections.abc import Callable

from rpt_jax.errors import CheckpointError, DataError, Interrupted, RewardError
from rpt_jax.parallel.interruption import check
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.progress import console, progress_bar
from rpt_jax.train.recorder import Recorder
from rpt_jax.train.run_directory import RunDirectory
from rpt_jax.train.training import Training, Until
from rpt_jax.types import TrainState


def fit(
    training: Training,
    state: TrainState,
    run: RunDirectory | None,
    checkpoints: Checkpoints | None,
    until: Until,
    *,
    save_every_steps: int,
    max_skipped_updates: int,
    at_boundary: Callable[[int, TrainState, Callable[[], float]], None] = lambda *_: None,
    watch: Callable[[dict], None] = lambda _: None,
    stop_at_step: int | None = None,
) -> tuple[TrainState, float]:
    """Train until the end, from the newest checkpoint or, without one, from `state`.

    A step is all or nothing: if a process ends during one, the next process draws the same tasks and noise again.

    Args:
        training: the kind of training.
        state: at step 0; also gives the shapes and shardings to restore.
        run: where to log; None: nowhere.
        checkpoints: where to save and resume; None: nowhere.
        until: when training ends.
        save_every_steps: interval of saves, in addition to the last step.
        max_skipped_updates: consecutive skipped updates that stop the run.
        at_boundary: called before each step and at the end with (steps done, state, function that returns the FLOPs so
            far).
        watch: called with the record of each step, one step late; it may raise DataError.
        stop_at_step: save and stop here, as an interruption would.
    Returns:
        (state, FLOPs spent).
    Raises:
        CheckpointError: the run is past its end, too many consecutive updates were skipped, or a save failed.
        Interrupted: the run received a stop signal; the last complete step is saved, as in the next two.
        RewardError: a reward function failed.
        DataError: no task is left.
    """
    done, recorder = 0, Recorder(training.name, run)
    if checkpoints is not None and checkpoints.latest_step is not None:
        state, record = checkpoints.restore(state)
        done, recorder.flops = record["step"], record["flops"]
        training.set_cursor(record["cursor"])
        console.print(f"{training.name} is resumed at step {done}", highlight=False)
    if until.steps is not None and done > until.steps:
        raise CheckpointError(
            f"{training.name} has done {done} steps; run.num_steps={until.steps} must be at least that. Raise "
            f"--run.num-steps, or go back with --run.resume {until.steps}."
        )
    for name in (training.name, *training.also_records) if run is not None else ():
        run.cut_metrics(name, done)
    cursor = training.get_cursor()

    def save() -> None:
        flops = recorder.flush()
        if checkpoints is not None:
            checkpoints.save(done, state, {"step": done, "cursor": cursor, "flops": flops})

    try:
        with progress_bar(training.name, 100 if until.steps is None else until.steps) as progress:
            while done != stop_at_step:
                at_boundary(done, state, recorder.flush)
                if is_done := until.is_reached(done, recorder.flops):
                    break
                recorder.begin()
                state, outcome = training.step(state, done)
                done, cursor = done + 1, training.get_cursor()
                # If FLOPs set the end, wait for this step's; otherwise metrics are read one step late.
                spent = recorder.flops_with(outcome) if until.flops is not None else 0.0
                is_done = until.is_reached(done, spent)
                recorder.add(done, outcome, keep=is_done or done % training.log_every_steps == 0)
                progress(done if until.steps is not None else until.percent(done, spent), recorder.note)
                _check_health(recorder, checkpoints, max_skipped_updates)
                if is_done or done == stop_at_step or done % save_every_steps == 0:
                    save()
                for written in recorder.take_written():
                    watch(written)
                check()
    except (Interrupted, RewardError, DataError) as stop:
        save()
        stop.add_note(f"step {done} of {training.name} is saved")
        raise
    return state, recorder.flush()


def _check_health(recorder: Recorder, checkpoints: Checkpoints | None, max_skipped_updates: int) -> None:
    if recorder.num_skipped >= max_skipped_updates:
        last = "none" if checkpoints is None else f"step {checkpoints.latest_step}"
        raise CheckpointError(
            f"{recorder.num_skipped} updates in a row had a non-finite loss or gradient; the last good checkpoint is "
            f"{last}. Lower the learning rate in a new run."
        )
    if checkpoints is not None:
        checkpoints.raise_failure()
