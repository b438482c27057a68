"""Does the thought matter? Read a run's answers after its own thoughts, other thoughts, filler and none.

python -m experiments.studies.does_the_thought_matter --runs runs/a [runs/b ...] --out docs/results/thought.json
    [--eval.final-num-positions 200] [--eval.num-samples 4]

For each finished run on documents, the script evaluates the policy that RPT started from and the newest one. It writes
the figures to --out as each run ends, prints a Markdown table of the splits in --splits, and draws a picture beside
--out. Runs that --out already holds are not evaluated again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.cli import load_run, run_script
from rpt_jax.analysis.reports.figures import subplots
from rpt_jax.evals.next_token import difficulty_splits
from rpt_jax.evals.thoughts import CONDITIONS, OWN, ThoughtEvaluator
from rpt_jax.models.lora import join
from rpt_jax.train.progress import tracked
from rpt_jax.train.run import Run, newest_state, prepare
from rpt_jax.train.run_directory import read_json, write_atomically
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.warm_start import warm_start

METRICS = (
    ("mixture_correct", "accuracy of the mixture"),
    ("logprob", "log p(true token), nats"),
    ("own_minus_logprob", "own minus this, nats"),
    ("calibration_error", "calibration error"),
)


def evaluate(run: Run) -> dict:
    """Return {"before", "after": {split: {condition: figures}}} of a run, with its seed, step and versions."""
    start = warm_start(run)
    source = run.domain.heldout(run, start)
    settings = run.config.eval
    evaluator = ThoughtEvaluator(
        config=run.config,
        mesh=run.mesh,
        tokenizer=run.tokenizer,
        source=source,
        splits=difficulty_splits(
            source.table, run.domain.held_out, settings.difficulty_thresholds, settings.final_num_positions,
            seed=run.config.run.seed,
        ),
        scorer=run.make_scorer(),
        progress=tracked,
    )  # fmt: skip
    state, frozen, step = newest_state(run, start)
    return {
        "seed": run.config.run.seed,
        "step": step,
        "num_samples": settings.num_samples,
        "versions": read_json(run.directory.path / "versions.json"),
        "before": evaluator.evaluate(start),
        "after": evaluator.evaluate(join(frozen, state.params)),
    }


def table(runs: list[dict], splits: list[str]) -> str:
    """Return a Markdown table, one row per split, time and condition; a cell has the runs' values and the largest
    standard error over positions."""
    lines = [
        "| split (n) | policy | answer after | " + " | ".join(title for _, title in METRICS) + " |",
        "|---|---|---|" + "---|" * len(METRICS),
    ]
    for split in splits:
        n = " / ".join(str(r["before"][split][OWN]["logprob"]["n"]) for r in runs)
        for when in ("before", "after"):
            for condition in CONDITIONS:
                cells = [_cell([r[when][split][condition].get(name) for r in runs]) for name, _ in METRICS]
                lines.append(f"| {split} ({n}) | {when} RPT | {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figures: list[dict | None]) -> str:
    if None in figures:
        return "–"
    values = " / ".join(f"{f['value']:.3f}" for f in figures)
    return f"{values} ±{max(f['standard_error'] for f in figures):.3f}"


def plot(runs: list[dict], splits: list[str]):
    """Draw the mixture's accuracy and log-likelihood by condition, before and after; bars are means over the runs."""
    figure, axes = subplots(2, len(splits), figsize=(3.6 * len(splits), 6.4), squeeze=False, layout="constrained")
    x = np.arange(len(CONDITIONS))
    for column, split in enumerate(splits):
        for row, (metric, label) in enumerate(METRICS[:2]):
            axis = axes[row][column]
            for shift, when, color in ((-0.2, "before", "#9aa5b1"), (0.2, "after", "#1f6feb")):
                cells = [[r[when][split][c][metric] for r in runs] for c in CONDITIONS]
                height = [np.mean([f["value"] for f in of_runs]) for of_runs in cells]
                error = [2 * max(f["standard_error"] for f in of_runs) for of_runs in cells]
                axis.bar(x + shift, height, 0.38, yerr=error, capsize=2, color=color, label=f"{when} RPT")
                for i, of_runs in enumerate(cells):
                    axis.plot(np.full(len(of_runs), i + shift), [f["value"] for f in of_runs], "k.", ms=3)
            axis.set_xticks(x, CONDITIONS, rotation=35, ha="right", fontsize=8)
            axis.grid(alpha=0.3, axis="y")
            axis.set_title(split if row == 0 else "", fontsize=10)
            if column == 0:
                axis.set_ylabel(label)
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Answer by what stands in the thought (bars: two standard errors; dots: runs)")
    return figure


def main(argv: list[str]) -> None:
    """Evaluate the runs, write the figures, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="directories of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="figures, as JSON")
    parser.add_argument("--splits", nargs="+", default=["all", "settled", "easy", "hard"])
    args, flags = parser.parse_known_args(argv)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for directory in args.runs:
        if str(directory) not in found:
            run = fitted(prepare(load_run(directory, flags), read_only=True))
            found[str(directory)] = evaluate(run)
            write_atomically(args.out, json.dumps(found, indent=1))
    runs = [found[str(directory)] for directory in args.runs]
    splits = [split for split in args.splits if all(split in run["before"] for run in runs)]
    print(table(runs, splits))
    plot(runs, splits).savefig(args.out.with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_script(main)
