"""Evaluate a Hugging Face model on questions, by category: with thinking, and directly for multiple choice.

python -m experiments.zero_shot --policy.path DIR --questions.path mmlu_pro_test.jsonl [--eval.num-positions 200]
    [--data.chat] [--eval.num-samples 8] [--rollout.max-completion-tokens 4096] [--json figures.json]

It draws up to --eval.num-positions questions overall, and up to that many per category (arXiv:2506.08007 Table 3).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from experiments.cli import describe, parse_config, run_script
from experiments.presets import PRESETS
from rpt_jax.data.questions import make_question_template, read_questions
from rpt_jax.errors import ConfigError
from rpt_jax.evals.questions import QuestionEvaluator, category_splits, verification
from rpt_jax.rewards.base import Reward
from rpt_jax.rewards.catalog import make_reward
from rpt_jax.scoring.requests import Scorer
from rpt_jax.train.domains import question_source
from rpt_jax.train.run import load_policy


def main(argv: list[str]) -> None:
    """Evaluate the model, print the table and write the JSON."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path)
    args, rest = parser.parse_known_args(argv)
    config, dry_run = parse_config(rest, default_preset="questions")
    if not (config.policy.path and config.questions.path):
        raise ConfigError(
            "the model or the questions are missing; zero_shot requires both. Set --policy.path and --questions.path."
        )
    is_default = config.reward == PRESETS["questions"].reward
    if is_default and all(q.choices for q in read_questions(config.questions.path)):
        config = replace(config, reward=replace(config.reward, terms=("choice",)))
    if dry_run:
        print(describe(config))
        return
    model = load_policy(config, lambda t, resolved: make_question_template(t, resolved.questions, resolved.data))
    source = question_source(config.questions.path, "evaluation", model.config, model.tokenizer)
    scorer = Scorer(model.config.model, model.tokenizer, int(model.tokenizer.bos_id is not None))

    def make(terms: tuple[str, ...]) -> Reward:
        return make_reward(
            replace(config.reward, terms=terms), model.tokenizer, source.columns, scorer, kind="questions"
        )

    evaluator = QuestionEvaluator(
        config=model.config,
        mesh=model.mesh,
        tokenizer=model.tokenizer,
        source=source,
        splits=category_splits(source.questions, config.eval.num_positions, seed=config.run.seed),
        reward=make(config.reward.terms),
        **verification(config.reward, source, make),
    )
    figures = evaluator.evaluate(model.params)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


def table(figures: dict) -> str:
    """Return a text table with one line per category: the number of questions, and value ± standard error per metric.

    Args:
        figures: {category: {metric: {"value", "standard_error", "n"}}}.
    """
    metrics = list(dict.fromkeys(m for cells in figures.values() for m in cells))
    width = max(len(name) for name in figures) + 2
    lines = [" " * width + f"{'n':>6}" + "".join(f"{m:>16}" for m in metrics)]
    for name, cells in figures.items():
        values = (f"{cells[m]['value']:.3f} ± {cells[m]['standard_error']:.3f}" if m in cells else "–" for m in metrics)
        n = next(iter(cells.values()))["n"]
        lines.append(f"{name:<{width}}{n:>6}" + "".join(f"{v:>16}" for v in values))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
