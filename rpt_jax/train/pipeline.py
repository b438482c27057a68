"""Execution of all stages of a run, or of a recipe of several runs, in order; both resume after an interruption."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from rpt_jax.config import Config
from rpt_jax.data.readers import check_files
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import FINISHED, read_json, write_atomically
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


@dataclass(frozen=True)
class Files:
    """A step of a recipe that is not a run: it makes files from those of earlier steps, all or nothing.

    Attributes:
        make: called as make(directory, **settings) with an empty directory to fill. It must be a function of earlier
            steps and its settings alone.
        settings: JSON-able keyword arguments; a finished step accepts only the same ones.
    """

    make: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


Recipe = Sequence[tuple[str, Config | Files]]


def run_recipe(
    recipe: Recipe, directory: str | Path, *, after_each: Callable[[Path], Any] = lambda path: None
) -> list[Path]:
    """Run the steps of a recipe in order, each in its own directory.

    A run without a policy.path starts from the final policy of the run before it; a policy.path may name the directory
    of an earlier step. A finished step is checked but not done again, and an interrupted run resumes. After any
    interruption, the same call ends with the same policies, bit for bit.

    Args:
        recipe: (name, config of a run, or files) of each step; the first run starts from its own policy.path. Names
            are unique.
        directory: parent of the steps' directories, which have the names of the steps.
        after_each: called with the directory of each step when it is finished, also if it was before.
    Returns:
        The steps' directories.
    Raises:
        ConfigError: names are not unique, a policy.path names neither a model nor an earlier step, or there are several
            processes and a step makes files.
        DataError: a run names a file that is missing, and is not in `directory`, where earlier steps may make it.
        CheckpointError: a directory holds a step with another config, corpus or other settings.
    """
    directory = Path(directory)
    steps = chained(recipe, directory)
    for name, step in steps:
        if isinstance(step, Config):
            step.validate()
            if not (directory / name / FINISHED).exists():
                check_files(step, made_in=directory)
        elif jax.process_count() > 1:
            raise ConfigError(
                f"a recipe with steps that make files, on {jax.process_count()} processes; it needs one. Run one "
                "process."
            )
    for name, step in steps:
        path = directory / name
        if isinstance(step, Files):
            _make_files(step, path)
        elif (path / FINISHED).exists():
            prepare(step, read_only=True)
            console.print(f"{path} is finished")
        else:
            run_stages(step)
        after_each(path)
    return [directory / name for name, _ in steps]


def chained(recipe: Recipe, directory: Path) -> list[tuple[str, Config | Files]]:
    """Return the steps with the runs' directories, and with the run before as the policy of those that name none.

    Raises:
        ConfigError: names are not unique, or a policy.path is neither a directory nor that of an earlier step.
    """
    names = [name for name, _ in recipe]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe has steps {names}; each needs a unique name. Rename one.")
    steps: list[tuple[str, Config | Files]] = []
    before = ""
    for number, (name, step) in enumerate(recipe):
        if isinstance(step, Config):
            path, own = step.policy.path or before, str(directory / name)
            earlier = {str(directory / other) for other in names[:number]}
            if path and path not in earlier and not Path(path).exists():
                raise ConfigError(
                    f"step {name!r} of a recipe has policy.path={path!r}; it must be a directory or an earlier step. "
                    "Correct policy.path."
                )
            step = replace(step, policy=replace(step.policy, path=path), run=replace(step.run, directory=own))
            before = own
        steps.append((name, step))
    return steps


def _make_files(step: Files, path: Path) -> None:
    """Make a step's files unless they are there, in a directory that gets its name when they are complete."""
    settings = json.loads(json.dumps(dict(step.settings)))
    if path.exists():
        made_with = read_json(path / FINISHED)
        if made_with != settings:
            raise CheckpointError(
                f"{path} was made with {made_with}; this recipe has {settings}. Use the same settings, or another "
                "directory."
            )
        console.print(f"{path} is finished")
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    console.print(f"making {path}")
    step.make(partial, **step.settings)
    write_atomically(partial / FINISHED, json.dumps(settings))
    os.replace(partial, path)
