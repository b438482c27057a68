"""Train a reward or value model on graded completions, judge it on held-out ones, score files, export it.

python -m experiments.reward_model --preset text --policy.path DIR --supervised.objective bradley_terry \\
    --supervised.path pairs.jsonl --supervised.num-steps 200 --heldout other.jsonl [--by generator]
python -m experiments.reward_model --run runs/rm --heldout other.jsonl            # judge a trained one again
python -m experiments.reward_model --run runs/rm --score rows.jsonl --out scored.jsonl [--keep 0.5] [--best-of-n]
python -m experiments.reward_model --run runs/rm --export DIR                     # a Hugging Face classifier
    [--section.field VALUE ...]

Objectives: bradley_terry (which completion is better), outcome (is it right), process (is each step right), value
(expected outcome behind each step). docs/reward_models.md has the layouts of the files. Prompts are in the format of
--questions.path or --data.path if they are set, so that the model reads what their policy writes; with --data.chat they
are turns of the chat template.

Judged: accuracy with its standard error over records; for process models on records with "steps" and "label" also
ProcessBench's F1. --by FIELD reports the accuracy of each value of a record's field. --score adds "score" to each
record of a file in the layout of the objective: the lowest of a process model's steps, the last of a value model's;
both add "step_scores". --keep drops the records with the lowest
scores, and --best-of-n keeps the best record of each prompt. Records of bradley_terry hold several completions: they
get "scores" and "best". Scores are before the sigmoid.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.cli import describe, load_run, parse_config, run_script
from rpt_jax.data.graded import Graded, read_graded
from rpt_jax.data.readers import has_files, no_files
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.models.hf import save_hf
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.scoring.scalars import ScalarModel
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.policies import is_reward_model, load_reward_model
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.reward_model import scores_of


def main(argv: list[str]) -> None:
    """Train unless --run names a trained model; then judge, score or export."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--heldout", default="")
    parser.add_argument("--by", default="")
    parser.add_argument("--score", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--best-of-n", action="store_true")
    parser.add_argument("--export", type=Path)
    args, flags = parser.parse_known_args(argv)
    if bool(args.score) != bool(args.out) or not 0 < args.keep <= 1:
        raise ConfigError(
            f"--score {args.score!r}, --out {args.out} and --keep {args.keep}; --score needs --out, and --keep is a "
            "share in (0, 1]. Correct them."
        )
    for given, flag, needed, by in (
        (args.by, "--by", args.heldout, "--heldout"), (args.keep < 1, "--keep", args.score, "--score"),
        (args.best_of_n, "--best-of-n", args.score, "--score"),
    ):  # fmt: skip
        if given and not needed:
            raise ConfigError(f"{flag} without {by}; it says what becomes of that file. Set {by}, or leave out {flag}.")
    for flag, path in (("--heldout", args.heldout), ("--score", args.score)):
        if path and not has_files(path):
            raise DataError(f"{no_files(flag, path)}Correct {flag}.")
    if args.run and not (args.heldout or args.score or args.export):
        raise ConfigError("--run without --heldout, --score or --export; there is nothing to do. Set one.")
    if args.run:
        config = load_run(args.run, flags)
    else:
        config, dry_run = parse_config([*flags, "--run.num-steps", "0"], default_preset="text")
        if dry_run:
            print(describe(config))
            return
    if not is_reward_model(config):
        raise ConfigError(
            f"supervised.objective={config.supervised.objective!r}; a reward model has bradley_terry, outcome, process "
            "or value. Set --supervised.objective."
        )
    for path in (args.out, args.export):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with watching(config.distributed.deadline_seconds):
        if not args.run:
            run_stages(config)
        run = fitted(prepare(config, read_only=True, judges=True))
        model = load_reward_model(config.run.directory, run.mesh, run.tokenizer)
        if args.heldout:
            report(judge(run, model, args.heldout, args.by), Path(config.run.directory))
        if args.score:
            score_file(run, model, args.score, args.out, keep=args.keep, best_of_n=args.best_of_n)
        if args.export:
            save_hf(args.export, model.config, model.params, tokenizer=run.tokenizer, objective=model.objective)
            console.print(f"{config.run.directory} -> {args.export}")
        run.directory.close()


def read(run: Run, path: str, **how: bool) -> list[Graded]:
    """Read a file for the run's objective, as `read_graded`; print how many examples are skipped, and why."""
    examples, skipped = read_graded(path, run.tokenizer, run.template, run.config, **how)
    for reason, count in skipped.items():
        if count:
            console.print(f"{count} of {len(examples) + sum(skipped.values())} examples of {path} {reason}; skipped")
    return examples


def score_all(run: Run, model: ScalarModel, examples: Sequence[Graded]) -> list[list[list[float]]]:
    """Return the readout at each labelled place of each completion of each example."""
    size = run.config.supervised.batch_size
    return scores_of(model.config, model.params, examples, run.template.tail, run.config, run.mesh, batch_size=size)


def judge(run: Run, model: ScalarModel, path: str, by: str = "") -> dict[str, dict]:
    """Return {name: figure}: accuracy over a file's examples, and over those of each value of the record's field `by`.

    Accuracy is over pairs of each prompt (bradley_terry), or over labelled places, of which the sign of the score
    decides; standard errors are over examples. ProcessBench's F1 is the harmonic mean of the accuracies on solutions
    with and without a mistake (arXiv:2412.06559).
    """
    examples, objective = read(run, path), run.config.supervised.objective
    scores = score_all(run, model, examples)
    right = np.array([accuracy(objective, e, s) for e, s in zip(examples, scores, strict=True)])
    figures = {"accuracy": mean_with_error(right)}
    groups: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples) if by else ():
        groups[str(example.record.get(by))].append(number)
    figures |= {f"accuracy, {by} {name}": mean_with_error(right[rows]) for name, rows in sorted(groups.items())}
    if objective in ("process", "value") and all(_is_process_bench(e.record) for e in examples):
        figures |= process_bench(run, model, path)
    return figures


def accuracy(objective: str, example: Graded, scores: list[list[float]]) -> float:
    """Return the share of an example's pairs, or of its labels, that the scores tell right."""
    if objective == "bradley_terry":
        ends, ranks = [s[-1] for s in scores], [label[0] for label in example.labels]
        pairs = [(a, b) for a in range(len(ends)) for b in range(len(ends)) if ranks[a] > ranks[b]]
        return float(np.mean([ends[a] > ends[b] for a, b in pairs]))
    middle = 0.0 if objective == "value" else 0.5
    return float(
        np.mean([(s > 0) == (y > middle) for of, labels in zip(scores, example.labels) for s, y in zip(of, labels)])
    )


def _is_process_bench(record: dict) -> bool:
    return isinstance(record.get("steps"), list) and isinstance(record.get("label"), int)


def process_bench(run: Run, model: ScalarModel, path: str) -> dict[str, dict]:
    """Return the accuracies on solutions with and without a mistake, and their harmonic mean as F1.

    The prediction is the first step whose score is below the middle; none: the solution is right. A file with only one
    kind of solutions has no F1.
    """
    examples = read(run, path, whole=True)
    right: dict[str, list[float]] = {"with a mistake": [], "without": []}
    for example, scores in zip(examples, score_all(run, model, examples), strict=True):
        first = next((i for i, score in enumerate(scores[0]) if score < 0), -1)
        label = example.record["label"]
        right["without" if label < 0 else "with a mistake"].append(float(first == label))
    figures = {f"ProcessBench, solutions {name}": mean_with_error(np.array(v)) for name, v in right.items() if v}
    if len(figures) < 2:
        return figures
    a, b = (f["value"] for f in figures.values())
    f1 = 2 * a * b / (a + b) if a + b else 0.0
    return figures | {"ProcessBench, F1": {"value": f1, "standard_error": None, "n": len(examples)}}


def report(figures: dict[str, dict], directory: Path) -> None:
    """Print the figures and write judged.json into the run directory."""
    for name, f in figures.items():
        error = "" if f["standard_error"] is None else f" ± {f['standard_error']:.3f}"
        console.print(f"{name}: {f['value']:.3f}{error} (n = {f['n']})", highlight=False)
    (directory / "judged.json").write_text(json.dumps(figures, indent=2))


def score_file(run: Run, model: ScalarModel, path: str, out: Path, *, keep: float, best_of_n: bool) -> None:
    """Write the file's records with their scores; with `keep` only the best share, with `best_of_n` one per prompt."""
    examples = read(run, path, labelled=False)
    rows = []
    for example, scores in zip(examples, score_all(run, model, examples), strict=True):
        if len(scores) > 1:
            ends = [s[-1] for s in scores]
            best = (
                {"best": example.record["completions"][int(np.argmax(ends))]} if "completions" in example.record else {}
            )
            rows.append((example, example.record | {"scores": ends} | best, max(ends)))
            continue
        objective = run.config.supervised.objective
        of_steps = {"step_scores": scores[0]} if objective in ("process", "value") else {}
        score = min(scores[0]) if objective == "process" else scores[0][-1]
        rows.append((example, example.record | {"score": score} | of_steps, score))
    kept = _best_of_each(rows) if best_of_n else rows
    by_score = sorted(range(len(kept)), key=lambda i: -kept[i][2])  # of equal ones the first
    kept = [kept[i] for i in sorted(by_score[: max(1, round(keep * len(kept)))])]
    out.write_text("".join(json.dumps(record, default=str) + "\n" for _, record, _ in kept))
    console.print(f"{len(kept)} of {len(rows)} records -> {out}")


def _best_of_each(rows: list[tuple]) -> list[tuple]:
    best: dict[tuple, tuple] = {}
    for row in rows:
        prompt = tuple(row[0].trunk)
        if prompt not in best or row[2] > best[prompt][2]:
            best[prompt] = row
    return list(best.values())


if __name__ == "__main__":
    run_script(main)
