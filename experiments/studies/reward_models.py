"""Do reward models that cost no labels help? Best of 16, and RL, with models trained on a policy's own completions.

python -m experiments.studies.reward_models --preset tiny_worked --directory runs/reward_models --seeds 0
    --out docs/results/reward_models.json [--arms prefix outcome ...] [--section.field VALUE ...]

For each seed, `start` is a few steps of RPT from the seed's warm start (that of is_it_the_reward, whose --directory can
be used), so that it is right about half of the time. Its completions are judged by the corpus, and the ends of their
steps by Monte Carlo (experiments.label_steps); an outcome and a process model learn from them, from the weights of
`start`. Then held-out positions are answered by the best of 16 samples by each model, by votes and by the majority, and
the arms do RL from `start`:

    prefix        the verifier, as a control that needs the truth
    outcome       the outcome model's probability alone
    process       the process model's lowest step alone
    steps         the verifier, and the process model's advantages per step
    mixed         .5 prefix + .3 outcome + .2 process
    filter        the verifier; the process model only drops inconsistent rollouts (PROF)

Everything resumes, and a finished arm is not run again. Prints Markdown tables.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from experiments.cli import run_script
from experiments.label_steps import write_labels
from experiments.recipes.common import open_run, rl_step, supervised_step
from experiments.reward_model import judge
from experiments.studies.is_it_the_reward import missing_arms, parse_study, run_rl_arm
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.graded import Graded
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.reward_models.process import aggregate
from rpt_jax.scoring.scalars import ScalarModel, in_units
from rpt_jax.search.best_of_n import best_of_n, majority, weighted_vote
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.policies import load_reward_model, start_params
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import FINISHED, read_json, write_atomically
from rpt_jax.train.stages.reward_model import scores_of

_BOTH = {"reward.models.path": "outcome", "reward.models.process_path": "process"}
ARMS = {
    "prefix": {"reward.terms": ("prefix",)},
    "outcome": {"reward.terms": ("reward_model",), "reward.models.path": "outcome"},
    "process": {"reward.terms": ("process_model",), "reward.models.process_path": "process"},
    "steps": {
        "reward.terms": ("prefix", "0.3*process_model"), "reward.models.process_path": "process",
        "reward.models.process_use": "steps",
    },
    "mixed": {"reward.terms": ("0.5*prefix", "0.3*reward_model", "0.2*process_model")} | _BOTH,
    "filter": {
        "reward.terms": ("prefix", "process_model"), "reward.models.process_path": "process",
        "reward.models.process_use": "filter", "reward.models.keep": 0.75,
    },
}  # fmt: skip
_SETTINGS = (
    "--steps.delimiter", ",", "--run.num-steps", "40", "--run.shapes", "few", "--eval.every-steps", "40",
    "--eval.final-num-positions", "400",
)  # fmt: skip
_START_STEPS, _BATCHES, _MODEL_STEPS = 5, 24, 300
_SPLIT, _NUM_CHOICES, _NUM_POSITIONS = "hard determined", 16, 800


def prepare_models(config: Config, directory: Path) -> tuple[Config, dict]:
    """Run what the arms share: the start, the labels, both models; return (config of the arms, figures of choices)."""
    start, labels = directory / "models" / "start", directory / "models" / "labels"
    begun = rl_step(config, {"run.directory": str(start), "run.num_steps": _START_STEPS})
    if not (start / FINISHED).exists():
        run_stages(begun)
    counts = labels / "counts.json"
    if not counts.exists():
        labels.mkdir(parents=True, exist_ok=True)
        # Positions that a computation determines, not those that nothing does.
        run = open_run(str(start), {"steps.delimiter": ",", "positions.unfiltered_fraction": 0.0})
        found = write_labels(run, labels / "all.jsonl", batches=_BATCHES, per_prompt=4, samples=8)
        run.directory.close()
        split_by_prompt(labels)
        write_atomically(counts, json.dumps(found))
    figures: dict = {"counts": read_json(counts)}
    models = {}
    for objective in ("outcome", "process"):
        path = directory / "models" / objective
        own = {
            "run.directory": str(path), "policy.path": str(start), "supervised.objective": objective,
            "run.num_steps": 0, "reward.terms": ("prefix",), "supervised.optimizer.learning_rate": 3e-4,
        }  # fmt: skip
        trained = supervised_step(config, str(labels / "train.jsonl"), _MODEL_STEPS, own)
        if not (path / FINISHED).exists():
            run_stages(trained)
        run = prepare(trained, read_only=True, judges=True)
        models[objective] = load_reward_model(str(path), run.mesh, run.tokenizer)
        figures[objective] = judge(run, models[objective], str(labels / "heldout.jsonl"))
        run.directory.close()
    figures["choices"] = choices(start, directory / "models" / "samples.parquet", models)
    paths = {"policy.path": str(start), "supervised.num_steps": 0, "supervised.path": ""}
    return with_values(config, paths), figures


def split_by_prompt(labels: Path) -> None:
    """Write a fifth of the prompts of all.jsonl to heldout.jsonl, the others to train.jsonl."""
    lines = (labels / "all.jsonl").read_text().splitlines()
    prompts = list(dict.fromkeys(tuple(json.loads(line)["trunk_tokens"]) for line in lines))
    held_out = set(prompts[::5])
    for name, is_held_out in (("train", False), ("heldout", True)):
        own = [line for line in lines if (tuple(json.loads(line)["trunk_tokens"]) in held_out) == is_held_out]
        (labels / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in own))


def choices(start: Path, path: Path, models: dict[str, ScalarModel]) -> dict[str, dict]:
    """Return {rule: figure} of answering held-out positions with one of 16 samples; errors are over positions."""
    run = open_run(
        str(start),
        {"eval.num_samples": _NUM_CHOICES, "eval.final_num_positions": _NUM_POSITIONS, "reward.terms": ("prefix",)},
    )
    if not path.exists():
        params = start_params(with_values(run.config, {"policy.path": str(start)}), run.mesh)
        kept: list[dict] = []
        source = run.domain.heldout(run, run.start_params())
        Evaluations(run=run, source=source, only=_SPLIT).evaluate(params, thinking=True, final=True, keep=kept.append)
        rows = {name: [v for columns in kept for v in columns[name]] for name in kept[0]}
        pyarrow.parquet.write_table(pyarrow.table(rows), path, compression="zstd")
    columns = ["position_id", "style", "splits", "prediction", "reward", "trunk_tokens", "completion_tokens"]
    rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    rows = [r for r in rows if r["style"] == "sampled" and _SPLIT in r["splits"]]
    scores = {name: score_rows(run, model, rows) for name, model in models.items()}
    found = by_position(rows, scores)
    run.directory.close()
    return {rule: mean_with_error(np.array(values)) for rule, values in found.items()}


def score_rows(run: Run, model: ScalarModel, rows: Sequence[dict]) -> list[float]:
    """Return each completion's probability: of the outcome, or of its lowest step."""
    rule = StepRule(run.config.steps, run.tokenizer)
    examples = []
    for row in rows:
        tokens = row["completion_tokens"]
        places = rule.ends(tokens) if model.objective == "process" else [len(tokens) - 1]
        labels = [[0.0] * len(places)]
        examples.append(
            Graded(trunk=row["trunk_tokens"], completions=[tokens], places=[places], labels=labels, record={})
        )
    found = scores_of(model.config, model.params, examples, run.template.tail, run.config, run.mesh, batch_size=64)
    lowest = []
    for (scores,) in found:
        p = np.asarray(in_units(model.objective, np.asarray(scores)))
        lowest.append(float(aggregate(p, np.ones(len(p), bool), "min")))
    return lowest


def by_position(rows: Sequence[dict], scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return {rule: whether its answer is right, for each position}."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row["position_id"]].append(number)
    found: dict[str, list[float]] = defaultdict(list)
    for members in groups.values():
        answers = [rows[i]["prediction"] for i in members]
        right = {a: rows[i]["reward"] for a, i in zip(answers, members, strict=True)}
        found["one sample"].append(float(np.mean([rows[i]["reward"] for i in members])))
        found["any of 16"].append(max(rows[i]["reward"] for i in members))
        found["majority"].append(right.get(majority(answers), 0.0))
        for name, of_rows in scores.items():
            own = [of_rows[i] for i in members]
            found[f"best by {name}"].append(right.get(best_of_n(answers, own), 0.0))
            found[f"vote by {name}"].append(right.get(weighted_vote(answers, own), 0.0))
    return found


def run_arm(config: Config, directory: Path, arm: str) -> dict:
    """Run one RL arm and return its figures, with the reward that it was trained on."""
    models = directory / "models"
    values = {name: str(models / v) if name.endswith("path") else v for name, v in ARMS[arm].items()}
    return run_rl_arm(config, models, f"rl_{arm}", values)


def tables(found: dict) -> str:
    """Return Markdown tables: models, choices, and arms."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in found) + " |", "|---|" + "---|" * len(found)]
    figures = [of["models"] for of in found.values() if "models" in of]
    for objective in ("outcome", "process"):
        cells = " | ".join(_cell(f[objective]["accuracy"]) for f in figures)
        lines.append(f"| {objective} model, held-out accuracy | {cells} |")
    for rule in figures[0]["choices"] if figures else ():
        lines.append(f"| {rule} | {' | '.join(_cell(f['choices'][rule]) for f in figures)} |")
    for arm in ARMS:
        results = [of[arm] for of in found.values() if arm in of]
        if results:
            before, after = (
                [_cell(r[when][_SPLIT]["sampled_prefix"]) for r in results] for when in ("before", "after")
            )
            own = [f"{np.mean(r['reward'][-5:]):.2f}" for r in results]
            cells = " | ".join(f"{b} → {a}, own reward {o}" for b, a, o in zip(before, after, own, strict=True))
            lines.append(f"| RL, {arm} | {cells} |")
    return "\n".join(lines)


def _cell(figure: dict) -> str:
    return f"{figure['value']:.3f} ± {figure['standard_error']:.3f}"


def main(argv: list[str]) -> None:
    """Train the models and run the arms of every seed, then print the tables."""
    args, config = parse_study(argv, list(ARMS), [], _SETTINGS)
    found = read_json(args.out) if args.out.exists() else {}
    ready: dict[Path, Config] = {}
    for begun, directory, arm, of_seed in missing_arms(args, config, found):
        if directory not in ready:
            ready[directory], of_seed["models"] = prepare_models(replace(begun), directory)
        of_seed[arm] = run_arm(ready[directory], directory, arm)
    print(tables(found))


if __name__ == "__main__":
    run_script(main)
