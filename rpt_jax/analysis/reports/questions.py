"""Report of a run of RL on questions: plots and one self-contained report.html."""

import base64
import html
import json
from pathlib import Path

from rpt_jax.analysis.reports.browser import completion_browser
from rpt_jax.analysis.reports.figures import save_figures, subplots
from rpt_jax.analysis.reports.headline import Difference, question_headline, training_summary
from rpt_jax.analysis.reports.run import (
    PAGE_STYLE,
    cell,
    plot_training,
    read_evaluations,
    series,
)
from rpt_jax.train.run_directory import read_records, write_atomically

# What a metric is called in the table; others keep their names.
_WORDS = {
    "sampled": "sampled answers right",
    "greedy": "greedy answers right",
    "direct": "most likely letter right, without thinking",
    "thought_tokens": "tokens of a completion",
    "truncated": "cut off by the limit",
    "no_prediction": "no answer in a box",
}


def write_report(directory: Path) -> Path:
    """Write results.json, plots/*.png and report.html into `directory`, and return the path of the page.

    Raises:
        CheckpointError: see `read_evaluations`.
    """
    results = read_evaluations(directory)
    write_atomically(directory / "results.json", json.dumps(results, indent=2))
    steps = [r for r in read_records(directory) if r["stage"] == "rpt"]
    pictures = save_figures(directory, {"learning": _plot_learning(results), "training": plot_training(steps, "RL")})
    page = directory / "report.html"
    write_atomically(page, _page(directory, results, steps, pictures))
    return page


def _plot_learning(results: dict):
    figure, (left, right) = subplots(1, 2, figsize=(11, 3.8))
    for axis, metrics in (
        (left, (("sampled", "-o"), ("greedy", "--s"), ("direct", ":"), ("no_prediction", "-."))),
        (right, (("reward", "-o"),)),
    ):
        for metric, style in metrics:
            value, error = series(results["curve"], "all", metric)
            if len(value):
                steps, label = results["steps"][-len(value) :], _WORDS.get(metric, metric)
                axis.errorbar(steps, value, 2 * error, fmt=style, capsize=2, label=label, ms=4)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylim(-0.02, 1.02)
    n = results["curve"][-1]["all"]["sampled"]["n"]
    figure.suptitle(f"Held-out questions (n={n}; bars: two standard errors)")
    return figure


def _table(results: dict) -> str:
    """Return the table of all questions by metric, and one by category if there are several."""
    before, after = results["before"], results["after"]
    rows = [
        f"<tr><th>{html.escape(_WORDS.get(metric, metric))}</th>{_cells(before['all'].get(metric), figures)}</tr>"
        for metric, figures in after["all"].items()
    ]
    head = "<th>before</th><th>after</th><th>change</th>"
    tables = f"<table><tr><th>all {after['all']['sampled']['n']} questions</th>{head}</tr>{''.join(rows)}</table>"
    categories = [split for split in after if split != "all"]
    if categories:
        rows = [
            f"<tr><th>{html.escape(c)}</th><td>{after[c]['sampled']['n']}</td>"
            f"{_cells(before.get(c, {}).get('sampled'), after[c]['sampled'])}</tr>"
            for c in categories
        ]
        tables += f"<table><tr><th>sampled answers by category</th><th>n</th>{head}</tr>{''.join(rows)}</table>"
    return tables


def _cells(before: dict | None, after: dict) -> str:
    change = f"<td>{Difference.of(after, before)}</td>" if before else "<td>–</td>"
    return cell(before) + cell(after) + change


def _page(directory: Path, results: dict, steps: list[dict], pictures: dict[str, Path]) -> str:
    def picture(name: str) -> str:
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        return f"<img alt='{name}' src='data:image/png;base64,{data}'>"

    config, corpus = results["config"], results["corpus"]
    function = config["reward"]["function"]
    judge = "a Python function" if function.endswith(".pickle") else function or " + ".join(config["reward"]["terms"])
    direct = "<b>direct</b>: the most likely letter without thinking." if "direct" in results["after"]["all"] else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>RL on questions</title>
<style>{PAGE_STYLE}</style>
<h1>Reinforcement learning on questions: results of this run</h1>
<p class="lead">{" ".join(map(html.escape, question_headline(results)))}</p>
<p>{results["steps"][-1]} steps on {corpus["training"]["questions"]:,} questions,
{config["rollout"]["group_size"]} rollouts each, graded by {html.escape(judge)}. {training_summary(steps)}</p>
{picture("learning")}{_table(results)}
<p>± is one standard error over questions. <b>sampled</b>: mean of {config["eval"]["num_samples"]} completions;
<b>greedy</b>: one at temperature 0. {direct} A right answer equals an accepted one, whatever the reward is. The errors
of changes are those of two independent sets of questions, so they are too large for the same questions.</p>
<h2>How training went</h2>{picture("training")}
<h2>Thoughts and answers</h2>{completion_browser(directory)}
<h2>The run</h2><p>seed {config["run"]["seed"]} · {html.escape(results["versions"]["devices"])} · code
{html.escape(results["versions"]["commit"][:12])}</p>
<details><summary>configuration</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details></html>
"""
