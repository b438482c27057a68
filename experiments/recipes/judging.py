"""Follow a recipe's policy: judge it after every step on the same held-out tasks, and write the recipe's page."""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from rpt_jax.analysis.reports.recipe import JUDGED, JUDGED_ROWS, write_recipe_report
from rpt_jax.config import Config
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.policies import is_run, start_params
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import FINISHED, read_config, read_json, read_records, read_seconds, write_atomically
from rpt_jax.train.sizes import fitted

COST, COUNTS = "cost.json", "counts.json"
_STAGES = ("warm_start", "preferences", "rpt", "control")
# What the figures are called, by the domain's metrics.
_METRICS = {
    "documents": {
        "accuracy": "sampled_prefix", "pass@k": "pass@k", "tokens": "sampled_thought_tokens",
        "no_prediction": "sampled_no_prediction", "direct": "direct_prefix",
    },
    "questions": {"accuracy": "sampled", "tokens": "thought_tokens", "no_prediction": "no_prediction"},
}  # fmt: skip


@dataclass(kw_only=True)
class Judge:
    """Judges the policy in the directory of each finished step, once; for `run_recipe`'s `after_each`.

    Attributes:
        config: data and evaluation settings; its run.directory is the recipe's, and its reward is 1 for right answers.
        split: of the held-out tasks, whose figures are reported.
        title, about: of the page.
        measures: {name: function of a completion's row, NaN where it does not apply}, besides accuracy and tokens.
        has_answers: predictions are right or wrong; False leaves accuracies out.
        of_policies: {name: function of (run with the evaluation's settings, parameters) that returns a figure}.
        steps: names of the finished steps.
        first: directory of the first policy.
    """

    config: Config
    split: str
    title: str
    about: str
    measures: Mapping[str, Callable[[dict], float]] = field(default_factory=dict)
    of_policies: Mapping[str, Callable[[Run, Any], dict]] = field(default_factory=dict)
    has_answers: bool = True
    steps: list[str] = field(default_factory=list)
    first: Path | None = None

    def __call__(self, path: Path) -> None:
        """Judge the policy in `path`, if there is one, and write the page."""
        self.steps.append(path.name)
        if (path / "config.json").exists():
            self.first = self.first or path
            if not (path / JUDGED).exists():
                self._judge(path)
        else:
            write_atomically(path / JUDGED, json.dumps({"name": path.name, "figures": {}} | cost_of(path)))
        page = write_recipe_report(path.parent, self.steps, title=self.title, about=self.about)
        if figures := read_json(path / JUDGED)["figures"]:
            console.print(f"{path.name}: {figures_in_words(figures)}; {page}", highlight=False)

    def _judge(self, path: Path) -> None:
        evaluations, kept = self._evaluations, []
        run = evaluations.run
        params = self._policy(run, path)
        figures = evaluations.evaluate(params, thinking=True, final=True, keep=kept.append)["splits"]
        rows = {name: [v for columns in kept for v in columns[name]] for name in kept[0]}
        rows["right"] = [reward == 1.0 for reward in rows["reward"]]
        table = pyarrow.table(rows)
        pyarrow.parquet.write_table(table, path / JUDGED_ROWS, compression="zstd")
        found = figures[self.split]
        named = {name: found[metric] for name, metric in _METRICS[run.domain.name].items() if metric in found}
        named |= {name: f for name, f in found.items() if name.startswith("pass@")}
        if not self.has_answers:
            named = {"tokens": named["tokens"]}
        for name, measure in self.measures.items():
            named[name] = self._measured(table.to_pylist(), measure)
        for name, function in self.of_policies.items():
            named[name] = function(run, params)
        record = {"name": path.name, "figures": named} | cost_of(path)
        write_atomically(path / JUDGED, json.dumps(record))
        del params
        gc.collect()

    def _measured(self, rows: Sequence[dict], measure: Callable[[dict], float]) -> dict:
        """Return the mean over prompts of the mean over their samples; figures as an evaluation's."""
        by_prompt: dict[int, list[float]] = {}
        for row in rows:
            if row["style"] == "sampled" and self.split in row["splits"] and not np.isnan(value := measure(row)):
                by_prompt.setdefault(row["position_id"], []).append(value)
        return mean_with_error(np.array([np.mean(values) for values in by_prompt.values()] or [np.nan]))

    @cached_property
    def _evaluations(self) -> Evaluations:
        """Return the evaluations, on the tasks that the first judged policy's directory defines."""
        path, asked = self.first, self.config
        config = read_config(path, say=False)
        config = replace(
            config, run=replace(config.run, directory=str(path)), data=asked.data, questions=asked.questions,
            rollout=replace(asked.rollout, stop_ids=config.rollout.stop_ids), reward=asked.reward, eval=asked.eval,
        )  # fmt: skip
        run = fitted(prepare(config, read_only=True, judges=True))
        source = run.domain.heldout(run, self._policy(run, path))
        return Evaluations(run=run, source=source, only=self.split)

    def _policy(self, run: Run, path: Path) -> Any:
        return start_params(replace(run.config, policy=replace(run.config.policy, path=str(path))), run.mesh)


def cost_of(path: Path) -> dict:
    """Return {"what": in words, "seconds", "flops"} of a step."""
    if not is_run(path):
        made_with = {k: _last_names(v) for k, v in read_json(path / FINISHED).items()}
        cost = read_json(path / COST) if (path / COST).exists() else {"seconds": 0.0, "flops": 0.0}
        counts = {k: f"{v:g}" for k, v in (read_json(path / COUNTS) if (path / COUNTS).exists() else {}).items()}
        return {"what": ", ".join(f"{k} {v}" for k, v in (made_with | counts).items())} | cost
    config, records = read_config(path, say=False), read_records(path)
    seconds = sum(sum(read_seconds(path, stage)) for stage in _STAGES)
    flops = sum(max([r.get("flops", 0.0) for r in records if r["stage"] == stage], default=0.0) for stage in _STAGES)
    parts = []
    if config.supervised.num_steps:
        source = Path(config.supervised.path).name if config.supervised.path else "the texts"
        parts.append(f"{config.supervised.num_steps} supervised updates on {source}")
    if config.run.num_steps:
        parts.append(f"{config.run.num_steps} steps of RL on {' + '.join(config.reward.terms)}")
    start = f", from {Path(config.policy.path).name}" if config.policy.path else ""
    return {"what": ", then ".join(parts) + start, "seconds": seconds, "flops": flops}


def _last_names(value: Any) -> str:
    """Return a setting in words, of paths only the last part."""
    values = value if isinstance(value, list) else [value]
    return " and ".join(Path(v).name if isinstance(v, str) else f"{v:g}" for v in values)


def figures_in_words(figures: dict) -> str:
    """Return the figures as `name value ± error` in one line."""
    return ", ".join(f"{name} {f['value']:.3f} ± {f['standard_error']:.3f}" for name, f in figures.items())
