"""Thoughts written with the answer in view: told, filtered, judged and learned, for two rounds.

python -m experiments.recipes.ravr [--run.seed N] [--run.directory runs/ravr]         # tiny form, 2 CPU cores
python -m experiments.recipes.ravr --preset text --policy.path DIR --data.path my.txt
    [--rounds 2] [--batches 12] [--sft-steps 60] [--unfiltered] [--section.field VALUE ...]

Each round, from the policy of the round before:

    told_N      prompts show the answer and ask for a think-aloud that does not say so. Kept: thoughts that end with the
                right prediction, leak nothing, and make the answer more likely behind the prompt that hides it, as the
                policy itself judges (reward ravr); the best two of a prompt
    policy_N    SFT of the base policy on them, behind prompts that hide the answer

Next to it, rejection sampling without a hint, for the same FLOPs: sampled_N and control_N. --unfiltered also trains on
the first round's thoughts with the leaks in. Every policy is judged on the same held-out positions; report.html in the
run directory follows it. After an interruption, run the same command again.
"""

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

from experiments.cli import run_script
from experiments.recipes.common import (
    count,
    on_puzzles,
    open_run,
    parse_recipe,
    right_by,
    run_followed,
    supervised_step,
    tiny_base,
    write_accepted,
    write_cost,
    write_counts,
)
from experiments.recipes.judging import Judge
from experiments.recipes.puzzles import write_with_hints
from experiments.rejection_sample import sample_rows
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.errors import DataError
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE
from rpt_jax.train.pipeline import Files, Recipe
from rpt_jax.train.rejection import write_examples
from rpt_jax.train.run_directory import read_config

_TINY = (
    "--run.directory", "runs/ravr", "--supervised.num-steps", "400", "--run.shapes", "few", "--data.trunk-length", "80",
    "--positions.entropy-threshold", "1.8",
    "--eval.num-positions", "50", "--eval.final-num-positions", "800",
)  # fmt: skip
# Words that give away that the answer was shown.
_SAYS_SO = re.compile(
    r"\b((the|correct|given|known) answer (is|was|must)|as (given|shown|stated) above|already know|was given)\b", re.I
)


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory, base, steps = Path(config.run.directory), config.policy.path, []
    if is_tiny:
        base = str(directory / "base")
        steps = tiny_base(config, write_with_hints, {"num_train": 8000, "num_heldout": 1000})
    else:
        # Sampling needs the directory of a run.
        base = str(directory / "base")
        steps = [("base", with_values(config, {"run.num_steps": 0, "supervised.num_steps": 0}))]
    told_by, sampled_by = base, base
    for number in range(1, args.rounds + 1):
        told, sampled = f"told_{number}", f"sampled_{number}"
        steps.append((told, Files(write_told, {"run": told_by, "num_batches": args.batches, "keeps_leaks": False})))
        steps.append((f"policy_{number}", _learned(config, directory / told, args, base)))
        if number == 1 and args.unfiltered:
            settings = {"run": told_by, "num_batches": args.batches, "keeps_leaks": True}
            steps.append(("told_unfiltered", Files(write_told, settings)))
            steps.append(("unfiltered", _learned(config, directory / "told_unfiltered", args, base)))
        wanted = {"num_batches": 10 * args.batches, "per_prompt": 2, "min_reward": 1.0}
        equal = {"run": sampled_by, "as_much_as": str(directory / told)}
        steps.append((sampled, Files(write_accepted, wanted | equal)))
        steps.append((f"control_{number}", _learned(config, directory / sampled, args, base)))
        told_by, sampled_by = str(directory / f"policy_{number}"), str(directory / f"control_{number}")
    return steps


def _learned(config: Config, source: Path, args: argparse.Namespace, base: str) -> Config:
    return supervised_step(config, str(source / "examples.jsonl"), args.sft_steps, {"policy.path": base})


def write_told(directory: Path, *, run: str, num_batches: int, keeps_leaks: bool) -> None:
    """Sample thoughts with the answer in view and write examples.jsonl: those that lead to it, and do not tell.

    Args:
        directory: to write into.
        run: directory of the run whose policy writes and judges.
        num_batches: rollout batches, of which half are prompts that show the answer.
        keeps_leaks: keep thoughts that give away that it was shown.
    Raises:
        DataError: no thought remains.
    """
    began, per_prompt = time.perf_counter(), 2
    rollout = read_config(Path(run), say=False).rollout
    two_prompts = {
        "reward.terms": ("ravr",), "rollout.prompts_per_trunk": 2 * rollout.prompts_per_trunk,
        "rollout.num_trunks": max(1, rollout.num_trunks // 2),
    }  # fmt: skip
    opened = open_run(run, two_prompts)
    sampled = sample_rows(opened, num_batches, shows_references=True, verifier=right_by(opened.config))
    told = [row for row in sampled.rows if row["shown"]]
    counts = dict.fromkeys(("told", "wrong", "leaked", "no_gain", "over_limit", "kept"), 0)
    by_prompt: dict[tuple, list[dict]] = defaultdict(list)
    for row in told:
        counts["told"] += 1
        if row["truncated"] or not row["right"]:
            counts["wrong"] += 1
            continue
        has_leaked = leaks(row["completion"].split(THINK_CLOSE)[0], row["prediction"])
        counts["leaked"] += has_leaked
        if has_leaked and not keeps_leaks:
            continue
        if row["reward"] <= 0:
            counts["no_gain"] += 1
            continue
        by_prompt[tuple(row["trunk_tokens"])].append(row)
    kept = []
    for group in by_prompt.values():
        distinct = {tuple(row["completion_tokens"]): row for row in group}
        best = sorted(distinct.values(), key=lambda row: -row["reward"])
        kept += best[:per_prompt]
        counts["over_limit"] += len(group) - len(best[:per_prompt])
    counts["kept"] = len(kept)
    if not kept:
        raise DataError(f"of {len(told)} thoughts with the answer in view none is usable ({counts}). Sample more.")
    names = {"tokenizer": opened.tokenizer.fingerprint, "template": opened.template.fingerprint}
    write_examples(directory / "examples.jsonl", kept, **names)
    write_counts(directory, counts | {"leak_rate": counts["leaked"] / max(1, counts["told"] - counts["wrong"])})
    write_cost(directory, sampled.flops, time.perf_counter() - began)
    opened.directory.close()


def leaks(thought: str, answer: str) -> bool:
    """Return whether a thought gives away that the answer was shown.

    It says so, quotes the box of the prompt, or its first statement already is the answer.
    """
    first = next((part for part in re.split(r"[,.;:\n]", thought) if part.strip()), "")
    return bool(_SAYS_SO.search(thought)) or BOX_OPEN in thought or first.strip() == answer.strip()


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--batches", type=count, default=12)
    parser.add_argument("--sft-steps", type=count, default=60)
    parser.add_argument("--unfiltered", action="store_true")
    args, config, is_tiny = parse_recipe(argv, parser, _TINY, sets=("--reward.terms",))
    if is_tiny:
        config = on_puzzles(config)
    config = with_values(config, {"reward.terms": (right_by(config),)})
    judge = Judge(
        config=config, split="determined" if is_tiny else "all", title="Thoughts written with the answer in view",
        about="Think-alouds that lead to a known answer without saying so, kept if they make it more likely, and "
        "learned without the hint; next to rejection sampling with the same compute.",
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
