"""Execution of all stages of a run, or of a recipe of several runs, in order; both resume after an interruption."""

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
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.control import run_control
from rpt_jax.train.stages.rl import run_rl
from rpt_jax.train.stages.warm_start import warm_start


def run_stages(config: Config, *, stop_at_step: int | None = None) -> Run:
    """Run the warm start, RL and the control. A finished stage is not run again; an interrupted one resumes.

    Args:
        config: of the run.
        stop_at_step: save and stop RL here, as an interruption would; later stages do not run.
    Returns:
        The run, with its records closed.
    """
    run = fitted(prepare(config))
    params = warm_start(run)
    if config.run.num_steps:
        _run_rest(run, params, stop_at_step)
    if stop_at_step is None:
        run.directory.finish()
    run.directory.close()
    return run


def _run_rest(run: Run, params, stop_at_step: int | None) -> None:
    """Run RL from `params`, and the control unless RL stops early."""
    tasks = run.domain.training_tasks(run, params)
    console.print(f"{len(tasks.ids):,} tasks")
    run.directory.keep("tasks", {"tasks": len(tasks.ids)})
    evaluations = Evaluations(run=run, source=run.domain.heldout(run, params), start=params)
    flops = run_rl(run, params, tasks, evaluations, stop_at_step=stop_at_step)
    if run.config.run.control and stop_at_step is None:
        run_control(run, params, flops, evaluations)


Recipe = Sequence[tuple[str, Config]]


def run_recipe(
    recipe: Recipe, directory: str | Path, *, after_each: Callable[[Run], Any] = lambda run: None
) -> list[Path]:
    """Run named runs in order, each in its own directory and from the final policy of the previous run.

    A finished run is checked but not run again, and an interrupted one resumes. After any interruption, the same call
    ends with the same policies, bit for bit.

    Args:
        recipe: (name, config) of each run; the first starts from its own policy.path. Names are unique.
        directory: parent of the runs' directories, which have the names of the runs.
        after_each: called with each run that ends in this process.
    Returns:
        The runs' directories.
    Raises:
        ConfigError: names are not unique, or a run other than the first has a policy.path.
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
    """Return the configs of a recipe with their directories, each with the previous run as its policy.

    Raises:
        ConfigError: names are not unique, or a run other than the first has a policy.path.
    """
    names = [name for name, _ in recipe]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe has runs {names}; each needs a unique name. Rename one.")
    configs: list[Config] = []
    for name, config in recipe:
        policy = config.policy
        if configs:
            if policy.path:
                raise ConfigError(
                    f"run {name!r} of a recipe has policy.path={policy.path!r}; it starts from the previous run. "
                    "Remove policy.path, or start another recipe."
                )
            policy = replace(policy, path=configs[-1].run.directory)
        configs.append(replace(config, policy=policy, run=replace(config.run, directory=str(directory / name))))
    return configs
