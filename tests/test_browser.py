"""Browsing completions: what the page holds, and its filters in a real browser."""

import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rpt_jax.analysis.reports.browser import completion_browser
from rpt_jax.analysis.reports.run import PAGE_STYLE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title = 'broken'</script> & <b>\u2028"


def write_batch(directory, name: str, positions, *, samples: int, reward, style=None, splits=None) -> None:
    """Write completions of `samples` rollouts a position: "a", a hostile text, the number of the position."""
    rows = []
    for position in positions:
        for g in range(samples):
            pieces = ["a ", HOSTILE, f"<{position}>", ""]
            rows.append({
                "position_id": position, "rollout": g, "context": f"context {position} " + "long " * 200,
                "prediction": None if g == 3 else f"p{position}", "truth": f"truth {position}",
                "reward": reward(position, g), "truncated": False, "completion_pieces": pieces,
                "logprobs": [-0.5, -2.0, -7.25, 0.0], "tokens": 4,
            } | ({} if style is None else {"style": style(g), "splits": splits(position)}))  # fmt: skip
    (directory / "completions").mkdir(exist_ok=True)
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    pyarrow.parquet.write_table(table, directory / "completions" / f"{name}.parquet")


def write_run(directory) -> None:
    """Write 5,000 completions: two training batches of 1,000, evaluations of 300 positions at steps 0, 5 and 10.

    Positions below 100 are right after and wrong before, those of 200 and more the other way round.
    """
    for step in (5, 10):
        positions = range(step * 1000, step * 1000 + 250)
        write_batch(directory, f"step_{step:06d}", positions, samples=4, reward=lambda p, g: float(g < 1))
    right = {0: lambda p, g: float(p >= 200), 5: lambda p, g: 0.5, 10: lambda p, g: float(p < 100)}
    for step, samples in ((0, 4), (5, 2), (10, 4)):
        write_batch(
            directory, f"evaluation_{step:06d}", range(300), samples=samples, reward=right[step],
            style=lambda g: "greedy" if g == 0 else "sampled",
            splits=lambda p: ["all", *(["hard"] if p % 3 == 0 else [])],
        )  # fmt: skip


def embedded(page: str) -> dict:
    return json.loads(re.search(r"id='completion-data'>(.*?)</script>", page, re.DOTALL)[1])


def test_the_page_holds_every_completion_with_its_log_probabilities(tmp_path):
    write_run(tmp_path)
    page = completion_browser(tmp_path)
    data = embedded(page)
    assert "All 5,000 logged completions" in page
    assert len(data["task"]) == 5000 and data["stage"].count(1) == 3000
    assert page.count("<script") == 2 and page.count("</script>") == 2
    row = data["step"].index(10)  # the smallest position of the last evaluation comes first
    assert [data["pieces"][i] for i in data["tokens"][row]] == ["a ", HOSTILE, "<0>", ""]
    assert data["logprobs"][row] == [50, 200, 725, 0]
    task = data["tasks"][data["task"][row]]
    assert task["truth"] == "truth 0" and [data["splits"][s] for s in task["splits"]] == ["all", "hard"]
    assert task["context"].startswith("… ") and len(task["context"]) == 402


def test_what_does_not_fit_is_whole_positions_and_is_said(tmp_path):
    write_run(tmp_path)
    page = completion_browser(tmp_path, max_completions=1200, max_tokens=10**6)
    data = embedded(page)
    assert "1,200 of 5,000 logged completions" in page and len(data["task"]) == 1200
    evaluated = [data["tasks"][t]["position"] for t, stage in zip(data["task"], data["stage"]) if stage]
    # The evaluation between is left out: 4 + 4 rows of a position, or none.
    assert set(np.unique(evaluated, return_counts=True)[1]) == {8} and len(evaluated) == 600
    assert {s for s, stage in zip(data["step"], data["stage"]) if stage} == {0, 10}
    # 200 tokens of each stage are 50 completions: 6 positions of 8, 12 groups of 4.
    few = embedded(completion_browser(tmp_path, max_completions=1200, max_tokens=400))
    assert few["stage"].count(1) == 48 and few["stage"].count(0) == 48
    # One position is shown, however long it is.
    assert len(embedded(completion_browser(tmp_path, max_tokens=2))["task"]) == 8 + 4


def test_a_run_without_completions_says_so(tmp_path):
    assert completion_browser(tmp_path) == "<p>None are in <code>completions/</code>.</p>"
    (tmp_path / "completions").mkdir()
    old = pyarrow.table({"position_id": [1], "completion": ["a"], "reward": [0.0]})
    pyarrow.parquet.write_table(old, tmp_path / "completions" / "step_000010.parquet")
    assert "cannot be browsed: 1, in" in completion_browser(tmp_path)


# Sets controls and notes what the page shows.
DRIVER = """
const seen = {};
function set(name, value) {
  const control = document.getElementById("browse-" + name);
  control.value = value;
  control.dispatchEvent(new Event(name === "text" ? "input" : "change"));
}
const note = (key) => { seen[key] = document.querySelector("output").textContent; };
const shown = () => document.querySelectorAll("section").length;
note("pairs"); seen.shown = shown();
document.querySelector("button").click(); seen.more = shown();
set("change", "rose"); note("rose");
set("change", "fell"); note("fell");
seen.columns = [...document.querySelector(".pair").children].map((c) => c.textContent.match(/reward (\\S+)/)[1]);
set("split", "1"); note("fell_hard");
set("change", ""); set("style", "greedy"); note("greedy_hard");
set("view", "evaluation"); set("style", ""); note("hard"); set("split", ""); note("evaluation");
set("step", "5"); note("step_5");
set("reward", "partly"); note("step_5_partly");
set("reward", "won"); note("step_5_won");
set("view", "training"); note("training_5_won");
set("step", ""); set("reward", ""); set("text", "<5007>"); note("text");
const token = document.querySelectorAll(".thought span")[2];
seen.token = [token.textContent, token.title, getComputedStyle(token).backgroundColor];
seen.stop = document.querySelectorAll(".thought span")[3].textContent;
seen.title = document.title;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = encodeURIComponent(JSON.stringify(seen));
document.body.append(out);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_filters_in_a_browser(tmp_path):
    write_run(tmp_path)
    body = completion_browser(tmp_path)
    page = tmp_path / "page.html"
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><title>whole</title><style>{PAGE_STYLE}</style><body>{body}"
        f"<script>{DRIVER}</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    run = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout)
    assert found, run.stderr[-2000:]
    seen = json.loads(urllib.parse.unquote(found[1]))
    assert seen == {
        "pairs": "300 positions", "shown": 20, "more": 40,
        "rose": "100 positions", "fell": "100 positions", "columns": ["1", "0"],
        # 200 to 299: 201, 204 .. 297.
        "fell_hard": "33 positions", "greedy_hard": "100 positions",
        "hard": "1,000 completions", "evaluation": "3,000 completions",
        "step_5": "600 completions", "step_5_partly": "600 completions", "step_5_won": "0 completions",
        "training_5_won": "250 completions", "text": "4 completions",
        "token": ["<5007>", "-7.25 nats", "rgb(240, 136, 62)"], "stop": "■", "title": "whole",
    }  # fmt: skip
