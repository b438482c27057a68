"""Stages in order, and runs in order: how a whole run, or a recipe of several, goes through and resumes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import FINISHED
from rpt_jax.train.stages.control import run_control
from rpt_jax.train.stages.rl import run_rl
from rpt_jax.train.stages.warm_start import warm_start


def run_stages(config: Config, *, stop_at_step: int | None = None) -> Run:
    """Warm start, tasks, RL, control. A finished stage is not run again; an interrupted one resumes.

    Args:
        stop_at_step: stop RL and save here as an interruption would; nothing comes after it.
    Returns:
        The run, its records closed.
    """
    run = prepare(config)
    params = warm_start(run)
    tasks = run.domain.training_tasks(run, params)
    console.print(f"{len(tasks.ids):,} tasks")
    evaluations = Evaluations(run=run, source=run.domain.heldout(run, params), start=params)
    flops = run_rl(run, params, tasks, evaluations, stop_at_step=stop_at_step)
    if stop_at_step is None:
        if config.run.control:
            run_control(run, params, flops, evaluations)
        run.directory.finish()
    run.directory.close()
    return run


Recipe = Sequence[tuple[str, Config]]


def run_recipe(
    recipe: Recipe, directory: str | Path, *, after_each: Callable[[Run], Any] = lambda run: None
) -> list[Path]:
    """Named runs one after the other, each in its own directory, each from the policy that the one before ended with.

    A finished run is checked, not run again, and an interrupted one resumes: after an interruption anywhere, the same
    call ends with the same policies, bit for bit.

    Args:
        recipe: (name, config) of each; the first starts from its own policy.path. Names are unique.
        directory: holds a directory of each name.
        after_each: called with each run that has ended in this process.
    Returns:
        The runs' directories.
    Raises:
        ConfigError: names that are not unique, or a policy.path in any run but the first.
        CheckpointError: a directory holds a run with another config or corpus.
    """
    configs = chained(recipe, Path(directory))
    for config in configs:
        config.validate()
    for config in configs:
        if (Path(config.run.directory) / FINISHED).exists():
            prepare(config, read_only=True)
            console.print(f"{config.run.directory} is finished")
            continue
        after_each(run_stages(config))
    return [Path(config.run.directory) for config in configs]


def chained(recipe: Recipe, directory: Path) -> list[Config]:
    """The configs of a recipe with their directories, each with the run before as its policy."""
    names = [name for name, _ in recipe]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe has runs {names}; each needs a name of its own. Rename one.")
    configs: list[Config] = []
    for name, config in recipe:
        policy = config.policy
        if configs:
            if policy.path:
                raise ConfigError(
                    f"run {name!r} of a recipe has policy.path={policy.path!r}; it starts from the run before. Leave "
                    "policy.path out, or begin another recipe."
                )
            policy = replace(policy, path=configs[-1].run.directory)
        configs.append(replace(config, policy=policy, run=replace(config.run, directory=str(directory / name))))
    return configs
