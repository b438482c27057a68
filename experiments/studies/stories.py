"""Can rewards without a verifier teach writing by criteria? Stories that are judged by rule, which no reward sees.

python -m experiments.studies.stories --directory runs/stories --out docs/results/stories.json [--seeds 0 1 2]
    [--arms rubric self_evaluation ...] [--section.field VALUE ...]

A small policy learns to write stories of mixed quality, to list the criteria that a story meets, to score it, and to
choose the better of two (`rpt_jax/data/stories.py`). Then each arm continues from that policy:

    rubric            how likely the story makes the rubric, under the policy's moving average
    self_evaluation   the score of a frozen judge, the policy that RL started from
    self_praise       the score that the policy in training gives its own story
    candidate_choice  how often the policy in training chooses the story over others of its group, both orders; it also
                      learns to choose as the rubric's likelihood does
    frozen_choice     the same with a frozen judge, which learns nothing

Arms resume, and a finished arm is not run again. The script writes --out after each arm, prints Markdown tables, and
draws the points and each arm's own reward over steps.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from experiments.cli import run_script
from experiments.studies.is_it_the_reward import parse_study
from rpt_jax.analysis.reports.figures import subplots
from rpt_jax.config import Config, DataConfig, QuestionsConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.stories import RUBRIC, criteria_met, write_stories
from rpt_jax.session import run as run_and_report
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.run_directory import FINISHED, read_json, write_atomically

ARMS = {
    "rubric": {"reward.terms": ("rubric",)},
    "self_evaluation": {"reward.terms": ("self_evaluation",)},
    "self_praise": {"reward.terms": ("self_evaluation",), "reward.likelihood.judge": "current"},
    "candidate_choice": {
        "reward.terms": ("candidate_choice",), "reward.likelihood.judge": "current",
        "reward.likelihood.ranking_loss": 1.0,
    },
    "frozen_choice": {"reward.terms": ("candidate_choice",)},
}  # fmt: skip
# On top of tiny_worked; flags of the command line come after them.
SETTINGS = (
    "--run.num-steps", "60", "--run.no-control", "--rollout.num-trunks", "24", "--rollout.max-completion-tokens", "96",
    "--supervised.num-steps", "500", "--eval.every-steps", "15", "--eval.num-positions", "24",
    "--eval.final-num-positions", "24", "--eval.batch-trunks", "24",
)  # fmt: skip
# Tokens of a pair, which the warm start learns to judge.
LONGEST_EXAMPLE = 192


def base_config(config: Config, corpus: Path) -> Config:
    """Return the config of a seed's warm start, which reads the files of `write_stories`."""
    return replace(
        config,
        data=DataConfig(tokenizer=str(corpus / "tokenizer"), trunk_length=48),
        questions=QuestionsConfig(
            path=str(corpus / "questions.jsonl"), heldout_path=str(corpus / "heldout.jsonl"), template="none"
        ),
        supervised=replace(config.supervised, path=str(corpus / "warm_start.jsonl")),
    )


def warm_start(config: Config, directory: Path) -> Config:
    """Make the corpus and run the warm start of a seed, once; return the config of the arms."""
    corpus, start, seed = directory / "corpus", directory / "cold_start", config.run.seed
    if not (corpus / "tokenizer" / "tokenizer.json").exists():
        supervised = config.supervised
        write_stories(corpus, seed=seed, num_examples=supervised.num_steps * supervised.batch_size)
    base = base_config(config, corpus)
    if not (start / FINISHED).exists():
        own = {"run.directory": str(start), "run.num_steps": 0, "reward.terms": ("rubric",)}
        run_stages(with_values(base, own | {"rollout.max_completion_tokens": LONGEST_EXAMPLE}))
    return with_values(base, {"policy.path": str(start), "supervised.num_steps": 0})


def run_arm(config: Config, directory: Path, arm: str) -> dict:
    """Run one arm and return its figures at every evaluation."""
    path = directory / arm
    if not (path / FINISHED).exists():
        run_and_report(with_values(config, ARMS[arm] | {"run.directory": str(path)}))
    found: dict[str, list] = {}
    for file in sorted((path / "completions").glob("evaluation_*.parquet")):
        table = pq.read_table(file, columns=["style", "position_id", "completion", "reward", "tokens", "truncated"])
        rows = [row for row in table.to_pylist() if row["style"] == "sampled"]
        for name, value in figures_of(rows).items():
            found.setdefault(name, []).append(value)
        found.setdefault("step", []).append(int(file.stem.removeprefix("evaluation_")))
    return found


def figures_of(rows: list[dict]) -> dict:
    """Return the means over sampled stories, with standard errors over prompts, and the rank correlation of points."""
    met = np.array([criteria_met(row["completion"]) for row in rows], float)
    points, rewards = met.sum(1), np.array([row["reward"] for row in rows])
    prompts = np.array([row["position_id"] for row in rows])
    by_prompt = np.array([points[prompts == i].mean() for i in np.unique(prompts)])
    reward_by_prompt = np.array([rewards[prompts == i].mean() for i in np.unique(prompts)])
    return {
        "points": [points.mean(), by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))],
        "reward": [rewards.mean(), reward_by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))],
        "criteria": met.mean(0).tolist(),
        "correlation": rank_correlation(points, rewards),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "distinct": len({row["completion"] for row in rows}) / len(rows),
    }


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation; ties share their mean rank; 0 if one side is constant."""
    ranks = [_ranks(x), _ranks(y)]
    return 0.0 if min(r.std() for r in ranks) == 0 else float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def table(found: dict) -> str:
    """Return a Markdown table, one row per arm; a cell has the seeds' values."""
    titles = ["points, start", "points, end", "own reward, start", "own reward, end", *RUBRIC, "tokens", "distinct"]
    lines = [f"| arm | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for arm in ARMS:
        results = [of[arm] for of in found.values() if arm in of]
        if results:
            columns = [
                *([r[name][place] for r in results] for name in ("points", "reward") for place in (0, -1)),
                *([[r["criteria"][-1][i], None] for r in results] for i in range(len(RUBRIC))),
                *([[r[name][-1], None] for r in results] for name in ("tokens", "distinct")),
            ]
            lines.append(f"| {arm} | {' | '.join(map(_cell, columns))} |")
    return "\n".join(lines)


def correlations(found: dict) -> str:
    """Return a Markdown table of the rank correlation of reward and points on the start policy's own stories."""
    lines = ["| reward | rank correlation with points, before RL |", "|---|---|"]
    for arm in ARMS:
        values = [of[arm]["correlation"][0] for of in found.values() if arm in of]
        if values:
            lines.append(f"| {arm} | {' / '.join(f'{v:.2f}' for v in values)} |")
    return "\n".join(lines)


def _cell(values: list) -> str:
    text, errors = " / ".join(f"{value:.2f}" for value, _ in values), [e for _, e in values if e is not None]
    return text + (f" ±{max(errors):.2f}" if errors else "")


def plot(found: dict):
    """Draw points and own reward over steps, the mean of the seeds; thin lines are seeds."""
    figure, axes = subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    for axis, name, title in zip(axes, ("points", "reward"), ("points by rule, of 4", "own reward")):
        for number, arm in enumerate(arm for arm in ARMS if any(arm in of for of in found.values())):
            curves = [np.array(of[arm][name])[:, 0] for of in found.values() if arm in of]
            steps = next(of[arm]["step"] for of in found.values() if arm in of)
            for curve in curves:
                axis.plot(steps, curve, color=f"C{number}", lw=0.6, alpha=0.5)
            axis.plot(steps, np.mean(curves, axis=0), "-o", ms=3, color=f"C{number}", label=arm)
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def main(argv: list[str]) -> None:
    """Run the arms of every seed, then print the tables and draw the picture."""
    args, config = parse_study(argv, list(ARMS), [], SETTINGS)
    found = read_json(args.out) if args.out.exists() else {}
    for seed in args.seeds:
        directory, of_seed = args.directory / f"seed{seed}", found.setdefault(str(seed), {})
        missing = [arm for arm in args.arms if arm not in of_seed]
        if missing:
            begun = warm_start(replace(config, run=replace(config.run, seed=seed)), directory)
        for arm in missing:
            of_seed[arm] = run_arm(begun, directory, arm)
            gc.collect()
            write_atomically(args.out, json.dumps(found))
    print(correlations(found) + "\n\n" + table(found))
    plot(found).savefig(args.out.with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_script(main)
