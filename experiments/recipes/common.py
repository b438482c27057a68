"""The command line that recipes share, and the settings of their steps."""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from experiments.cli import describe, parse_config
from experiments.recipes.judging import COST, COUNTS, Judge
from experiments.rejection_sample import sample_accepted
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.examples import Example, read_examples
from rpt_jax.errors import ConfigError
from rpt_jax.models.hf import save_hf
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.train.pipeline import Files, Recipe, run_recipe
from rpt_jax.train.policies import start_params
from rpt_jax.train.progress import console
from rpt_jax.train.rejection import write_examples
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import read_config, read_json, read_records
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.control import continue_supervised
from rpt_jax.train.stages.warm_start import warm_start

NOTHING: Mapping[str, Any] = MappingProxyType({})
# Settings that the steps of every recipe have values of their own for, whatever the command line says.
_SET_BY_ALL = ("--supervised.path", "--run.control")
_SET_BY_TINY = ("--data.path", "--data.heldout-path", "--data.tokenizer", "--data.mixture", "--questions.path",
                "--questions.heldout-path")  # fmt: skip
_SET_BY_PRETRAINED = ("--supervised.num-steps",)


def parse_recipe(
    argv: Sequence[str],
    parser: argparse.ArgumentParser,
    settings: Sequence[str],
    *,
    sets: Sequence[str] = (),
    not_tiny: Sequence[str] = (),
    only_tiny: Sequence[str] = (),
) -> tuple[argparse.Namespace, Config, bool]:
    """Parse a recipe's command line: its own flags, and a preset with settings.

    Without --preset and --policy.path the recipe runs in tiny form, with `settings` on top of tiny_worked. A pretrained
    policy's preset is `questions` if they are given, otherwise `text`.

    Args:
        argv: arguments, without the program's name.
        parser: of the recipe's own flags, without --help.
        settings: flags of the tiny form, which those of the command line override.
        sets: flags of settings for which the steps have their own values.
        not_tiny: own flags that the tiny form has no use for.
        only_tiny: own flags that only the tiny form uses.
    Returns:
        (the recipe's own flags, config of all steps, whether the recipe runs in tiny form). The process has ended if
        --dry-run is among the arguments.
    Raises:
        ConfigError: a preset without a policy, a pretrained policy without texts or questions, or a flag that would do
            nothing.
    """
    parser.allow_abbrev = False
    args, flags = parser.parse_known_args(argv)
    is_tiny = not any(flag.split("=")[0] in ("--preset", "--policy.path") for flag in flags)
    idle = (*_SET_BY_TINY, *not_tiny) if is_tiny else (*_SET_BY_PRETRAINED, *only_tiny)
    given = [flag.split("=")[0] for flag in argv if flag.startswith("--")]
    given = [flag.replace("_", "-") for flag in given]
    for flag in given:
        if flag in (*_SET_BY_ALL, *sets, *idle):
            form = " in tiny form" if is_tiny and flag in idle else " of a pretrained policy" if flag in idle else ""
            raise ConfigError(
                f"{flag}; the steps of this recipe{form} have their own, so it would do nothing. Leave it out"
                + (", or set --policy.path." if is_tiny and flag in idle else ".")
            )
    preset = "tiny_worked" if is_tiny else "questions" if "--questions.path" in given else "text"
    config, dry_run = parse_config([*(settings if is_tiny else ()), *flags], default_preset=preset)
    if dry_run:
        print(describe(config))
        raise SystemExit(0)
    if not (is_tiny or config.policy.path):
        raise ConfigError(
            "no --policy.path; with --preset a recipe starts from a policy. Set --policy.path, or leave out --preset "
            "for the tiny form."
        )
    if not is_tiny and not (config.data.path or config.data.mixture or config.questions.path):
        raise ConfigError(
            f"policy.path={config.policy.path!r} without texts; a recipe in tiny form makes its own, but for this "
            "policy it needs some. Set --data.path or --questions.path."
        )
    cache = config.data.cache or f"{config.run.directory}/cache"
    return args, replace(config, data=replace(config.data, cache=cache)), is_tiny


def count(word: str) -> int:
    """Return a number of steps, batches or rounds from the command line; the `type` of such a flag."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}; it must be a whole number, at least 1")
    return int(word)


def run_followed(recipe: Recipe, config: Config, judge: Judge) -> None:
    """Run a recipe in the config's directory; judge every policy, and write the page."""
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with watching(config.distributed.deadline_seconds):
        run_recipe(recipe, config.run.directory, after_each=judge)


def on_puzzles(config: Config) -> Config:
    """Return the config of a recipe in tiny form, with the documents of its corpus."""
    corpus = Path(config.run.directory) / "corpus"
    names = ("path", "train.jsonl"), ("heldout_path", "heldout.jsonl"), ("tokenizer", "tokenizer")
    return with_values(config, {f"data.{name}": str(corpus / file) for name, file in names})


def tiny_base(config: Config, write: Callable[..., None], settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the first two steps of a recipe in tiny form: the corpus, and the base policy, made from nothing.

    Args:
        config: of the recipe.
        write: a writer of `puzzles`.
        settings: of it, besides the seed and the number of sequences of base.jsonl.
    """
    num_base = config.supervised.num_steps * config.supervised.batch_size
    base = Path(config.run.directory) / "corpus" / "base.jsonl"
    begin = with_values(config, {"run.num_steps": 0, "supervised.path": str(base)})
    return [
        ("corpus", Files(write, {"seed": config.run.seed, "num_base": num_base} | dict(settings))), ("base", begin),
    ]  # fmt: skip


def need_file(given: str, flag: str, purpose: str) -> None:
    """Raise ConfigError if a recipe for a pretrained policy lacks a file."""
    if not given:
        raise ConfigError(
            f"no {flag} for this policy; it is {purpose}. Set {flag} to a file of lines with text and completion, as "
            "supervised.path takes."
        )


def supervised_step(config: Config, path: str, num_steps: int, values: Mapping[str, Any] = NOTHING) -> Config:
    """Return a run that only learns a file, with the fine-tuning optimizer; `values` are further settings by path."""
    changes = {"supervised.path": path, "supervised.num_steps": num_steps, "run.num_steps": 0}
    fine = replace(config.supervised, optimizer=config.supervised.control_optimizer)
    return with_values(replace(config, supervised=fine), changes | dict(values))


def rl_step(config: Config, values: Mapping[str, Any] = NOTHING) -> Config:
    """Return a run that only does RL; `values` are further settings by path. Its own evaluations are small ones."""
    changes = {
        "supervised.num_steps": 0, "supervised.path": "", "run.control": False,
        "eval.final_num_positions": config.eval.num_positions,
    }  # fmt: skip
    return with_values(config, changes | dict(values))


def right_by(config: Config) -> str:
    """Return the reward that is 1 for right answers: of positions, of choices, or of questions."""
    return "math" if config.questions.path else "prefix"


def average_policies(directory: Path, *, runs: Sequence[str], weights: Sequence[float]) -> None:
    """Write the weighted mean of the runs' newest policies as a model directory.

    Args:
        directory: to write into.
        runs: directories of runs of one model shape.
        weights: of each; they add up to 1.
    """
    opened = open_run(runs[0])
    policies = [start_params(with_values(opened.config, {"policy.path": run}), opened.mesh) for run in runs]
    mean = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *policies)
    stop_ids = {"eos_token_id": list(opened.config.rollout.stop_ids)}
    save_hf(directory, opened.config.model, mean, tokenizer=opened.tokenizer, generation=stop_ids)
    opened.directory.close()


def continue_on(directory: Path, *, run: str, examples: str) -> None:
    """Continue the policy that an RL run started from with supervised training, for the FLOPs that RL spent.

    Writes a model directory, and its cost.

    Args:
        directory: to write into.
        run: directory of the RL run.
        examples: documents, for next-token training; or a file as supervised.path takes, mixed in equal parts with
            documents (Mixed SFT).
    """
    opened = open_run(run)
    params = warm_start(opened)
    texts = opened.domain.control_examples(opened)
    learned: Sequence[Example] = texts
    if examples != "documents":
        worked = read_examples(examples, opened.tokenizer, opened.template, opened.config)
        rng = random.Random(opened.config.run.seed)
        learned = [*worked, *(texts[rng.randrange(len(texts))] for _ in worked)]
    spent = max(r["flops"] for r in read_records(Path(run)) if r["stage"] == "rpt")
    began = time.perf_counter()
    optimizer = opened.config.supervised.control_optimizer
    trained, _, flops = continue_supervised(opened, params, learned, optimizer, spent)
    seconds = time.perf_counter() - began
    stop_ids = {"eos_token_id": list(opened.config.rollout.stop_ids)}
    save_hf(directory, opened.config.model, trained, tokenizer=opened.tokenizer, generation=stop_ids)
    write_cost(directory, flops, seconds)
    opened.directory.close()


def write_counts(directory: Path, counts: Mapping[str, float]) -> None:
    """Write what a step that makes files has found, for the recipe's page."""
    (directory / COUNTS).write_text(json.dumps(dict(counts)))


def write_cost(directory: Path, flops: float, seconds: float) -> None:
    """Write what a step that makes files has cost."""
    (directory / COST).write_text(json.dumps({"flops": flops, "seconds": seconds}))


def write_accepted(
    directory: Path,
    *,
    run: str,
    num_batches: int,
    per_prompt: int,
    min_reward: float,
    num_texts: int = 0,
    as_much_as: str = "",
) -> None:
    """Sample a run's newest policy and write examples.jsonl: its rewarded completions, and plain texts between them.

    Args:
        directory: to write into.
        run: directory of a run.
        num_batches: rollout batches to sample, at most.
        per_prompt: most completions of a prompt.
        min_reward: of a completion to keep.
        num_texts: training documents to mix in, as plain text; 0 for runs on questions.
        as_much_as: an earlier step; sampling ends with the batch that reaches its FLOPs. Empty: no limit.
    """
    opened, began = open_run(run), time.perf_counter()
    limit = read_json(Path(as_much_as) / COST)["flops"] if as_much_as else math.inf
    found = sample_accepted(opened, num_batches, per_prompt=per_prompt, min_reward=min_reward, max_flops=limit)
    write_cost(directory, found.flops, time.perf_counter() - began)
    path = directory / "examples.jsonl"
    write_examples(path, found.rows, tokenizer=opened.tokenizer.fingerprint, template=opened.template.fingerprint)
    lines = path.read_text().splitlines()
    weight = opened.config.supervised.context_weight
    lines += [json.dumps({"text": text, "text_weight": weight}) for text in _training_texts(opened, num_texts)]
    random.Random(opened.config.run.seed).shuffle(lines)
    path.write_text("".join(f"{line}\n" for line in lines))
    write_counts(directory, found.counts)
    opened.directory.close()


def open_run(directory: str, values: Mapping[str, Any] = NOTHING) -> Run:
    """Open a finished run, to read it; `values` are other settings of its rollouts and rewards, by path."""
    config = with_values(read_config(Path(directory), say=False), {"run.directory": directory} | dict(values))
    return fitted(prepare(config, read_only=True, judges=bool(values)))


def _training_texts(run: Run, number: int) -> list[str]:
    """Return the beginnings of training documents, as long as a trunk holds, none of them held out."""
    texts, limit = [], run.config.data.trunk_length - 1  # a BOS may come first
    for document in itertools.islice(run.domain.training if number else (), number):
        tokens = [int(token) for token in document.tokens[:limit]]
        while len(run.tokenizer.encode(text := run.tokenizer.decode(tokens))) > limit:
            tokens.pop()  # another split of the same text may be longer
        texts.append(text)
    return texts
