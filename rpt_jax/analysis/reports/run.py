"""Report of a run on documents: plots and one self-contained report.html that can be read without the code."""

import base64
import html
import json
from pathlib import Path

import numpy as np

from rpt_jax.analysis.reports.browser import completion_browser
from rpt_jax.analysis.reports.figures import save_figures, subplots
from rpt_jax.analysis.reports.headline import headline, training_summary
from rpt_jax.analysis.scaling import MIN_POINTS, fit_power_law
from rpt_jax.errors import CheckpointError, DataError
from rpt_jax.train.run_directory import read_config, read_json, read_records, write_atomically

_EXPLAIN = {
    "all": "every position of the held-out documents",
    "settled": "positions that the proxy model is sure of (entropy at most the easy threshold)",
    "easy": "entropy above the easy threshold; contains medium",
    "medium": "entropy above the medium threshold; contains hard",
    "hard": "entropy above the hard threshold",
}
_COLORS = {"before": "#9aa5b1", "after": "#1f6feb", "control": "#30363d"}


def read_evaluations(directory: Path) -> dict:
    """Return the settings of a run and its RL evaluations, every metric with n and standard error.

    Raises:
        CheckpointError: the directory has fewer than two evaluations.
    """
    evaluations = [r for r in read_records(directory) if r["stage"] == "evaluation"]
    if len(evaluations) < 2:
        raise CheckpointError(
            f"{directory} has {len(evaluations)} evaluation(s) of RL; a report needs at least two. Finish the "
            "run first."
        )
    return {
        "config": json.loads(read_config(directory, say=False).to_json()),
        "versions": json.loads((directory / "versions.json").read_text()),
        "corpus": json.loads((directory / "corpus.json").read_text()),
        "num_tasks": read_json(directory / "tasks.json")["tasks"] if (directory / "tasks.json").exists() else None,
        "steps": [r["step"] for r in evaluations],
        "flops": [r["flops"] for r in evaluations],
        "before": evaluations[0]["splits"],
        "after": evaluations[-1]["splits"],
        "curve": [r.get("curve", r["splits"]) for r in evaluations],  # the same positions or questions at every step
    }


def collect_results(directory: Path) -> dict:
    """Return all values of the report.

    Raises:
        CheckpointError: see `read_evaluations`.
    """
    control = [r for r in read_records(directory) if r["stage"] == "control_evaluation"]
    results = read_evaluations(directory) | {
        "control": control[-1]["splits"] if control and control[-1].get("final") else None,
        "control_flops": [r["flops"] for r in control],
        "control_curve": [r.get("curve", r["splits"]) for r in control],
        "scaling": {},
    }
    for split in results["after"]:
        evaluated = zip(results["flops"], results["curve"], strict=True)
        points = [(flops, c[split]["sampled_prefix"]["value"]) for flops, c in evaluated if flops > 0]
        if 0 < len(points) < MIN_POINTS:
            results["scaling"][split] = {"refused": f"{len(points)} evaluations of RL; a fit needs {MIN_POINTS}"}
            continue
        try:
            fit = fit_power_law(*zip(*points, strict=True)) if points else None
        except DataError as error:
            results["scaling"][split] = {"refused": str(error)}
            continue
        if fit:
            results["scaling"][split] = {
                "A": fit.A, "alpha": fit.alpha, "p_star": fit.p_star, "r2": fit.r2, "num_points": len(points),
                "doubt": fit.doubt,
            }  # fmt: skip
    return results


def write_report(directory: Path) -> Path:
    """Write results.json, plots/*.png and report.html into `directory`, and return the path of the page.

    Raises:
        CheckpointError: the directory has fewer than two evaluations.
    """
    results = collect_results(directory)
    steps = [r for r in read_records(directory) if r["stage"] == "rpt"]
    write_atomically(directory / "results.json", json.dumps(results, indent=2))
    figures = {
        "learning": _plot_learning(results),
        "training": plot_training(steps),
        "thought_length": _plot_thoughts(results, steps),
    }
    if any("A" in fit for fit in results["scaling"].values()):
        figures["scaling"] = _plot_scaling(results)
    if any("/" in split for split in results["after"]):
        figures["labels"] = _plot_labels(results)
    page = directory / "report.html"
    write_atomically(page, _page(directory, results, steps, save_figures(directory, figures)))
    return page


def headline_split(results: dict) -> str:
    """Return the split that the report leads with: hard labelled positions, else hard, else all."""
    families = [s for s in results["after"] if s.startswith("hard ")]
    return families[0] if families else "hard" if "hard" in results["after"] else "all"


def series(curve: list[dict], split: str, metric: str):
    """Return (values, standard errors) of a metric, f64 [n], over the n evaluations that have it."""
    figures = [c[split][metric] for c in curve if split in c and metric in c[split]]
    return np.array([f["value"] for f in figures]), np.array([f["standard_error"] for f in figures])


def _plot_learning(results: dict):
    splits = [
        headline_split(results),
        *(s for s in ("hard", "medium", "easy", "settled", "all") if s in results["after"]),
    ]
    first, *others = dict.fromkeys(splits)
    # If all hard positions are labelled, both splits are equal and share a panel.
    splits = [first, *(s for s in others if results["after"][s] != results["after"][first])]
    figure, axes = subplots(
        2, -(-len(splits) // 2), figsize=(4.2 * -(-len(splits) // 2), 6.6), sharex=True, squeeze=False
    )
    for axis, split in zip(axes.flat, splits):
        for metric, style, label in (
            ("sampled_prefix", "-o", "thinking, sampled"),
            ("greedy_prefix", "--s", "thinking, greedy"),
            ("direct_prefix", ":", "direct"),
        ):
            value, error = series(results["curve"], split, metric)
            axis.errorbar(results["steps"][: len(value)], value, 2 * error, fmt=style, capsize=2, label=label, ms=4)
        if results["control"]:
            value = results["control_curve"][-1][split]["direct_prefix"]["value"]
            axis.axhline(value, color=_COLORS["control"], lw=1.5, label="control, direct (end)")
        axis.set_title(f"{split} (n={results['curve'][-1][split]['sampled_prefix']['n']})", fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(splits) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("RPT step")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle("Next-token accuracy on held-out documents (bars: two standard errors)")
    figure.tight_layout()
    return figure


def _plot_scaling(results: dict):
    figure, axis = subplots(figsize=(6.4, 4.2))
    points = [(f, c) for f, c in zip(results["flops"], results["curve"], strict=True) if f > 0]
    headline = headline_split(results)
    names = [headline, *(s for s in ("hard", "medium", "easy", "all") if s != headline)]
    names = [s for s in names if s == headline or results["after"].get(s) != results["after"][headline]]
    for number, split in enumerate(s for s in names if "A" in results["scaling"].get(s, {})):
        C = np.array([f for f, _ in points])
        P, error = series([c for _, c in points], split, "sampled_prefix")
        fit = fit_power_law(C, P)
        grid = np.geomspace(C.min(), C.max() * 1.5, 100)
        color = f"C{number}"
        axis.errorbar(C, P, 2 * error, fmt="o", color=color, capsize=2, ms=4)
        constants = "α, P* not determined" if fit.doubt else f"α={fit.alpha:.2f}, P*={fit.p_star:.2f}"
        axis.plot(grid, fit.predict(grid), color=color, label=f"{split}: {constants}, R²={fit.r2:.3f}")
        axis.fill_between(grid, *fit.band(grid), color=color, alpha=0.15)
    axis.set_xscale("log")
    axis.set_xlabel("RPT compute, FLOPs (tokens actually run)")
    axis.set_ylabel("accuracy, thinking (sampled)")
    axis.set_title("P(C) = A / C^α + P*, with bootstrap bands (nominal 90%; too narrow for few points)")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def plot_training(steps: list[dict], what: str = "RPT"):
    """Plot reward, failure and optimisation metrics of training over the steps; return the figure."""
    figure, axes = subplots(1, 4, figsize=(14, 3.2))
    x = [r["step"] for r in steps]
    for axis, names in zip(
        axes,
        (
            ("reward",),
            ("reward_any_in_group", "degenerate_group_fraction", "no_think_end_fraction"),
            ("no_prediction_fraction", "truncated_fraction"),
            ("entropy", "grad_norm"),
        ),
        strict=True,
    ):
        for name in names:
            axis.plot(x, [r.get(name, np.nan) for r in steps], label=name, lw=1.2)
        axis.set_xlabel(f"{what} step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("Training rollouts")
    figure.tight_layout()
    return figure


def _plot_thoughts(results: dict, steps: list[dict]):
    figure, axis = subplots(figsize=(6.4, 3.4))
    axis.plot([r["step"] for r in steps], [r["completion_tokens"] for r in steps], lw=1, label="training rollouts")
    for split in dict.fromkeys([headline_split(results), "settled"]):
        if split in results["after"]:
            value, _ = series(results["curve"], split, "sampled_thought_tokens")
            axis.plot(results["steps"], value, "o-", ms=4, label=f"held out, {split}")
    axis.set_xlabel("RPT step")
    axis.set_ylabel("tokens per completion")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _plot_labels(results: dict):
    names = sorted(s for s in results["after"] if "/" in s)
    figure, axis = subplots(figsize=(6.8, 3.4))
    x = np.arange(len(names))
    bars = [
        ("before", results["before"], "sampled_prefix", "before RPT, thinking"),
        ("after", results["after"], "sampled_prefix", "after RPT, thinking"),
    ]
    if results["control"]:
        bars.append(("control", results["control"], "direct_prefix", "control, direct"))
    for offset, (kind, figures, metric, label) in enumerate(bars):
        cells = [figures[s][metric] for s in names]
        axis.bar(
            x + 0.27 * (offset - 1), [c["value"] for c in cells], 0.25,
            yerr=[2 * c["standard_error"] for c in cells], color=_COLORS[kind], label=label, capsize=2,
        )  # fmt: skip
    axis.set_xticks(x, names)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    return figure


def cell(figure: dict | None) -> str:
    """Return a table cell with value and standard error; None: a dash."""
    if figure is None:
        return "<td>–</td>"
    return f"<td>{figure['value']:.3f} <small>± {figure['standard_error']:.3f}</small></td>"


def _table(results: dict) -> str:
    columns = (
        ("before: thinking, sampled", "before", "sampled_prefix"),
        ("after: thinking, sampled", "after", "sampled_prefix"),
        ("before: greedy", "before", "greedy_prefix"),
        ("after: greedy", "after", "greedy_prefix"),
        ("after: pass@k", "after", "pass@k"),
        ("after: majority@k", "after", "majority@k"),
        ("after: direct", "after", "direct_prefix"),
        ("control: direct", "control", "direct_prefix"),
    )
    head = "".join(f"<th>{title}</th>" for title, *_ in columns)
    rows = []
    for split in results["after"]:
        n = results["after"][split]["sampled_prefix"]["n"]
        cells = "".join(cell((results[source] or {}).get(split, {}).get(metric)) for _, source, metric in columns)
        rows.append(f"<tr><th>{html.escape(split)}</th><td>{n}</td>{cells}</tr>")
    return f"<table><tr><th>split</th><th>n</th>{head}</tr>{''.join(rows)}</table>"


def _control_text(results: dict) -> str:
    if not results["control"]:
        return "This run has no control."
    return (
        f"The control starts from the same model and spends {results['control_flops'][-1]:.3g} FLOPs (RPT: "
        f"{results['flops'][-1]:.3g}) on ordinary next-token training on the same documents. It is evaluated by direct "
        "prediction, because that is what this training improves."
    )


def _scaling_text(results: dict) -> str:
    fits = results["scaling"]
    reasons = {fit.get("refused") for fit in fits.values()}
    if len(reasons) == 1 and None not in reasons:
        return f"<p>No fit: {html.escape(reasons.pop())}. Lower --eval.every-steps in a new run.</p>"
    items = []
    for split, fit in fits.items():
        if "refused" in fit:
            items.append(f"<li>{html.escape(split)}: no fit ({html.escape(fit['refused'])})</li>")
        else:
            # Constants that the points do not determine are not shown; results.json has them.
            found = f"A={fit['A']:.3g}, α={fit['alpha']:.3f}, P*={fit['p_star']:.3f}, R²={fit['r2']:.3f}"
            found = f"no constants; {fit['doubt']}" if fit["doubt"] else found
            items.append(f"<li>{html.escape(split)}: {found}, {fit['num_points']} evaluations</li>")
    return f"<ul>{''.join(items)}</ul><p>With three constants and few points, R² is weak evidence.</p>"


PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1b1f24 }
img { max-width: 100% }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { border: 1px solid #d0d7de; padding: 3px 7px; text-align: right }
td { white-space: nowrap }
th { background: #f6f8fa }
th:first-child { text-align: left }
small { color: #656d76 }
.lead { font-size: 17px; background: #eef5ff; border-left: 4px solid #1f6feb; padding: .8em 1em }
.example { border-left: 4px solid #ccc; margin: 1em 0; padding: .1em 1em; background: #fafbfc }
.example p { margin: .4em 0 }
.won { border-color: #2da44e }
.partly { border-color: #bf8700 }
.lost { border-color: #cf222e }
.context { color: #57606a; white-space: pre-wrap; overflow-wrap: anywhere }
.thought { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px }
.stop { color: #8c959f }
.controls { display: flex; flex-wrap: wrap; gap: .5em 1.2em; background: #f6f8fa; padding: .6em }
.controls [hidden] { display: none }
.position { border-top: 1px solid #d0d7de; margin-top: 1.2em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.pair > div { min-width: 0 }
output { display: block; font-weight: 600; margin-top: .5em }
dt { font-weight: 600 }
pre { background: #f6f8fa; padding: 1em; overflow-x: auto; font-size: 12px }
"""


def _begin_text(config: dict) -> str:
    path, updates = config["policy"]["path"], config["supervised"]["num_steps"]
    start = f"It starts from <code>{html.escape(path)}</code>. " if path else ""
    return start + (f"A warm start of {updates} supervised updates was followed by" if updates else "It took")


def _reward_text(reward: dict) -> str:
    if tuple(reward["terms"]) == ("prefix",):
        return (
            "The reward is 1 if the boxed bytes match the document's continuation and end where a token ends, else 0."
        )
    return f"The reward is {html.escape(' + '.join(reward['terms']))} (compose: {html.escape(reward['compose'])})."


def _page(directory: Path, results: dict, steps: list[dict], pictures: dict[str, Path]) -> str:
    config, corpus = results["config"], results["corpus"]
    thresholds = config["eval"]["difficulty_thresholds"]

    def picture(name: str) -> str:
        if name not in pictures:
            return ""
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        return f"<img alt='{name}' src='data:image/png;base64,{data}'>"

    num_tasks = f"{results['num_tasks']:,}" if results["num_tasks"] else "an unknown number of"
    explained = "".join(f"<dt>{s}</dt><dd>{_EXPLAIN[s]}</dd>" for s in results["after"] if s in _EXPLAIN)
    labels = [s for s in results["after"] if s not in _EXPLAIN]
    if labels:
        explained += f"<dt>{', '.join(labels)}</dt><dd>positions that the corpus labels</dd>"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>RPT run</title><style>{PAGE_STYLE}</style>
<h1>Reinforcement pre-training: results of this run</h1>
<p class="lead">{" ".join(map(html.escape, headline(results, headline_split(results))))}</p>
<h2>What was trained</h2>
<p>A decoder with {config["model"]["num_layers"]} layers of width {config["model"]["width"]} was trained on
{corpus["training"]["documents"]:,} documents ({corpus["training"]["tokens"]:,} tokens). {_begin_text(config)}
{results["steps"][-1]} steps of reinforcement pre-training: at a selected position of a document, the model sees the
text so far, writes a thought, and boxes its prediction of what comes next. {_reward_text(config["reward"])} There were
{num_tasks} positions to train on. {training_summary(steps)}
Each position was sampled
{config["rollout"]["group_size"]} times, and training made the better samples more likely
(advantage: {config["loss"]["advantage"]}). Accuracies are measured on {corpus["held-out"]["documents"]:,} documents
that the model was not trained on.</p>
<h2>Did it learn?</h2>{picture("learning")}
{_table(results)}
<p>± is one standard error over positions. <b>thinking</b>: the boxed prediction of a sampled thought (mean of
{config["eval"]["num_samples"]}) or of the greedy one. <b>direct</b>: the most likely next token without thinking.</p>
<dl>{explained}</dl><p>Entropy thresholds, nats: easy {thresholds[0]}, medium {thresholds[1]}, hard {thresholds[2]}.</p>
{picture("labels")}
<h2>The control</h2><p>{_control_text(results)}</p>
<h2>Compute and accuracy</h2>{picture("scaling")}{_scaling_text(results)}
<h2>How training went</h2>{picture("training")}{picture("thought_length")}
<h2>Thoughts and predictions</h2>{completion_browser(directory)}
<h2>The run</h2><p>seed {config["run"]["seed"]} · {html.escape(results["versions"]["devices"])} · code
{html.escape(results["versions"]["commit"][:12])}</p>
<details><summary>configuration</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details></html>
"""
