"""Report of a run of RL on questions: plots and one self-contained report.html."""

import base64
import html
import json
from pathlib import Path

from rpt_jax.analysis.reports.figures import save_figures, subplots
from rpt_jax.analysis.reports.headline import question_headline, training_summary
from rpt_jax.analysis.reports.run import (
    PAGE_STYLE,
    completion_examples,
    plot_training,
    read_evaluations,
    series,
)
from rpt_jax.train.run_directory import read_records, write_atomically


def write_report(directory: Path) -> Path:
    """Write results.json, plots/*.png and report.html into `directory`, and return the path of the page.

    Raises:
        CheckpointError: see `read_evaluations`.
    """
    results = read_evaluations(directory)
    write_atomically(directory / "results.json", json.dumps(results, indent=2))
    steps = [r for r in read_records(directory) if r["stage"] == "rpt"]
    pictures = save_figures(directory, {"learning": _plot_learning(results), "training": plot_training(steps)})
    page = directory / "report.html"
    write_atomically(page, _page(directory, results, steps, pictures))
    return page


def _plot_learning(results: dict):
    figure, axis = subplots(figsize=(6.4, 4))
    for metric, style in (("sampled", "-o"), ("greedy", "--s"), ("direct", ":"), ("no_prediction", "-.")):
        value, error = series(results["curve"], "all", metric)
        if len(value):
            axis.errorbar(results["steps"][-len(value) :], value, 2 * error, fmt=style, capsize=2, label=metric, ms=4)
    axis.set_xlabel("RL step")
    axis.set_ylim(0, 1.02)
    axis.set_title(f"Held-out questions (n={results['curve'][-1]['all']['sampled']['n']}; bars: two standard errors)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _table(results: dict) -> str:
    metrics = [m for m in results["after"]["all"] if m not in ("truncated", "no_prediction")]
    head = "".join(f"<th>{html.escape(m)}: before</th><th>after</th>" for m in metrics)
    rows = []
    for split, after in results["after"].items():
        cells = ""
        for metric in metrics:
            for figures in (results["before"].get(split, {}), after):
                f = figures.get(metric)
                cells += (
                    "<td>–</td>"
                    if f is None
                    else f"<td>{f['value']:.3f} <small>± {f['standard_error']:.3f}</small></td>"
                )
        rows.append(f"<tr><th>{html.escape(split)}</th><td>{after['sampled']['n']}</td>{cells}</tr>")
    return f"<table><tr><th>category</th><th>n</th>{head}</tr>{''.join(rows)}</table>"


def _page(directory: Path, results: dict, steps: list[dict], pictures: dict[str, Path]) -> str:
    def picture(name: str) -> str:
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        return f"<img alt='{name}' src='data:image/png;base64,{data}'>"

    config, corpus = results["config"], results["corpus"]
    judge = config["reward"]["function"] or " + ".join(config["reward"]["terms"])
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>RL on questions</title>
<style>{PAGE_STYLE}</style>
<h1>Reinforcement learning on questions: results of this run</h1>
<p class="lead">{" ".join(map(html.escape, question_headline(results)))}</p>
<p>{results["steps"][-1]} steps on {corpus["training"]["questions"]:,} questions,
{config["rollout"]["group_size"]} rollouts each, graded by {html.escape(judge)}. {training_summary(steps)}</p>
{picture("learning")}{_table(results)}
<p>± is one standard error over questions. <b>sampled</b>: mean of {config["eval"]["num_samples"]} thoughts;
<b>greedy</b>: one thought at temperature 0; <b>direct</b>: the most likely letter without thinking (multiple
choice only).</p>
<h2>How training went</h2>{picture("training")}
<h2>Thoughts from the last logged batch</h2>{completion_examples(directory)}
<h2>The run</h2><p>seed {config["run"]["seed"]} · {html.escape(results["versions"]["devices"])} · code
{html.escape(results["versions"]["commit"][:12])}</p>
<details><summary>configuration</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details></html>
"""
