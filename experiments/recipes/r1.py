"""DeepSeek-R1's recipe (arXiv:2501.12948): cold start, RL for reasoning, rejection sampling, SFT, RL on everything.

python -m experiments.recipes.r1 [--run.seed N] [--run.directory runs/r1]             # tiny form, 2 CPU cores
python -m experiments.recipes.r1 --preset text --policy.path DIR --data.path my.txt --cold-start thoughts.jsonl
python -m experiments.recipes.r1 --preset questions --policy.path DIR --questions.path q.jsonl --cold-start t.jsonl
    [--zero] [--without-language] [--language-weight 0.5] [--section.field VALUE ...]

    cold_start   SFT of the base policy on a few worked thoughts (--cold-start, a file as supervised.path)
    reasoning    RL with accuracy + 0.1 format + language consistency
    samples      rejection sampling: right, well-formed completions in the prompt's language; and plain texts
    sft          SFT of the base policy on them
    everything   RL with the same rewards, on positions of which 6 in 10 are unfiltered; or on the questions again

--zero runs R1-Zero next to it: RL with accuracy and format from the base policy. --without-language runs `reasoning`
without the language term as well. Both share the base policy. The tiny form makes its own base policy from puzzles told
in two scripts, whose thoughts mix them. Every policy is judged on the same held-out positions; report.html in the run
directory follows it through the steps. After an interruption, run the same command again.
"""

import argparse
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.cli import run_script
from experiments.recipes.common import (
    count,
    need_file,
    on_puzzles,
    parse_recipe,
    right_by,
    rl_step,
    run_followed,
    supervised_step,
    tiny_base,
    write_accepted,
)
from experiments.recipes.judging import Judge
from experiments.recipes.puzzles import write_two_scripts
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.tokenizer import THINK_CLOSE
from rpt_jax.train.pipeline import Files, Recipe

_TINY = (
    "--run.directory", "runs/r1", "--run.num-steps", "80", "--supervised.num-steps", "600", "--run.shapes", "few",
    "--eval.every-steps", "80", "--eval.num-positions", "50", "--eval.final-num-positions", "400",
)  # fmt: skip
_TINY_COLD_STEPS, _TINY_SFT_STEPS = 30, 80


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory = Path(config.run.directory)
    accuracy, language = right_by(config), f"{args.language_weight}*language"
    base = config.policy.path
    steps: list = []
    if is_tiny:
        base = str(directory / "base")
        steps += tiny_base(config, write_two_scripts, {"num_train": 8000, "num_heldout": 1000, "num_cold": 200})
    config = replace(config, policy=replace(config.policy, path=""))
    from_base = {"policy.path": base}
    cold = args.cold_start or str(directory / "corpus" / "cold_start.jsonl")
    num_all = max(1, config.run.num_steps // 2)
    terms = (accuracy, "0.1*format", language)
    if args.zero:
        steps.append(("zero", rl_step(config, from_base | {"reward.terms": terms[:2]})))
    steps += [
        ("cold_start", supervised_step(config, cold, args.cold_steps, from_base)),
        ("reasoning", rl_step(config, {"reward.terms": terms})),
    ]
    if args.without_language:
        steps.append((
            "reasoning_without_language",
            rl_step(config, {"reward.terms": terms[:2], "policy.path": str(directory / "cold_start")}),
        ))  # fmt: skip
    wanted = {
        "run": str(directory / "reasoning"), "num_batches": args.batches, "per_prompt": 2,
        "num_texts": 0 if config.questions.path else args.texts,
        # Right, well-formed and in one script earns the sum of the weights; 0.02 allows for float32 and a stray letter.
        "min_reward": round(1.1 + args.language_weight - 0.02, 3),
    }  # fmt: skip
    examples = str(directory / "samples" / "examples.jsonl")
    return [
        *steps,
        ("samples", Files(write_accepted, wanted)),
        ("sft", supervised_step(config, examples, args.sft_steps, from_base)),
        (
            "everything",
            rl_step(config, {"reward.terms": terms, "positions.unfiltered_fraction": 0.6, "run.num_steps": num_all}),
        ),
    ]


def script_of(text: str) -> str:
    """Return the script of most letters of a text, such as LATIN; empty without letters."""
    scripts = [unicodedata.name(c, "OTHER").split()[0] for c in text if c.isalpha()]
    return max(set(scripts), key=scripts.count) if scripts else ""


def is_mixed(row: dict) -> float:
    """Return whether a thought has a letter in another script than its prompt's; NaN without letters."""
    thought = row["completion"].split(THINK_CLOSE)[0]
    letters = [c for c in thought if c.isalpha()]
    asked = script_of(row["context"])
    return float(any(script_of(c) != asked for c in letters)) if letters and asked else np.nan


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cold-start", default="")
    parser.add_argument("--zero", action="store_true")
    parser.add_argument("--without-language", action="store_true")
    parser.add_argument("--language-weight", type=float, default=0.5)
    parser.add_argument("--cold-steps", type=count, default=_TINY_COLD_STEPS)
    parser.add_argument("--sft-steps", type=count, default=_TINY_SFT_STEPS)
    parser.add_argument("--batches", type=count, default=12)
    parser.add_argument("--texts", type=count, default=400)
    args, config, is_tiny = parse_recipe(
        argv, parser, _TINY, sets=("--reward.terms", "--positions.unfiltered-fraction")
    )
    if is_tiny:
        config = on_puzzles(config)
    else:
        need_file(args.cold_start, "--cold-start", "a few worked thoughts, with which R1 begins")
    judged = with_values(config, {"reward.terms": (right_by(config),)})
    judge = Judge(
        config=judged, split="determined" if is_tiny else "all", measures={"mixed_scripts": is_mixed},
        title="R1, step by step",
        about="A cold start, RL for reasoning, rejection sampling, SFT and RL on everything (arXiv:2501.12948).",
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
