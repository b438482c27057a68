"""Is it the reward? RPT against controls that start from the same policy and spend the same compute.

python -m experiments.studies.is_it_the_reward --preset tiny_worked --directory runs/reward --seeds 0 1 2
    --out docs/results/reward.json [--arms prefix random ...] [--section.field VALUE ...]

Arms:
    prefix            RPT
    random            RPT with the same number of rewarded rollouts in every group, but not the right ones
    shuffled_targets  RPT whose predictions are compared with another position's continuation
    next_token        next-token training on the same documents, until it has spent the FLOPs of prefix
    rejection         supervised training on the start policy's right rollouts; sampling counts
    mixed             supervised training on raw text and worked thoughts, as in the warm start

Every seed has its own directory: a warm start that all arms share, then an arm in each subdirectory. RL arms resume,
and a finished arm is not run again. Supervised arms need the arm prefix, whose FLOPs set theirs. The script writes
--out after each arm and prints a Markdown table; the picture beside --out shows accuracy over FLOPs and over seconds.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import quickstart
from experiments.cli import parse_config, run_script
from experiments.rejection_sample import sample_accepted
from rpt_jax.analysis.reports.figures import subplots
from rpt_jax.analysis.reports.run import series
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.examples import read_examples
from rpt_jax.errors import ConfigError
from rpt_jax.session import run as run_and_report
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.rejection import write_examples
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import FINISHED, read_json, read_records, read_seconds, write_atomically
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.control import continue_supervised
from rpt_jax.train.stages.warm_start import warm_start

RL_ARMS = ("prefix", "random", "shuffled_targets")
SUPERVISED_ARMS = ("next_token", "rejection", "mixed")
COLUMNS = (
    ("thinking, sampled", "sampled_prefix"),
    ("thinking, greedy", "greedy_prefix"),
    ("direct", "direct_prefix"),
    ("log p, thinking", "reasoned_logprob"),
)
METRICS = (
    *(metric for _, metric in COLUMNS), "pass@k", "majority@k", "majority_share", "direct_logprob",
    "sampled_no_prediction", "sampled_thought_tokens",
)  # fmt: skip
# Of these, what pictures show over FLOPs and seconds.
DRAWN = ("sampled_prefix", "direct_prefix")


def shared_start(config: Config, directory: Path) -> Config:
    """Run the seed's warm start and return the config of RL arms, which begin from it."""
    base = replace(config, run=replace(config.run, directory=str(directory / "cold_start")))
    if not (base.data.path or base.data.mixture):
        if base.policy.path:
            raise ConfigError("the preset has a pretrained policy and no corpus; set --data.path or --data.mixture.")
        base = quickstart.with_corpus(base)
        quickstart.make_corpus_once(base)
    base = replace(base, data=replace(base.data, cache=str(directory / "cache")))
    begin = replace(base, run=replace(base.run, num_steps=0))
    if not (directory / "cold_start" / FINISHED).exists():
        run_stages(begin)
    return replace(
        base, policy=replace(base.policy, path=begin.run.directory), supervised=replace(base.supervised, num_steps=0)
    )


def run_rl_arm(config: Config, directory: Path, arm: str, changes: Mapping[str, Any] | None = None) -> dict:
    """Run one RL arm and return its curve and final figures.

    Args:
        config: of RL arms, from `shared_start`.
        directory: of the seed.
        arm: name of its directory.
        changes: settings of the arm, by path; None: the reward is the arm's name.
    """
    path = directory / arm
    if not (path / FINISHED).exists():
        run = replace(config.run, directory=str(path), control=False)
        changed = with_values(config, {"reward.terms": (arm,)} if changes is None else changes)
        run_and_report(replace(changed, run=run))
    evaluations = [r for r in read_records(path) if r["stage"] == "evaluation"]
    seconds = read_seconds(path, "rpt")
    return {
        "flops": [r["flops"] for r in evaluations],
        "seconds": [sum(seconds[: r["step"]]) for r in evaluations],
        "curve": [_brief(r.get("curve", r["splits"]), DRAWN) for r in evaluations],
        "before": _brief(evaluations[0]["splits"]),
        "after": _brief(evaluations[-1]["splits"]),
        "reward": [r["reward"] for r in read_records(path) if r["stage"] == "rpt"],
    }


def run_supervised_arm(run: Run, directory: Path, arm: str, of_prefix: dict) -> dict:
    """Train one supervised arm until it has spent the FLOPs of prefix; return its final figures."""
    params = warm_start(run)
    began = time.perf_counter()
    examples, spent = EXAMPLES[arm](run, directory)
    optimizer = run.config.supervised.control_optimizer
    trained, steps, flops = continue_supervised(run, params, examples, optimizer, of_prefix["flops"][-1] - spent)
    seconds = time.perf_counter() - began
    evaluations = Evaluations(run=run, source=run.domain.heldout(run, params), start=params)
    figures = evaluations.evaluate(trained, thinking=True, final=True)
    return {
        "flops": [0.0, spent + flops],
        "seconds": [0.0, seconds],
        "updates": steps,
        "examples": len(examples),
        "curve": [of_prefix["curve"][0], _brief(figures["curve"], DRAWN)],
        "before": of_prefix["before"],
        "after": _brief(figures["splits"]),
    }


def _brief(splits: dict, metrics: Sequence[str] = METRICS) -> dict:
    """Return the figures of interest to five places, so that the file stays small."""
    return {
        split: {m: {k: round(v, 5) for k, v in cells[m].items()} for m in metrics if m in cells}
        for split, cells in splits.items()
    }


def _documents(run: Run, directory: Path):
    return run.domain.control_examples(run), 0.0


def _rejection(run: Run, directory: Path):
    """Sample half as many batches as RPT has steps from the start policy; keep up to two right rollouts per prompt."""
    found = sample_accepted(run, max(1, run.config.run.num_steps // 2), per_prompt=2, from_start=True)
    path = directory / "rejection.jsonl"
    write_examples(path, found.rows, tokenizer=run.tokenizer.fingerprint, template=run.template.fingerprint)
    return read_examples(str(path), run.tokenizer, run.template, run.config), found.flops


def _mixed(run: Run, directory: Path):
    """Take the warm start's examples; of a file, which is in training order, the half that it ended with."""
    config = Config.from_json((directory / "cold_start" / "config.json").read_text())
    examples = run.domain.warm_examples(config, run.tokenizer)
    half = len(examples) // 2 if config.supervised.path else 0
    return [examples[i] for i in range(half, len(examples))], 0.0


EXAMPLES: dict[str, Callable] = {"next_token": _documents, "rejection": _rejection, "mixed": _mixed}


def run_arm(config: Config, directory: Path, arm: str, of_seed: dict) -> dict:
    """Run one arm of a seed.

    Raises:
        ConfigError: a supervised arm before prefix.
    """
    if arm in RL_ARMS:
        return run_rl_arm(config, directory, arm)
    if "prefix" not in of_seed:
        raise ConfigError(f"arm {arm} spends the FLOPs of arm prefix, which has not run. Name prefix first in --arms.")
    own = replace(config, run=replace(config.run, directory=str(directory / "prefix"), control=False))
    run = fitted(prepare(own, read_only=True))
    result = run_supervised_arm(run, directory, arm, of_seed["prefix"])
    run.directory.close()
    return result


def table(found: dict, splits: list[str]) -> str:
    """Return a Markdown table, one row per split and arm; a cell has the seeds' values and the largest standard error
    over positions."""
    lines = ["| split (n) | arm | " + " | ".join(t for t, _ in COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for split in splits:
        rows = {"start": [of["prefix"]["before"] for of in found.values() if "prefix" in of]}
        for arm in (*RL_ARMS, *SUPERVISED_ARMS):
            rows[arm] = [of[arm]["after"] for of in found.values() if arm in of]
        for arm, figures in rows.items():
            if figures and split in figures[0]:
                n = " / ".join(str(f[split]["direct_prefix"]["n"]) for f in figures)
                cells = " | ".join(_cell([f[split].get(metric) for f in figures]) for _, metric in COLUMNS)
                lines.append(f"| {split} ({n}) | {arm} | {cells} |")
    return "\n".join(lines)


def _cell(figures: list[dict | None]) -> str:
    if None in figures:
        return "–"
    return " / ".join(f"{f['value']:.3f}" for f in figures) + f" ±{max(f['standard_error'] for f in figures):.3f}"


def plot(found: dict, splits: list[str]):
    """Draw sampled accuracy of the first seed's arms over FLOPs and over seconds; bars are two standard errors."""
    of_seed = next(iter(found.values()))
    splits = [split for split in splits if all(split in arm["after"] for arm in of_seed.values())]
    figure, axes = subplots(2, len(splits), figsize=(3.8 * len(splits), 6.2), squeeze=False, layout="constrained")
    for column, split in enumerate(splits):
        for row, unit in enumerate(("flops", "seconds")):
            axis = axes[row][column]
            for number, (arm, result) in enumerate(of_seed.items()):
                # Direct prediction is what next-token training improves.
                metric = "direct_prefix" if arm == "next_token" else "sampled_prefix"
                values, errors = series(result["curve"], split, metric)
                label = f"{arm}, direct" if arm == "next_token" else arm
                axis.errorbar(
                    result[unit], values, 2 * errors, fmt="-o", ms=3, capsize=2, label=label, color=f"C{number}"
                )
            axis.set_xlabel("FLOPs after the warm start" if unit == "flops" else "seconds, without evaluations")
            axis.grid(alpha=0.3)
            axis.set_title(split if row == 0 else "", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    axes[0][0].legend(fontsize=7)
    figure.suptitle("Held-out accuracy: thinking, sampled; for next_token: direct")
    return figure


def parse_study(
    argv: list[str], arms: Sequence[str], splits: list[str], settings: Sequence[str] = ()
) -> tuple[argparse.Namespace, Config]:
    """Parse a study's command line: its own flags, and a preset with settings.

    Args:
        argv: arguments, without the program's name.
        arms: of the study.
        splits: default of --splits.
        settings: flags of the study, which those of the command line override.
    """
    parser = argparse.ArgumentParser(add_help=False)
    asks_help = bool({"-h", "--help", "--help-all"} & set(argv))
    parser.add_argument("--directory", type=Path, required=not asks_help)
    parser.add_argument("--out", type=Path, required=not asks_help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
    parser.add_argument("--splits", nargs="+", default=splits)
    args, flags = parser.parse_known_args(argv)
    config, _ = parse_config([*settings, *flags, "--run.directory", str(args.directory)], default_preset="tiny_worked")
    return args, config


def missing_arms(args: argparse.Namespace, config: Config, found: dict) -> Iterator[tuple]:
    """Yield (config, directory of the seed, arm, the seed's figures) of each arm that --out lacks, then write --out."""
    for seed in args.seeds:
        directory, of_seed = args.directory / f"seed{seed}", found.setdefault(str(seed), {})
        missing = [arm for arm in args.arms if arm not in of_seed]
        if not missing:
            continue
        begun = shared_start(replace(config, run=replace(config.run, seed=seed)), directory)
        for arm in missing:
            yield begun, directory, arm, of_seed
            # A run's objects refer to each other; its parameters must not outlive it.
            gc.collect()
            write_atomically(args.out, json.dumps(found))


def main(argv: list[str]) -> None:
    """Run the arms of every seed, then print the table and draw the picture."""
    args, config = parse_study(argv, [*RL_ARMS, *SUPERVISED_ARMS], ["all", "settled", "easy", "hard"])
    found = read_json(args.out) if args.out.exists() else {}
    for begun, directory, arm, of_seed in missing_arms(args, config, found):
        of_seed[arm] = run_arm(begun, directory, arm, of_seed)
    print(table(found, args.splits))
    plot(found, args.splits).savefig(args.out.with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_script(main)
