"""Label the steps of a policy's own completions by Monte Carlo, for outcome, process and value models.

python -m experiments.label_steps --run runs/text --out steps.jsonl [--batches 4] [--per-prompt 4] [--samples 8]
    [--labels soft | hard | bisect] [--max-questions N] [--section.field VALUE ...]

Samples rollout batches of the run's newest policy, and keeps up to --per-prompt distinct completions of a prompt. From
the end of each step (--steps.delimiter, --steps.every-tokens or --steps.marks) the policy continues --samples times,
and the run's verifier judges the results: prefix, or math or exact for questions. soft labels are the share of right
continuations, hard ones whether any is right. bisect finds the first wrong step of wrong completions with far fewer
questions; with --max-questions, those come first that are wrong although their prompt is often solved (OmegaPRM).

Each line of --out has token ids, the outcome ("label") and the steps ("places", "labels"): it serves the objectives
outcome, process and value of experiments.reward_model, and as a supervised file. Answers are kept next to --out, so the
same command resumes after an interruption and asks nothing twice.
"""

import argparse
import dataclasses
import hashlib
import json
from collections import defaultdict
from pathlib import Path

from experiments.cli import load_run, run_script
from experiments.rejection_sample import sample_rows
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.parallel.interruption import watching
from rpt_jax.reward_models.labels import Answers, first_wrong_steps, omega_score, step_labels
from rpt_jax.rewards.base import parse_terms
from rpt_jax.rewards.catalog import VERIFIERS
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train.labelling import Continuations, Solution, solutions_of
from rpt_jax.train.policies import fingerprint, is_reward_model
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.run_directory import write_atomically
from rpt_jax.train.sizes import fitted


def main(argv: list[str]) -> None:
    """Sample, ask and write the file."""
    parser = argparse.ArgumentParser(add_help=False)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--questions-at-once", type=int, default=48)
    parser.add_argument("--labels", choices=("soft", "hard", "bisect"), default="soft")
    parser.add_argument("--max-questions", type=int)
    args, flags = parser.parse_known_args(argv)
    for name in ("batches", "per_prompt", "samples", "questions_at_once"):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {getattr(args, name)}; it must be at least 1. Raise {flag}.")
    if args.max_questions is not None and args.max_questions < 1:
        raise ConfigError(f"--max-questions {args.max_questions}; it must be at least 1. Raise it, or leave it out.")
    if args.max_questions is not None and args.labels != "bisect":
        raise ConfigError(f"--max-questions with --labels {args.labels}; only bisect can leave some open. Remove it.")
    config = load_run(args.run, flags)
    if is_reward_model(config):
        raise ConfigError(f"--run {args.run} trained a reward model, which samples nothing. Choose a policy's run.")
    if args.questions_at_once % config.mesh.trunk_shards:
        raise ConfigError(
            f"--questions-at-once {args.questions_at_once}; it must be divisible by mesh.data * mesh.fsdp="
            f"{config.mesh.trunk_shards}. Change it."
        )
    with watching(config.distributed.deadline_seconds):
        run = fitted(prepare(config, read_only=True, judges=True))
        counts = write_labels(
            run, args.out, batches=args.batches, per_prompt=args.per_prompt, samples=args.samples, kind=args.labels,
            at_once=args.questions_at_once, max_questions=args.max_questions,
        )  # fmt: skip
        console.print(", ".join(f"{name} {value:g}" for name, value in counts.items()) + f" -> {args.out}")
        run.directory.close()


def verifier_of(run: Run) -> str:
    """Return the reward that is 1 for right completions of the run's tasks."""
    if run.domain.name == "documents":
        return "prefix"
    first = parse_terms(run.config.reward.terms)[0].name
    return first if first in VERIFIERS else "math"


def write_labels(
    run: Run,
    out: Path,
    *,
    batches: int,
    per_prompt: int,
    samples: int,
    kind: str = "soft",
    at_once: int = 48,
    max_questions: int | None = None,
) -> dict[str, float]:
    """Label completions of the run's newest policy and write them; arguments as the command line's.

    Returns:
        Counts: sampled rollouts, how many were truncated, repeated or over the limit of a prompt, the completions that
        remain, right ones, steps, questions asked, and lines written.
    Raises:
        DataError: all completions are right, or none is.
        CheckpointError: kept answers are about other completions.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    name = verifier_of(run)
    sampled = sample_rows(run, batches, verifier=name)
    rule = StepRule(run.config.steps, run.tokenizer)
    rows, counts = _distinct(sampled.rows, per_prompt)
    solutions = solutions_of(rows, rule)
    right = [s.is_right for s in solutions]
    if all(right) or not any(right):
        raise DataError(
            f"{'all' if all(right) else 'none'} of {len(right)} completions are right; labels need both kinds. Sample "
            "more (--batches), or use an earlier policy."
        )
    asks = Continuations(
        run=run, policy=sampled.policy, source=sampled.source, verifier=run.make_reward(sampled.source, (name,)),
        num_samples=samples, batch=at_once,
    )  # fmt: skip
    asked_of = repr([(s.task, s.tokens, s.ends) for s in solutions]) + name + fingerprint(sampled.policy)
    key = hashlib.sha256(asked_of.encode()).hexdigest()[:16]
    answers = Answers(out.with_suffix(".answers.jsonl"), samples, key)
    answer, sizes = asks.answer(solutions), [len(s.ends) for s in solutions]
    if kind == "bisect":
        order = _omega_order(solutions) if max_questions is not None else None
        first = first_wrong_steps(
            answers, sizes, right, answer, batch=at_once, max_questions=max_questions, order=order
        )
        labels = [_up_to(size, wrong) for size, wrong in zip(sizes, first, strict=True)]
    else:
        labels = step_labels(answers, sizes, right, answer, batch=at_once)
        if kind == "hard":
            labels = [[float(label > 0) for label in of] for of in labels]
    names = {
        "tokenizer": run.tokenizer.fingerprint, "template": run.template.fingerprint,
        "steps": dataclasses.asdict(run.config.steps),
    }  # fmt: skip
    lines = [
        {
            "trunk_tokens": row["trunk_tokens"], "completion_tokens": row["completion_tokens"],
            "label": float(solution.is_right), "places": solution.ends[: len(of)], "labels": of,
        } | names
        for row, solution, of in zip(rows, solutions, labels, strict=True)
        if of
    ]  # fmt: skip
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines))
    return counts | {
        "completions": len(rows), "right": sum(right), "steps": sum(sizes), "questions": answers.num_asked,
        "written": len(lines),
    }  # fmt: skip


def _distinct(rows: list[dict], per_prompt: int) -> tuple[list[dict], dict[str, int]]:
    """Return (up to `per_prompt` distinct finished completions of each prompt, counts of all and of dropped ones)."""
    counts = {"rollouts": len(rows), "truncated": 0, "repeated": 0}
    by_prompt: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
    for row in rows:
        group, completion = by_prompt[tuple(row["trunk_tokens"])], tuple(row["completion_tokens"])
        counts["truncated"] += row["truncated"]
        counts["repeated"] += not row["truncated"] and completion in group
        if not row["truncated"]:
            group.setdefault(completion, row)
    kept = [row for group in by_prompt.values() for row in list(group.values())[:per_prompt]]
    return kept, counts | {"over_limit": sum(map(len, by_prompt.values())) - len(kept)}


def _up_to(size: int, wrong: int | None) -> list[float]:
    """Return the labels up to the first wrong step; none if it is open."""
    if wrong is None:
        return []
    return [1.0] * size if wrong < 0 else [1.0] * wrong + [0.0]


def _omega_order(solutions: list[Solution]):
    """Return solution -> OmegaPRM's priority, where a prompt's rate is the share of its solutions that are right.

    Each solution of a prompt that comes before counts as a visit.
    """
    by_task: dict[int, list[int]] = defaultdict(list)
    for number, solution in enumerate(solutions):
        by_task[solution.task].append(number)
    scores = {}
    for group in by_task.values():
        rate = sum(solutions[i].is_right for i in group) / len(group)
        for visits, i in enumerate(i for i in group if not solutions[i].is_right):
            found = omega_score(rate, len(solutions[i].tokens), visits, len(solutions))
            scores[i] = found["score"]
    return scores.__getitem__


if __name__ == "__main__":
    run_script(main)
