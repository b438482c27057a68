"""The warm start: training on a file or on texts before RPT, from the policy's initial parameters."""

from typing import Any

from rpt_jax.models.lora import merge
from rpt_jax.train.loop import fit
from rpt_jax.train.policies import fresh_state, is_reward_model, stage_optimizer
from rpt_jax.train.run import Run
from rpt_jax.train.stages.preferences import Preferences
from rpt_jax.train.stages.reward_model import RewardModelling
from rpt_jax.train.stages.supervised import Supervised
from rpt_jax.train.training import Training, Until

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
    shared = {
        "name": NAME, "config": config, "mesh": run.mesh, "optimizer": stage_optimizer(config, NAME),
        "tail": run.template.tail, "frozen": frozen, "examples": run.warm_examples,
    }  # fmt: skip
    if config.supervised.objective == "dpo":
        training: Training = Preferences(start=params, **shared)
    elif is_reward_model(config):
        training = RewardModelling(**shared)
    else:
        training = Supervised(shuffle=not config.supervised.path, **shared)
    with run.checkpoints(NAME) as checkpoints:
        state, _ = fit(
            training, state, run.directory, checkpoints, Until(steps=num_steps),
            save_every_steps=config.checkpoint.every_steps, max_skipped_updates=config.run.max_skipped_updates,
        )  # fmt: skip
    return merge(frozen, state.params)
