"""Answer held-out tasks by searching through thoughts, and report accuracy against what it cost.

python -m experiments.search --run runs/text --strategy majority [--chains 16]
python -m experiments.search --run runs/text --strategy mcts --value runs/value [--rounds 16] [--width 4]
    [--tasks 200] [--split all] [--step-tokens 16] [--form nodes | priors] [--answer value | visits | selection]
    [--out found.jsonl] [--section.field VALUE ...]

Strategies: chain, majority, and with a value model (--value, a run or a classifier, docs/reward_models.md) best_of_n,
weighted_vote, beam and mcts. Many trees share each batch. Steps end as --steps.delimiter, --steps.every-tokens or
--steps.marks say, at the latest after --step-tokens. Each line of --out has the chosen completion, its prediction and
whether it is right.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from experiments.cli import load_run, run_script
from experiments.label_steps import verifier_of
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError
from rpt_jax.evals.next_token import mean_with_error
from rpt_jax.parallel.interruption import watching
from rpt_jax.search.engine import Engine
from rpt_jax.search.mcts import Rules
from rpt_jax.search.strategies import NEED_VALUES, STRATEGIES, Budget, search
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train.policies import load_reward_model, start_params
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run, prepare
from rpt_jax.train.sizes import fitted

_CHAINS = _ROUNDS = 16
# Flags that only some strategies use.
_USED_BY = {
    "chains": ("best_of_n", "majority", "weighted_vote"), "rounds": ("beam", "mcts"), "form": ("mcts",),
    "answer": ("mcts",),
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Search, print the figures, and write what was found."""
    parser = argparse.ArgumentParser(add_help=False)
    needs = not {"-h", "--help"} & set(argv)
    parser.add_argument("--run", type=Path, required=needs)
    parser.add_argument("--strategy", choices=STRATEGIES, required=needs)
    parser.add_argument("--value", default="")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--split", default="all")
    parser.add_argument("--chains", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--step-tokens", type=int, default=16)
    parser.add_argument("--form", choices=("nodes", "priors"))
    parser.add_argument("--answer", choices=("value", "visits", "selection"))
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.run, flags)
    check(args, config)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with watching(config.distributed.deadline_seconds):
        run = fitted(prepare(config, read_only=True, judges=True))
        engine, tasks = make_engine(run, args)
        began = time.perf_counter()
        low = -1.0 if engine.value_model is not None and engine.value_model.objective == "value" else 0.0
        given = {name: value for name in ("form", "answer") if (value := getattr(args, name))}
        budget = Budget(chains=args.chains or _CHAINS, rounds=args.rounds or _ROUNDS)
        found = search(engine, tasks, args.strategy, budget, Rules(low=low, **given))
        report(engine, found, time.perf_counter() - began)
        if args.out:
            lines = [
                {
                    "task": int(task), "completion_tokens": f.leaf.all_tokens(), "right": f.leaf.note["right"],
                    "completion": run.tokenizer.decode(f.leaf.all_tokens()), "value": f.leaf.value,
                    "prediction": (f.leaf.note["prediction"] or b"").decode(errors="replace"),
                }
                for task, f in zip(tasks, found, strict=True)
            ]  # fmt: skip
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.directory.close()


def check(args: argparse.Namespace, config: Config) -> None:
    """Raise ConfigError for flags that the strategy does not use, budgets of nothing, or a strategy without values."""
    for name, used_by in _USED_BY.items():
        if getattr(args, name) is not None and args.strategy not in used_by:
            raise ConfigError(
                f"--{name} with --strategy {args.strategy}; only {', '.join(used_by)} use it. Leave out --{name}."
            )
    for name in ("tasks", "chains", "rounds", "width", "batch", "step_tokens"):
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}; a search needs at least 1. Raise --{flag}.")
    if args.batch % config.mesh.trunk_shards:
        raise ConfigError(
            f"--batch {args.batch}; it must be divisible by mesh.data * mesh.fsdp={config.mesh.trunk_shards}. Change "
            "--batch."
        )
    if (args.strategy in NEED_VALUES) != bool(args.value):
        raise ConfigError(
            f"--strategy {args.strategy} with --value {args.value!r}; {', '.join(NEED_VALUES)} need a value model, and "
            "the others use none. Set --value, or choose another --strategy."
        )


def make_engine(run: Run, args: argparse.Namespace) -> tuple[Engine, list[int]]:
    """Return the engine of the run's newest policy, and the held-out tasks to answer.

    Raises:
        ConfigError: there is no such split, or the value model has another tokenizer.
    """
    params = start_params(with_values(run.config, {"policy.path": str(run.directory.path)}), run.mesh)
    source = run.domain.heldout(run, params)
    verifier = run.make_reward(source, (verifier_of(run),))
    splits = run.domain.evaluator(run, source, {"splits": args.tasks}, verifier).splits
    if ("splits", args.split) not in splits:
        raise ConfigError(
            f"--split {args.split!r}; the held-out tasks have {', '.join(name for _, name in splits)}. Choose one."
        )
    model = load_reward_model(args.value, run.mesh, run.tokenizer) if args.value else None
    engine = Engine(
        config=run.config, mesh=run.mesh, tokenizer=run.tokenizer, policy=params, source=source,
        rule=StepRule(run.config.steps, run.tokenizer), verifier=verifier, width=args.width, batch=args.batch,
        step_tokens=args.step_tokens, value_model=model,
    )  # fmt: skip
    return engine, splits["splits", args.split].tolist()


def report(engine: Engine, found: list, seconds: float) -> None:
    """Print accuracy with its standard error over tasks, and the cost per task."""
    right = mean_with_error(np.array([f.leaf.note["right"] for f in found], float))
    spent, n = engine.spent, len(found)
    console.print(
        f"accuracy {right['value']:.3f} ± {right['standard_error']:.3f} (n = {n}); per task {spent.sampled / n:.1f} "
        f"tokens sampled, {spent.reread / n:.1f} read again, {spent.scored / n:.1f} scored, {spent.nodes / n:.1f} "
        f"nodes; {spent.calls} batches, {seconds:.0f} s",
        highlight=False,
    )


if __name__ == "__main__":
    run_script(main)
