"""How can RPT start from a policy that does not know the response format? Four ways, with figures.

python -m experiments.recipes.base_start [--run.seed N] [--run.directory runs/base_start]      # tiny form, 2 CPU cores
python -m experiments.recipes.base_start --preset text --policy.path DIR --data.path my.txt --cold-start few.jsonl
    [--formatted 0.02] [--section.field VALUE ...]

    straight            RPT from the base policy
    random_positions    half of the steps on random positions, then RPT on the selected ones (PretrainZero's warm-up)
    format_first        half of the steps on the reward format alone, then RPT
    cold_start          SFT on a handful of examples, then RPT

The tiny form makes its own base policy from documents and exercise sheets, of which a share (--formatted) is in the
response format; 0: it has never seen one. Every policy is judged on the same held-out positions; report.html in the run
directory has all. After an interruption, run the same command again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

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
)
from experiments.recipes.judging import Judge
from experiments.recipes.puzzles import write_without_format
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError
from rpt_jax.train.pipeline import Recipe

_TINY = (
    "--run.directory", "runs/base_start", "--run.num-steps", "80", "--supervised.num-steps", "400", "--run.shapes",
    "few", "--eval.every-steps", "80", "--eval.num-positions", "50", "--eval.final-num-positions", "400",
)  # fmt: skip


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory, base, cold, steps = Path(config.run.directory), config.policy.path, args.cold_start, []
    if is_tiny:
        base, cold = str(directory / "base"), str(directory / "corpus" / "cold_start.jsonl")
        sizes = {"num_train": 8000, "num_heldout": 1000, "num_cold": 16, "formatted": args.formatted}
        steps = tiny_base(config, write_without_format, sizes)
    config = replace(config, policy=replace(config.policy, path=""))
    right, whole = right_by(config), config.run.num_steps
    from_base = {"policy.path": base, "reward.terms": (right,)}
    half = {"run.num_steps": max(1, whole // 2), "reward.terms": (right,)}
    return [
        *steps,
        ("straight", rl_step(config, from_base)),
        ("random_positions", rl_step(config, from_base | half | {"positions.selector": "random"})),
        ("after_random_positions", rl_step(config, half)),
        ("format_first", rl_step(config, from_base | half | {"reward.terms": ("format",)})),
        ("after_format_first", rl_step(config, half)),
        ("cold_start", supervised_step(config, cold, args.cold_steps, {"policy.path": base})),
        ("after_cold_start", rl_step(config, {"reward.terms": (right,)})),
    ]


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cold-start", default="")
    parser.add_argument("--cold-steps", type=count, default=10)
    parser.add_argument("--formatted", type=float, default=0.02)
    args, config, is_tiny = parse_recipe(
        argv, parser, _TINY, sets=("--reward.terms",), not_tiny=("--cold-start",), only_tiny=("--formatted",)
    )
    if not 0 <= args.formatted <= 1:
        raise ConfigError(f"--formatted {args.formatted}; it must be a share, 0 to 1. Correct it.")
    if config.questions.path:
        raise ConfigError(
            "--questions.path; one way selects other positions, and questions have none. Set --data.path."
        )
    if is_tiny:
        config = on_puzzles(config)
    else:
        need_file(args.cold_start, "--cold-start", "the handful of examples of one of the four ways")
    judge = Judge(
        config=with_values(config, {"reward.terms": (right_by(config),)}), split="determined" if is_tiny else "all",
        title="RPT from a base policy",
        about="A policy that hardly knows the response format begins RPT directly, on random positions, with the "
        "format as its first reward, or after a cold start on a handful of examples.",
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
