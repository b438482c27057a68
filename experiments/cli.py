"""Command lines: preset, then flags, to a Config. Shared by every experiment script."""

import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import tyro
from rich.markup import escape

from experiments.presets import PRESETS
from rpt_jax.config import Config
from rpt_jax.config.schema import MOVES, help_texts, walk
from rpt_jax.errors import CheckpointError, ConfigError, DataError, Interrupted, RewardError
from rpt_jax.parallel.distributed import split_cpu
from rpt_jax.parallel.interruption import RESUMABLE
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.train.progress import console
from rpt_jax.train.run_directory import read_config


def parse_config(argv: list[str], *, default_preset: str | None = None) -> tuple[Config, bool]:
    """(config, dry run?) of a command line: default < preset < flag.

    Raises:
        ConfigError: unknown preset or flag, no preset, or settings that cannot run.
        SystemExit: --help, or a value that its flag cannot take; tyro says which.
    """
    flags, preset, dry_run = list(argv), default_preset, False
    if "--dry-run" in flags:
        flags.remove("--dry-run")
        dry_run = True
    for i, flag in enumerate(flags):
        if flag == "--preset" or flag.startswith("--preset="):
            words = flags[i : i + 2] if flag == "--preset" else flag.split("=", 1)
            preset = words[1] if len(words) == 2 else None
            del flags[i : i + (2 if flag == "--preset" else 1)]
            break
    if {"-h", "--help", "--help-all"} & set(flags):
        print_help(flags, PRESETS.get(preset, Config()))
    elif preset not in PRESETS:
        raise ConfigError(f"--preset {preset}; it must be one of {', '.join(PRESETS)}. Choose one.")
    config = _with_flags(PRESETS.get(preset, Config()), flags)
    if not config.run.directory:
        config = replace(config, run=replace(config.run, directory=f"runs/{preset}"))
    return _ready(config), dry_run


def _with_flags(config: Config, flags: list[str]) -> Config:
    config, unknown = tyro.cli(Config, default=config, args=flags, return_unknown_args=True, prog="experiment")
    if unknown:
        names = {argument.split("=")[0] for argument in unknown}
        moved = [f" {_flag(m.old)} is {_flag(m.new)} now." for m in MOVES if _flag(m.old) in names]
        raise ConfigError(
            f"unknown argument(s) {' '.join(unknown)}; flags are --section.field VALUE. See --help-all for all of them."
            + "".join(moved)
        )
    return config


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def print_help(flags: list[str], config: Config) -> None:
    """The script's own text and the settings that people vary, in the order of a run; with --help-all every setting.

    Raises:
        SystemExit: always.
    """
    print(sys.modules["__main__"].__doc__)
    print(f"--preset: one of {', '.join(PRESETS)}\n--dry-run: the resolved run, nothing done\n")
    if "--help-all" in flags:
        tyro.cli(Config, default=config, args=["--help"], prog="experiment")
    texts = help_texts(config)
    for path, f, value in walk(config):
        if f.metadata.get("shown") and path.count(".") == 1:
            print(f"{_flag(path)} {json.dumps(value)}")
            print(textwrap.fill(texts[path], 110, initial_indent="    ", subsequent_indent="    "))
    print("\n--help-all: every setting")
    sys.exit(0)


def _ready(config: Config) -> Config:
    config.validate()
    check_rewards(config)
    split_cpu(config.mesh, config.distributed)
    return config


def load_run(directory: Path, flags: list[str]) -> Config:
    """The config of an existing run directory; its corpus and tokenizer must still be where they were.

    Args:
        flags: what is to differ here: the mesh, what evaluations take (`RunDirectory` says what may).
    Raises:
        CheckpointError: no run there.
        ConfigError: unknown flag, or settings that cannot run.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"--run {directory} holds no config.json; it must be the directory of a run. Check the path."
        )
    config = _ready(_with_flags(read_config(directory), flags))
    return replace(config, run=replace(config.run, directory=str(directory)))


def describe(config: Config) -> str:
    """The resolved run in a page: config, batch arithmetic, mesh."""
    r, mesh = config.rollout, config.mesh
    prompts = r.num_trunks * r.prompts_per_trunk
    updates = config.loss.num_minibatches
    return (
        f"{config.to_json()}\n"
        f"batch: {r.num_trunks} trunks x {r.prompts_per_trunk} positions x {r.group_size} rollouts = "
        f"{prompts * r.group_size} rollouts of at most {r.max_completion_tokens} tokens, {updates} update(s) a batch\n"
        f"mesh: data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} = {mesh.num_devices} device(s), "
        f"{r.num_trunks // mesh.trunk_shards} trunks on each data shard"
    )


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`.

    Our own errors end it with their message and status 2, others with a traceback and 1. A run that was told to stop
    has saved and ends with `RESUMABLE`: a scheduler may start the same command again.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as stop:
        console.print(
            f"{stop}; what was done is saved. The same command goes on, with --run.resume latest if it named a step "
            f"(exit status {RESUMABLE})"
        )
        sys.exit(RESUMABLE)
    except Exception as error:
        if isinstance(error, (ConfigError, DataError, CheckpointError, RewardError)):
            console.quiet = False  # the processes that write no files are quiet, but not about this
            console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
            status = 2
        else:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            os._exit(status)  # an orderly end would wait for the others, who wait for this process
        sys.exit(status)
