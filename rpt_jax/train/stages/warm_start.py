"""The warm start: supervised training before RPT, from the policy's initial parameters."""

from typing import Any

from rpt_jax.models.lora import merge
from rpt_jax.train.loop import fit
from rpt_jax.train.policies import fresh_state, stage_optimizer
from rpt_jax.train.run import Run
from rpt_jax.train.stages.supervised import Supervised
from rpt_jax.train.training import Until

NAME = "warm_start"


def warm_start(run: Run) -> Any:
    """Return the parameters that RL and the control start from: the policy's, after supervised.num_steps of training.

    A finished warm start is restored, an interrupted one resumes.
    """
    config, params = run.config, run.start_params()
    num_steps = config.supervised.num_steps
    if not num_steps:
        return params
    state, frozen = fresh_state(config, run.mesh, params, NAME)
    finished = run.checkpoints(NAME, read_only=True)
    if finished.latest_step == num_steps:
        state, _ = finished.restore(state)
        return merge(frozen, state.params)
    training = Supervised(
        name=NAME, config=config, mesh=run.mesh, optimizer=stage_optimizer(config, NAME), examples=run.warm_examples,
        tail=run.template.tail, shuffle=not config.supervised.path, frozen=frozen,
    )  # fmt: skip
    with run.checkpoints(NAME) as checkpoints:
        state, _ = fit(
            training, state, run.directory, checkpoints, Until(steps=num_steps),
            save_every_steps=config.checkpoint.every_steps, max_skipped_updates=config.run.max_skipped_updates,
        )  # fmt: skip
    return merge(frozen, state.params)
