"""The page of a recipe: one policy through its steps, judged on the same held-out tasks after each."""

import base64
import html
import json
from pathlib import Path

import pyarrow.parquet

from rpt_jax.analysis.reports.figures import save_figures, subplots
from rpt_jax.analysis.reports.run import PAGE_STYLE, cell
from rpt_jax.train.run_directory import read_json, write_atomically

JUDGED, JUDGED_ROWS = "judged.json", "judged.parquet"
_NUM_EXAMPLES = 4


def write_recipe_report(directory: Path, names: list[str], *, title: str, about: str) -> Path:
    """Write results.json, plots/stages.png and report.html into the recipe's directory; return the path of the page.

    Args:
        directory: of the recipe.
        names: of the finished steps, in order; each has a judged.json with `name`, `what`, `seconds`, `flops` and
            `figures`, {name: {"value", "standard_error", "n"}}, which is empty for steps that are no policy. Policies
            have a judged.parquet of completions as well.
        title: of the page.
        about: what the recipe is, in a sentence.
    """
    steps = [read_json(directory / name / JUDGED) for name in names]
    write_atomically(directory / "results.json", json.dumps(steps, indent=2))
    policies = [step for step in steps if step["figures"]]
    has_answers = any("accuracy" in step["figures"] for step in policies)
    shown, colors = "", "; green ones are right" if has_answers else ""
    if policies:
        data = base64.b64encode(_plot(directory, policies).read_bytes()).decode()
        shown = f'<img alt="figures after each step" src="data:image/png;base64,{data}">'
    page = directory / "report.html"
    write_atomically(
        page,
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{PAGE_STYLE} td.what {{ text-align: left; white-space: normal; min-width: 16em }}</style>
<h1>{html.escape(title)}</h1><p class="lead">{html.escape(about)}</p>
<h2>The policy after each step</h2>{_table(steps)}
<p>± is one standard error over held-out positions or questions, the same ones after each step. <b>accuracy</b>:
sampled thoughts. FLOPs and minutes are those of the step.</p>
{shown}
<h2>The same prompts after each step</h2><p>The first sample of each{colors}.</p>
{_examples(directory, [step["name"] for step in policies], has_answers=has_answers)}</html>
""",
    )
    return page


def _plot(directory: Path, steps: list[dict]) -> Path:
    """Draw every figure of the steps over the steps; bars are two standard errors."""
    names = list(dict.fromkeys(name for step in steps for name in step["figures"]))
    rows = -(-len(names) // 3)
    figure, axes = subplots(rows, 3, figsize=(10.5, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        known = [(i, step["figures"][name]) for i, step in enumerate(steps) if name in step["figures"]]
        axis.errorbar(
            [i for i, _ in known], [f["value"] for _, f in known], [2 * f["standard_error"] for _, f in known],
            fmt="o", capsize=2, ms=5,
        )  # fmt: skip
        axis.set_xticks(range(len(steps)), [step["name"] for step in steps], rotation=60, ha="right", fontsize=8)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    return save_figures(directory, {"stages": figure})["stages"]


def _table(steps: list[dict]) -> str:
    names = list(dict.fromkeys(name for step in steps for name in step["figures"]))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    rows = []
    for step in steps:
        figures = "".join(cell(step["figures"].get(name)) for name in names)
        cost = f"<td>{step['flops']:.2g}</td><td>{step['seconds'] / 60:.1f}</td>"
        what = f"<td class='what'>{html.escape(step['what'])}</td>"
        rows.append(f"<tr><th>{html.escape(step['name'])}</th>{what}{cost}{figures}</tr>")
    return f"<table><tr><th>step</th><th>what</th><th>FLOPs</th><th>minutes</th>{head}</tr>{''.join(rows)}</table>"


def _color(is_right: bool, has_answers: bool) -> str:
    return ("won" if is_right else "lost") if has_answers else ""


def _examples(directory: Path, names: list[str], *, has_answers: bool) -> str:
    """Return the first sample of a few prompts after each step."""
    columns = ["position_id", "rollout", "style", "context", "completion", "truth", "right"]
    found: dict[int, dict] = {}
    for name in names:
        for row in pyarrow.parquet.read_table(directory / name / JUDGED_ROWS, columns=columns).to_pylist():
            if row["style"] == "sampled" and row["rollout"] == 0:
                found.setdefault(row["position_id"], {})[name] = row
    parts = []
    for of_step in [o for o in found.values() if len(o) == len(names)][:_NUM_EXAMPLES]:
        first = of_step[names[0]]
        shown = "".join(
            f"<div class='example {_color(row['right'], has_answers)}'><p><small>{html.escape(name)}</small></p>"
            f"<p class='thought'>{html.escape(row['completion'])}</p></div>"
            for name, row in of_step.items()
        )
        parts.append(
            f"<div class='position'><p class='context'>{html.escape(first['context'][-600:])}</p>"
            f"<p>What follows: <code>{html.escape(first['truth'])}</code></p>{shown}</div>"
        )
    return "".join(parts)
