"""The control: next-token training on the same documents, from the same start, until it has spent RPT's FLOPs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rpt_jax.config import OptimizerConfig
from rpt_jax.data.examples import Example
from rpt_jax.models.lora import join
from rpt_jax.parallel.distributed import from_main
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.loop import fit
from rpt_jax.train.policies import trainable
from rpt_jax.train.run import Run
from rpt_jax.train.run_directory import read_records
from rpt_jax.train.stages.supervised import Supervised
from rpt_jax.train.training import Until

NAME, EVALUATION = "control", "control_evaluation"


def continue_supervised(
    run: Run,
    params,
    examples: Sequence[Example],
    optimizer_config: OptimizerConfig,
    max_flops: float,
    *,
    directory=None,
    checkpoints=None,
    at_boundary=lambda *_: None,
) -> tuple[Any, int, float]:
    """Train from `params` with the supervised loss until `max_flops` are spent.

    Args:
        run: whose config and template apply.
        params: to start from.
        examples: to learn, reshuffled each epoch.
        optimizer_config: of this training.
        max_flops: at which training ends.
        directory: where to log, a `RunDirectory`; None: nowhere.
        checkpoints: where to save and resume; None: nowhere.
        at_boundary: called with (step, parameters, FLOPs) before each update and at the end.
    Returns:
        (parameters, steps done, FLOPs spent).
    """
    config, optimizer = run.config, make_optimizer(optimizer_config, run.config.run.num_steps)
    trained, frozen = trainable(config, run.mesh, params)
    training = Supervised(
        name=NAME, config=config, mesh=run.mesh, optimizer=optimizer, examples=examples, tail=run.template.tail,
        shuffle=True, frozen=frozen, also_records=(EVALUATION,),
    )  # fmt: skip
    last = [0]

    def boundary(step, state, flops):
        last[0] = step
        at_boundary(step, join(frozen, state.params), flops())

    state, flops = fit(
        training,
        init_state(trained, optimizer, run.mesh),
        directory,
        checkpoints,
        Until(flops=max_flops),
        save_every_steps=config.checkpoint.every_steps,
        max_skipped_updates=config.run.max_skipped_updates,
        at_boundary=boundary,
    )
    return join(frozen, state.params), last[0], flops


def run_control(run: Run, params, max_flops: float, evaluations: Evaluations, *, num_evaluations: int = 5) -> None:
    """Train the control from `params` and evaluate it along the way and at the end, if the domain has a control.

    Args:
        run: the run.
        params: that RL started from.
        max_flops: FLOPs that RL spent.
        evaluations: of the run.
        num_evaluations: number of evaluations, evenly spaced in FLOPs; the last is at the end.
    """
    examples = run.domain.control_examples(run)
    if examples is None:
        return
    evaluated = [r for r in read_records(run.directory.path) if r["stage"] == EVALUATION]
    # If RL continued for longer than its control, the control continues too.
    if from_main(any(r.get("final") and r["flops"] >= max_flops for r in evaluated)):
        return
    marks = np.linspace(0, max_flops, num_evaluations + 1)[1:-1]
    with run.checkpoints(NAME) as checkpoints:
        # The evaluation at the step that training resumes from is repeated.
        done = (checkpoints.latest_step or 0) - 1
        run.directory.cut_metrics(EVALUATION, done)
        reached = max((r["flops"] for r in evaluated if r["step"] <= done), default=0.0)
        num_passed = from_main(int((marks <= reached).sum()))

        def at_boundary(step: int, params, flops: float) -> None:
            nonlocal num_passed
            if (marks <= flops).sum() > num_passed:
                num_passed = (marks <= flops).sum()
                figures = evaluations.evaluate(params, thinking=False, final=False)
                run.directory.log(EVALUATION, step, {"flops": flops} | figures)

        trained, step, flops = continue_supervised(
            run, params, examples, run.config.supervised.control_optimizer, max_flops, directory=run.directory,
            checkpoints=checkpoints, at_boundary=at_boundary,
        )  # fmt: skip
    figures = evaluations.evaluate(trained, thinking=True, final=True)
    run.directory.log(EVALUATION, step, {"flops": flops, "final": True} | figures)
