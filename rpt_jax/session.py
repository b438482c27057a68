"""A whole run from Python: all stages and the report. The scripts and `rpt_jax.train` call it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rpt_jax.analysis.reports import REPORTS
from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.policy import Policy, load
from rpt_jax.rewards.host import store_function
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.progress import console
from rpt_jax.train.run_directory import read_config


def run(config: Config) -> None:
    """Run all stages, resuming each from its checkpoint if there is one, and write the report.

    Raises:
        Interrupted: a stop signal arrived; the last complete step is saved.
    """
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with watching(config.distributed.deadline_seconds):
        report(run_stages(config).directory.path)


def report(directory: Path) -> None:
    """Write the report of a finished run; a run without RL steps has none."""
    config = read_config(directory, say=False)
    if distributed.is_main() and config.run.num_steps:
        page = REPORTS["questions" if config.questions.path else "documents"](directory)
        console.print(f"report: [bold]{page}[/]   figures: {page.with_name('results.json')}")


def train(config: Config, *, reward: Callable[[bytes, bytes | None, dict], float] | None = None) -> Policy:
    """Train a run to its end and return its policy. After an interruption, the same call resumes it.

    Args:
        config: of the run, e.g. from `experiments.presets.preset`. Without a directory, the run goes to runs/run.
        reward: function(completion, prediction, columns) -> float, as reward.function; it is written into the run
            directory and called in worker processes. None: the rewards that the config names.
    Raises:
        ConfigError, DataError, CheckpointError: unusable input, before anything compiles.
        RewardError: the reward function failed.
        Interrupted: a stop signal arrived; the last complete step is saved.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"config={config!r:.80}; it must be a Config. experiments.presets.preset(name, {{setting: value}}) makes "
            "one."
        )
    config = replace(config, run=replace(config.run, directory=config.run.directory or "runs/run"))
    if reward is not None:
        function = store_function(reward, Path(config.run.directory))
        config = replace(config, reward=replace(config.reward, terms=("custom",), function=function))
    run(config)
    return load(config.run.directory)
