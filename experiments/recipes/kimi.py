"""Kimi k1.5's recipe (arXiv:2501.12599): long chains, RL with its objective, then four ways to shorten them.

python -m experiments.recipes.kimi [--run.seed N] [--run.directory runs/kimi]         # tiny form, 2 CPU cores
python -m experiments.recipes.kimi --preset text --policy.path DIR --data.path my.txt --cold-start long.jsonl
    [--length-weight 0.1] [--shorten rl] [--section.field VALUE ...]

    long         SFT of the base policy on long chains of thought (--cold-start, a file as supervised.path)
    rl           RL with the squared-ratio objective and partial rollouts, without a length reward (its warm-up)
    rl_length    the same with --length-weight times the length reward

From rl, or with --shorten rl_length from there, long2short by each of:

    average      the mean of its weights and the base policy's
    shortest     SFT on the shortest right completion of each prompt
    dpo          DPO on pairs: the shortest right one against wrong ones and right ones 1.5 times as long
    short_rl     a second phase of RL with half the limit and a larger length reward

The tiny form makes its own base policy from puzzles; its long chains work a puzzle and check it by working it again.
Every policy is judged on the same held-out positions; report.html in the run directory follows it through the steps.
After an interruption, run the same command again.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from experiments.cli import run_script
from experiments.recipes.common import (
    average_policies,
    count,
    need_file,
    on_puzzles,
    open_run,
    parse_recipe,
    right_by,
    rl_step,
    run_followed,
    supervised_step,
    tiny_base,
    write_accepted,
    write_cost,
)
from experiments.recipes.judging import Judge
from experiments.recipes.puzzles import write_long_chains
from experiments.rejection_sample import sample_rows
from rpt_jax.config import Config
from rpt_jax.config.schema import flag_of, with_values
from rpt_jax.errors import DataError
from rpt_jax.train.pipeline import Files, Recipe

_TINY = (
    "--run.directory", "runs/kimi", "--run.num-steps", "60", "--supervised.num-steps", "500", "--run.shapes", "few",
    "--rollout.max-completion-tokens", "64", "--eval.every-steps", "60", "--eval.num-positions", "50",
    "--eval.final-num-positions", "1600", "--eval.num-samples", "4", "--eval.max-documents", "1600",
)  # fmt: skip
_OBJECTIVE = {
    "loss.objective": "kimi", "loss.advantage": "mean", "loss.num_minibatches": 2,
    "loss.correction.mode": "token_truncate",
}  # fmt: skip
_WINDOW = "rollout.new_tokens_per_step"
# A right completion this much longer than the shortest one is rejected.
_LONGER = 1.5


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory, base, right = Path(config.run.directory), config.policy.path, right_by(config)
    steps: list = []
    if is_tiny:
        base = str(directory / "base")
        steps += tiny_base(config, write_long_chains, {"num_train": 8000, "num_heldout": 1600, "num_long": 12000})
    config = replace(config, policy=replace(config.policy, path=""))
    limit = config.rollout.max_completion_tokens
    objective = _OBJECTIVE | {_WINDOW: max(1, limit // 2)}
    graded = {"reward.terms": (right, f"{args.length_weight}*kimi_length")}
    cold = args.cold_start or str(directory / "corpus" / "long.jsonl")
    long, halves = str(directory / args.shorten), max(1, config.run.num_steps // 2)
    sampled = {"run": long, "num_batches": args.batches}
    from_long = {"policy.path": long}
    short = {
        "run.num_steps": halves, "rollout.max_completion_tokens": max(1, limit // 2), _WINDOW: 0,
        "reward.terms": (right, f"{2 * args.length_weight}*kimi_length"),
    }  # fmt: skip
    return [
        *steps,
        ("long", supervised_step(config, cold, args.cold_steps, {"policy.path": base})),
        ("rl", rl_step(config, objective | {"reward.terms": (right,)})),
        ("rl_length", rl_step(config, objective | graded | {"run.num_steps": halves})),
        ("average", Files(average_policies, {"runs": [long, base], "weights": [0.5, 0.5]})),
        # Ties of the reward are broken by length, so the graded reward does not matter.
        ("samples", Files(write_accepted, sampled | {"per_prompt": 1, "min_reward": 0.5})),
        (
            "shortest",
            supervised_step(config, str(directory / "samples" / "examples.jsonl"), args.sft_steps, from_long),
        ),
        ("pairs", Files(write_length_pairs, sampled)),
        (
            "dpo",
            supervised_step(
                config, str(directory / "pairs" / "pairs.jsonl"), args.dpo_steps,
                from_long | {"supervised.objective": "dpo", "supervised.optimizer.learning_rate": args.dpo_rate},
            ),
        ),
        ("short_rl", rl_step(config, objective | from_long | short)),
    ]  # fmt: skip


def write_length_pairs(directory: Path, *, run: str, num_batches: int) -> None:
    """Sample a run's newest policy and write pairs.jsonl, for supervised.objective dpo."""
    opened, began = open_run(run), time.perf_counter()
    sampled = sample_rows(opened, num_batches)
    write_cost(directory, sampled.flops, time.perf_counter() - began)
    pairs = list(length_pairs(sampled.rows))
    if not pairs:
        raise DataError(
            f"{len(sampled.rows)} rollouts of {run} hold no pair of a short right completion and a wrong or longer "
            "one. Sample more (--batches)."
        )
    names = {"tokenizer": opened.tokenizer.fingerprint, "template": opened.template.fingerprint}
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair | names) + "\n" for pair in pairs))
    opened.directory.close()


def length_pairs(rows: Iterable[dict]) -> Iterable[dict]:
    """Yield pairs of each prompt: its shortest right completion, and each wrong one or right one that is `_LONGER`.

    A completion is right if its reward is above 1/2, whatever its length earned. Source: arXiv:2501.12599 §2.4.
    """
    by_prompt: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        by_prompt[tuple(row["trunk_tokens"])].append(row)
    for trunk, group in by_prompt.items():
        rights = [row for row in group if row["reward"] > 0.5 and not row["truncated"]]
        if not rights:
            continue
        best = min(rights, key=lambda row: len(row["completion_tokens"]))["completion_tokens"]
        rejected = [
            row["completion_tokens"]
            for row in group
            if row["reward"] <= 0.5 or len(row["completion_tokens"]) > _LONGER * len(best)
        ]
        for other in dict.fromkeys(map(tuple, rejected)):
            yield {"trunk_tokens": list(trunk), "chosen_tokens": best, "rejected_tokens": list(other)}


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cold-start", default="")
    parser.add_argument("--length-weight", type=float, default=0.1)
    parser.add_argument("--shorten", choices=("rl", "rl_length"), default="rl")
    parser.add_argument("--cold-steps", type=count, default=300)
    parser.add_argument("--sft-steps", type=count, default=40)
    parser.add_argument("--dpo-steps", type=count, default=20)
    parser.add_argument("--dpo-rate", type=float, default=1e-4)
    parser.add_argument("--batches", type=count, default=8)
    args, config, is_tiny = parse_recipe(
        argv, parser, _TINY, sets=("--reward.terms", *map(flag_of, (*_OBJECTIVE, _WINDOW)))
    )
    if is_tiny:
        config = on_puzzles(config)
    else:
        need_file(args.cold_start, "--cold-start", "long chains of thought, with which the recipe begins")
    judge = Judge(
        config=with_values(config, {"reward.terms": (right_by(config),)}), split="determined" if is_tiny else "all",
        title="Kimi k1.5, step by step",
        about="Long chains of thought, RL with Kimi's objective and length reward, and four ways to shorten the "
        "chains (arXiv:2501.12599).",
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
