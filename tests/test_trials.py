"""Long trials: `make trials`."""

import json

import pytest

from experiments import quickstart


@pytest.mark.slow
def test_thinking_learns_on_the_worked_corpus(tmp_path):
    """A shortened quickstart: the accuracy of sampled thoughts on hard determined positions rises by half or more."""
    run = tmp_path / "run"
    quickstart.main(
        ["--run.directory", str(run), "--run.num-steps", "40", "--run.no-control", "--eval.final-num-positions", "200"]
    )
    results = json.loads((run / "results.json").read_text())
    before, after = (results[k]["hard determined"]["sampled_prefix"] for k in ("before", "after"))
    assert after["value"] > 1.5 * before["value"]
