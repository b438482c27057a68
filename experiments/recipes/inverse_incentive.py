"""A judge that is trained on scored texts becomes the reward of a writer; then both learn together.

python -m experiments.recipes.inverse_incentive [--run.seed N] [--run.directory runs/inverse_incentive]   # tiny form
python -m experiments.recipes.inverse_incentive --preset questions --policy.path DIR --questions.path prompts.jsonl
    --cold-start scored.jsonl [--section.field VALUE ...]

    judge      SFT on texts with scores, and pairs with the better one's number (--cold-start, as supervised.path)
    frozen     RL on the score that this judge gives, which does not change
    together   RL on candidate choice: the policy in training chooses between its own texts, and learns to choose as
               the rubric's likelihood does (ranking loss), so writer and judge both move

One policy is writer and judge. The tiny form writes social stories (`rpt_jax/data/stories.py`), whose points are
counted by rule, which no reward sees. Every policy is judged on the same held-out prompts: points, and judge_accuracy,
the share of pairs of stories that its expected scores put in the order of their points. report.html in the run
directory follows both. After an interruption, run the same command again.
"""

import argparse
import random
from pathlib import Path

import numpy as np

from experiments.cli import run_script
from experiments.recipes.common import count, need_file, parse_recipe, rl_step, run_followed, supervised_step
from experiments.recipes.judging import Judge
from experiments.studies.stories import LONGEST_EXAMPLE, SETTINGS, base_config
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.stories import SCORE, criteria_met, make_story, write_stories
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import several_completions
from rpt_jax.tokenizer import THINK_CLOSE
from rpt_jax.train.pipeline import Files, Recipe
from rpt_jax.train.run import Run

_SCORES = ("1", "2", "3", "4", "5")
# Stories of the judge's accuracy.
_NUM_JUDGED = 192


def recipe(config: Config, args: argparse.Namespace, *, is_tiny: bool) -> Recipe:
    """Return the steps; the directory of the config is the recipe's."""
    directory, cold, steps = Path(config.run.directory), args.cold_start, []
    start = supervised_step(config, cold, args.cold_steps)
    if is_tiny:
        corpus, supervised = directory / "corpus", config.supervised
        num_examples = supervised.num_steps * supervised.batch_size
        steps = [("corpus", Files(write_stories, {"seed": config.run.seed, "num_examples": num_examples}))]
        # From nothing: the warm start's optimizer, and rows that hold a pair.
        own = {"run.num_steps": 0, "rollout.max_completion_tokens": LONGEST_EXAMPLE, "reward.terms": ("rubric",)}
        start = with_values(base_config(config, corpus), own)
    policy = with_values(config, {"policy.path": ""})
    choices = {
        "reward.terms": ("candidate_choice",), "reward.likelihood.judge": "current",
        "reward.likelihood.ranking_loss": args.ranking_loss,
    }  # fmt: skip
    return [
        *steps,
        ("judge", start),
        ("frozen", rl_step(policy, {"reward.terms": ("self_evaluation",), "reward.likelihood.judge": "start"})),
        ("together", rl_step(policy, choices)),
    ]


def points(row: dict) -> float:
    """Return how many of the four criteria a story meets, by rule."""
    return float(sum(criteria_met(row["completion"])))


def judge_accuracy(run: Run, params) -> dict:
    """Return the share of pairs of held-out stories that expected scores put in the right order; ties count half."""
    rng, source, encode = random.Random(0), run.domain.held_out, run.tokenizer.encode_continuation
    met, tokens = [], []
    chosen = [rng.randrange(len(source.prompts)) for _ in range(_NUM_JUDGED)]
    for _ in chosen:
        story = make_story(rng, "library", "my sister")
        met.append(sum(criteria_met(story)))
        tokens.append([*encode(THINK_CLOSE + story), *encode(SCORE)])
    width = -(-(max(map(len, tokens)) + 1) // 16) * 16
    expected = []
    for first in range(0, _NUM_JUDGED, 24):
        some = range(first, min(_NUM_JUDGED, first + 24))
        trunks, cuts = np.zeros((len(some), source.trunk_length), np.int32), np.zeros(len(some), np.int32)
        rows = np.zeros((len(some), len(_SCORES), width), np.int32)
        mask = np.zeros(rows.shape, bool)
        for u, i in enumerate(some):
            prompt, given = source.prompts[chosen[i]], tokens[i]
            trunks[u, : len(prompt)], cuts[u] = prompt, len(prompt)
            for r, label in enumerate(_SCORES):
                rows[u, r, : len(given) + 1], mask[u, r, : len(given) + 1] = [*given, *encode(label)], True
        sequences = several_completions(trunks, cuts, source.template.tail, rows, mask)
        found = to_host(score(run.config.model, params, shard_batch(run.mesh, sequences), temperature=1.0))
        last = np.stack([found[u, :, len(tokens[i])] for u, i in enumerate(some)])
        probabilities = np.exp(last - last.max(-1, keepdims=True))
        expected += list(probabilities @ np.arange(1, 6) / probabilities.sum(-1))
    return mean_with_error(pair_accuracy(np.array(met), np.array(expected)))


def pair_accuracy(truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Return for each item the share of items of another truth that the guess orders rightly against it."""
    differs = truth[:, None] != truth[None]
    order = np.sign(truth[:, None] - truth[None]) * np.sign(guess[:, None] - guess[None])
    right = np.where(differs, (1 + order) / 2, 0.0).sum(1) / np.maximum(1, differs.sum(1))
    return right[differs.any(1)]


def main(argv: list[str]) -> None:
    """Run the recipe and write its page."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cold-start", default="")
    parser.add_argument("--cold-steps", type=count, default=200)
    parser.add_argument("--ranking-loss", type=float, default=1.0)
    tiny = ("--run.directory", "runs/inverse_incentive", *SETTINGS, "--run.num-steps", "40", "--run.shapes", "few")
    args, config, is_tiny = parse_recipe(
        argv, parser, tiny,
        sets=("--reward.terms", "--reward.likelihood.judge", "--reward.likelihood.ranking-loss"),
        not_tiny=("--cold-start", "--cold-steps"),
    )  # fmt: skip
    if is_tiny:
        config = with_values(
            base_config(config, Path(config.run.directory) / "corpus"), {"data.cache": config.data.cache}
        )
    else:
        need_file(args.cold_start, "--cold-start", "the texts with scores that the judge learns")
    measures = {"measures": {"points": points}, "of_policies": {"judge_accuracy": judge_accuracy}} if is_tiny else {}
    judge = Judge(
        config=with_values(config, {"reward.terms": ("rubric",)}), split="all", has_answers=False,
        title="Judge and writer",
        about="A judge trained on scored texts rewards a writer, first frozen, then learning with it.", **measures,
    )  # fmt: skip
    run_followed(recipe(config, args, is_tiny=is_tiny), config, judge)


if __name__ == "__main__":
    run_script(main)
