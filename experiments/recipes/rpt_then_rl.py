"""Does RPT help later RL? The same RL on questions from four starts (arXiv:2506.08007 Table 2).

python -m experiments.recipes.rpt_then_rl [--run.seed N] [--run.directory runs/rpt_then_rl]   # tiny form, 2 CPU cores
python -m experiments.recipes.rpt_then_rl --preset text --policy.path DIR --data.path my.txt --questions q.jsonl
    [--heldout-questions h.jsonl] [--mixed thoughts.jsonl] [--rl-steps 100] [--section.field VALUE ...]

    base         the policy as it is; the tiny form makes one from puzzles
    rpt          RPT on documents
    next_token   next-token training on the same documents, for RPT's FLOPs
    mixed        Mixed SFT: documents and worked thoughts (--mixed) in equal parts, for RPT's FLOPs

Then rl_base, rl_rpt, rl_next_token and rl_mixed: RL on the questions from each, for right answers (--reward.terms is
RPT's). Every policy is judged on the same
held-out questions; report.html in the run directory has all. After an interruption, run the same command again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from experiments.cli import run_script
from experiments.recipes.common import continue_on, count, on_puzzles, parse_recipe, rl_step, run_followed, tiny_base
from experiments.recipes.judging import Judge
from experiments.recipes.puzzles import write_with_questions
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.readers import has_files
from rpt_jax.errors import ConfigError
from rpt_jax.train.pipeline import Files, Recipe

_TINY = (
    "--run.directory", "runs/rpt_then_rl", "--run.num-steps", "80", "--supervised.num-steps", "500",
    "--run.shapes", "few", "--data.trunk-length", "80", "--eval.every-steps", "80", "--eval.num-positions", "50",
    "--eval.final-num-positions", "400", "--eval.num-samples", "32",
)  # fmt: skip


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory, base, mixed = Path(config.run.directory), config.policy.path, args.mixed
    steps: list = []
    if is_tiny:
        base, mixed = str(directory / "base"), str(directory / "corpus" / "base.jsonl")
        steps += tiny_base(config, write_with_questions, {"num_train": 8000, "num_heldout": 800, "num_questions": 4000})
    config = replace(config, policy=replace(config.policy, path=base))
    rpt, starts = str(directory / "rpt"), {"base": base, "rpt": str(directory / "rpt")}
    steps += [
        ("rpt", rl_step(config)),
        ("next_token", Files(continue_on, {"run": rpt, "examples": "documents"})),
    ]
    starts["next_token"] = str(directory / "next_token")
    if mixed:
        steps.append(("mixed", Files(continue_on, {"run": rpt, "examples": mixed})))
        starts["mixed"] = str(directory / "mixed")
    on_questions = with_questions(config, args, is_tiny=is_tiny)
    return steps + [
        (f"rl_{name}", rl_step(on_questions, {"policy.path": path, "run.num_steps": args.rl_steps}))
        for name, path in starts.items()
    ]


def with_questions(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Config:
    """Return the config with the questions instead of the documents."""
    corpus = Path(config.run.directory) / "corpus"
    questions = str(corpus / "questions.jsonl") if is_tiny else args.questions
    heldout = str(corpus / "heldout_questions.jsonl") if is_tiny else args.heldout_questions
    of_tiny = {"questions.template": "none", "reward.terms": ("exact",)} if is_tiny else {"reward.terms": ("math",)}
    return with_values(
        config,
        {
            "data.path": "", "data.mixture": (), "data.heldout_path": "", "questions.path": questions,
            "questions.heldout_path": heldout, "rollout.prompts_per_trunk": 1,
        } | of_tiny,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--questions", default="")
    parser.add_argument("--heldout-questions", default="")
    parser.add_argument("--mixed", default="")
    parser.add_argument("--rl-steps", type=count, default=20)
    args, config, is_tiny = parse_recipe(
        argv, parser, _TINY, sets=("--questions.path", "--questions.heldout-path"),
        not_tiny=("--questions", "--heldout-questions", "--mixed"),
    )  # fmt: skip
    if not (is_tiny or args.questions):
        raise ConfigError("no --questions for this policy; the recipe ends with RL on them. Set --questions.")
    if args.mixed and not has_files(args.mixed):
        raise ConfigError(f"--mixed {args.mixed} matches no file; it must hold worked thoughts. Correct --mixed.")
    if is_tiny:
        config = on_puzzles(config)
    judge = Judge(
        config=with_questions(config, args, is_tiny=is_tiny), split="all", title="RPT, then RL on questions",
        about="The same RL on questions from a base policy, after RPT, after next-token training and after Mixed SFT "
        "with RPT's compute (arXiv:2506.08007, Table 2).",
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
