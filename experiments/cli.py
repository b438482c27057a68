"""The command line of the experiment scripts: a preset plus flags gives a Config."""

import difflib
import glob
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import jax
import tyro
from rich.markup import escape

from experiments.presets import (
    METHOD_PURPOSES,
    METHODS,
    NEED_A_POLICY,
    PRESETS,
    PURPOSES,
    find_preset,
    preset_names,
)
from rpt_jax.config import Config
from rpt_jax.config.schema import MOVES, flag_of, from_json, help_texts, take_fields, walk
from rpt_jax.data.templates import with_prompt_texts
from rpt_jax.errors import CheckpointError, ConfigError, DataError, Interrupted, RewardError
from rpt_jax.models.attention import default_dtype
from rpt_jax.parallel.distributed import split_cpu
from rpt_jax.parallel.interruption import RESUMABLE
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning.estimate import estimate_rollout, estimate_update
from rpt_jax.planning.fitting import with_sizes
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.train.policies import shape_of, with_shape
from rpt_jax.train.progress import console
from rpt_jax.train.run_directory import read_config, read_json
from rpt_jax.work import Shape as WorkShape


def parse_config(argv: list[str], *, default_preset: str | None = None, trains: bool = False) -> tuple[Config, bool]:
    """Parse a command line. Flags override the preset, which overrides the defaults.

    Args:
        argv: arguments, without the program's name.
        default_preset: preset to use without --preset; None: --preset is required.
        trains: the policy is sampled or trained, so that a preset for pretrained policies needs one.
    Returns:
        (config, whether --dry-run was given).
    Raises:
        ConfigError: unknown preset or flag, no preset, no policy, or invalid settings.
        SystemExit: --help, or a flag value that tyro rejects and reports.
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
        print_help(flags, (find_preset(preset) or ("", Config()))[1])
    found = find_preset(preset)
    if found is None:
        received = f"--preset {preset}" if preset else "no --preset"
        joined = [f"{base}+{method}" for base in PRESETS for method in METHODS]
        meant = _did_you_mean(preset, [*PRESETS, *METHODS, *joined])
        raise ConfigError(f"{received}; it must be {preset_names()}.{meant} Choose one.")
    base_name, base = found
    config = _with_flags(base, flags)
    directory = config.run.directory or f"runs/{preset}"
    saved = Path(directory) / "config.json"
    if saved.exists():
        # Fields that the run lacks were added later: their defaults and presets do not change it, only flags do.
        before, notes = from_json(Config, json.dumps(read_json(saved)))
        config = _with_flags(take_fields(base, before, notes), flags)
    if config.reward.function and not any(flag.startswith("--reward.terms") for flag in flags):
        if base.reward.terms != PRESETS[base_name].reward.terms:
            raise ConfigError(
                f"--preset {preset} with --reward.function; the method has its own reward. Set --reward.terms custom "
                "for the method's loss with your reward, or leave out the method."
            )
        config = replace(config, reward=replace(config.reward, terms=("custom",)))
    if trains and base_name in NEED_A_POLICY and not (config.policy.path or saved.exists()):
        raise ConfigError(
            f"--preset {preset} has no policy.path; it trains a pretrained policy, and a random one would never earn a "
            "reward. Set --policy.path to a model or run directory (experiments.fetch_smollm2 writes a small one)"
            + (", or use --preset tiny_text, which trains its own." if base_name == "text" else ".")
        )
    config = replace(config, run=replace(config.run, directory=directory))
    return _ready(config, before if saved.exists() else None, runs_here=not dry_run), dry_run


def _with_flags(config: Config, flags: list[str]) -> Config:
    config, unknown = tyro.cli(Config, default=config, args=flags, return_unknown_args=True, prog="experiment")
    if unknown:
        names = {argument.split("=")[0] for argument in unknown}
        moved = [f" {flag_of(m.old)} is now {flag_of(m.new)}." for m in MOVES if flag_of(m.old) in names]
        known = [flag_of(path) for path, _, _ in walk(config)]
        meant = [_did_you_mean(name, known) for name in sorted(names) if name.startswith("-")]
        raise ConfigError(
            f"unknown argument(s) {' '.join(unknown)}; flags must be --section.field VALUE, and switches "
            "--section.field or --section.no-field without a value. --help-all lists all." + "".join(moved or meant)
        )
    return config


# Names of TRL's settings and what they are here.
_TRL = {
    "lr": "--optimizer.learning-rate", "learning-rate": "--optimizer.learning-rate", "beta": "--loss.kl-coef",
    "num-generations": "--rollout.group-size", "max-completion-length": "--rollout.max-completion-tokens",
    "max-prompt-length": "--data.trunk-length", "reward-funcs": "--reward.function", "max-steps": "--run.num-steps",
    "output-dir": "--run.directory", "model-name-or-path": "--policy.path", "per-device-train-batch-size":
    "--rollout.num-trunks", "epsilon": "--loss.clip-eps-low", "epsilon-high": "--loss.clip-eps-high",
    "loss-type": "--loss.aggregation", "seed": "--run.seed", "top-p": "--rollout.top-p",
}  # fmt: skip


def _did_you_mean(word: str | None, known: Iterable[str]) -> str:
    """Return a suggestion, or nothing: what TRL's name is here, or the most similar known word, also where a flag lacks
    its section."""
    known = list(known)
    name = (word or "").lstrip("-").rpartition(".")[2].replace("_", "-")
    if _TRL.get(name) in known:
        return f" Did you mean {_TRL[name]}?"
    same_field = [name for name in known if word and name.rpartition(".")[2] == word.lstrip("-").rpartition(".")[2]]
    found = same_field[:3] or difflib.get_close_matches(word or "", known, n=1, cutoff=0.6)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def print_help(flags: list[str], config: Config) -> None:
    """Print the script's docstring and the common settings; with --help-all, print all settings.

    Args:
        flags: the command line; --help-all in it selects all settings.
        config: its values are printed as defaults.
    Raises:
        SystemExit: always.
    """
    print(sys.modules["__main__"].__doc__)
    print("--preset:")
    for name, purpose in PURPOSES.items():
        print(f"    {name:<18}{purpose}")
    print("--preset PRESET+METHOD, or METHOD alone for text+METHOD:")
    for name, purpose in METHOD_PURPOSES.items():
        print(f"    {name:<18}{purpose}")
    print("--dry-run: print the resolved run and exit\n")
    if "--help-all" in flags:
        tyro.cli(Config, default=config, args=["--help"], prog="experiment")
    texts, others = help_texts(config), []
    for path, f, value in walk(config):
        if f.metadata.get("shown") and path.count(".") == 1:
            print(f"{flag_of(path)} {json.dumps(value)}")
            print(textwrap.fill(texts[path], 110, initial_indent="    ", subsequent_indent="    "))
        else:
            others.append(flag_of(path))
    print("\nOther settings, which --help-all explains:")
    print(textwrap.fill(" ".join(others), 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
    sys.exit(0)


def _ready(config: Config, before: Config | None = None, *, runs_here: bool = True) -> Config:
    is_alone = not (config.distributed.coordinator or config.distributed.join)
    try:
        config.validate()
    except ConfigError:
        if runs_here and is_alone and config.mesh.num_devices > 1:
            # Missing devices explain more than batches that they do not divide.
            split_cpu(config.mesh, config.distributed)
            make_mesh(config.mesh)
        raise
    config = with_prompt_texts(config, before)
    check_rewards(config)
    split_cpu(config.mesh, config.distributed)
    return config


def load_run(directory: Path, flags: list[str]) -> Config:
    """Load the config of an existing run.

    Args:
        directory: the run directory.
        flags: settings to change, such as the mesh and evaluation settings (see `RunDirectory`).
    Raises:
        CheckpointError: the directory holds no run.
        ConfigError: unknown flag, or invalid settings.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"--run {directory} contains no config.json; it must be a run directory. Check the path.")
    if "model_type" in read_json(path):
        raise CheckpointError(
            f"--run {directory} is a model directory, not a run. Judge it with experiments.zero_shot --policy.path "
            f"{directory}, or sample with experiments.sample --policy {directory}."
        )
    config = _ready(_with_flags(read_config(directory), flags))
    return replace(config, run=replace(config.run, directory=str(directory)))


def describe(config: Config) -> str:
    """Return the resolved run as text: config, batch, mesh, what its paths hold, size of the policy, memory."""
    r, mesh = config.rollout, config.mesh
    prompts = r.num_trunks * r.prompts_per_trunk
    updates = config.loss.num_minibatches
    lines = [
        config.to_json(),
        f"batch: {r.num_trunks} trunks x {r.prompts_per_trunk} prompts x {r.group_size} rollouts = "
        f"{prompts * r.group_size} rollouts of up to {r.max_completion_tokens} tokens, {updates} update(s) per batch",
        f"mesh: data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} = {mesh.num_devices} device(s), "
        f"{r.num_trunks // mesh.trunk_shards} trunks per shard (data x fsdp)",
        *(f"{name}: {_contents(path)}" for name, path in _paths(config)),
    ]
    path, model = config.policy.path, config.model
    if not path or Path(path).exists():
        model = with_shape(model, shape_of(path)) if path else model
        model = replace(model, vocab_size=model.vocab_size or config.data.tokenizer_vocab_size)
        sized = replace(config, model=replace(model, activation_dtype=default_dtype(model)))
        sized = with_sizes(sized, {"microbatch_trunks": config.microbatch_trunks, "slots_per_trunk": 0})
        tokens = r.num_trunks * (
            config.data.trunk_length + r.prompts_per_trunk * r.group_size * r.max_completion_tokens
        )
        # The tail's length depends on the tokenizer; it hardly matters here.
        needed = [estimate(sized, 32) / 2**30 for estimate in (estimate_rollout, estimate_update)]
        lines.append(
            f"policy: {WorkShape(model).stored / 1e6:,.1f} M parameters; up to {tokens:,} tokens per step; about "
            f"{needed[0]:.1f} GiB per device for rollouts and {needed[1]:.1f} GiB for updates, by an "
            "estimate; on a CPU, programs and the process take 1 to 4 GiB more"
        )
    return "\n".join(lines)


def _paths(config: Config) -> list[tuple[str, str]]:
    named = [
        ("data.path", config.data.path), ("data.heldout_path", config.data.heldout_path),
        ("data.tokenizer", config.data.tokenizer), ("policy.path", config.policy.path),
        ("proxy.path", config.proxy.path), ("supervised.path", config.supervised.path),
        ("questions.path", config.questions.path), ("questions.heldout_path", config.questions.heldout_path),
    ]  # fmt: skip
    return [(name, path) for name, path in named if path and not path.startswith("hf:")]


def _contents(path: str) -> str:
    """Return what a path or glob holds, in words."""
    if Path(path).is_dir():
        return f"{path} is a directory of {sum(1 for _ in Path(path).iterdir())} entries"
    files = [f for f in glob.glob(path, recursive=True) if Path(f).is_file()]
    if not files:
        return f"{path} DOES NOT EXIST"
    return f"{len(files)} file(s), {sum(Path(f).stat().st_size for f in files) / 1e6:,.1f} MB"


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main` with the command-line arguments and turn exceptions into exit statuses.

    rpt_jax's errors print their message and exit with status 2. Other exceptions print a traceback and exit with
    status 1. A run stopped by a signal says what it has kept and exits with `RESUMABLE`, so that a scheduler can run
    the same command again.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as stop:
        console.print(
            f"{_with_notes(stop)}. Run the same command again to resume; if --run.resume named a step, set it to "
            f"latest (exit status {RESUMABLE})"
        )
        sys.exit(RESUMABLE)
    except BrokenPipeError:
        # The reader, such as head, has seen enough; a closing flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, (ConfigError, DataError, CheckpointError, RewardError)):
            console.quiet = False  # processes that write no files print only errors
            console.print(f"[bold red]{type(error).__name__}[/]: {escape(_with_notes(error))}", highlight=False)
            status = 2
        else:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            os._exit(status)  # a clean exit would deadlock: the other processes wait for this one
        sys.exit(status)


def _with_notes(error: Exception) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])
