"""Sample rollouts from a preset's policy and write the rewarded ones to a file for a cold start.

python -m experiments.rejection_sample --preset tiny_text --data.path my.txt --policy.path DIR --out cold_start.jsonl
    [--batches 10] [--per-prompt 2] [--min-reward 1]

The policy is the run's newest RL checkpoint, or its warm start if there is none. Use the file as --supervised.path. The
script prints how many rollouts were kept, and how many were dropped for each reason.
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import describe, parse_config, run_script
from rpt_jax.data.batches import TrainIterator
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rewards.base import earn
from rpt_jax.rollout.completions import completion_columns
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.train.domains import Source
from rpt_jax.train.progress import console, progress_bar
from rpt_jax.train.recorder import to_floats
from rpt_jax.train.rejection import accepted_rows, write_examples
from rpt_jax.train.run import Run, newest_state, prepare
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.rl import NAME, make_trainer
from rpt_jax.train.stages.warm_start import warm_start
from rpt_jax.types import Experience
from rpt_jax.work import count_tokens, num_parameters, step_flops


def main(argv: list[str]) -> None:
    """Sample the rollouts, write the accepted ones and print the counts."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=not {"-h", "--help"} & set(argv))
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--per-prompt", type=int, default=2)
    parser.add_argument("--min-reward", type=float, default=1.0)
    args, rest = parser.parse_known_args(argv)
    if args.batches < 1 or args.per_prompt < 1:
        raise ConfigError(
            f"--batches {args.batches}, --per-prompt {args.per_prompt}; both must be at least 1. Raise them."
        )
    config, dry_run = parse_config(rest, trains=True)
    if dry_run:
        print(describe(config))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run = fitted(prepare(config))
    found = sample_accepted(run, args.batches, per_prompt=args.per_prompt, min_reward=args.min_reward)
    print(json.dumps(found.counts))
    write_examples(args.out, found.rows, tokenizer=run.tokenizer.fingerprint, template=run.template.fingerprint)
    run.directory.close()


@dataclass(frozen=True)
class Accepted:
    """Rewarded rollouts: rows for `write_examples`, counts by reason, and the FLOPs of sampling."""

    rows: list[dict]
    counts: dict[str, int]
    flops: float


def sample_accepted(
    run: Run,
    num_batches: int,
    *,
    per_prompt: int,
    min_reward: float = 1.0,
    from_start: bool = False,
    max_flops: float = math.inf,
) -> Accepted:
    """Sample batches and select rollouts to learn from.

    Args:
        run: see `sample_rows`.
        num_batches: rollout batches to sample.
        per_prompt: most rollouts of a prompt to keep.
        min_reward: of the rollouts to keep.
        from_start, max_flops: see `sample_rows`.
    Raises:
        DataError: no rollout is rewarded.
    """
    sampled = sample_rows(run, num_batches, from_start=from_start, max_flops=max_flops)
    kept, counts = accepted_rows(sampled.rows, min_reward=min_reward, per_prompt=per_prompt)
    if not kept:
        raise DataError(
            f"none of {len(sampled.rows)} rollouts ended with a reward of at least {min_reward} "
            f"({json.dumps(counts)}); a cold start requires some. Sample more (--batches), use a better policy, or "
            "lower --min-reward."
        )
    return Accepted(rows=kept, counts=counts, flops=sampled.flops)


@dataclass(frozen=True)
class Sampled:
    """Rollouts of a policy.

    Attributes:
        rows: with the fields of `rollout.completions.completion_columns`, "shown", and with a verifier "right".
        flops: of sampling.
        source: of the tasks that `position_id` of the rows numbers. Another policy's source has other numbers, because
            its entropies select other positions.
        policy: parameters that sampled.
    """

    rows: list[dict]
    flops: float
    source: Source
    policy: Any


def sample_rows(
    run: Run,
    num_batches: int,
    *,
    from_start: bool = False,
    shows_references: bool = False,
    verifier: str = "",
    max_flops: float = math.inf,
) -> Sampled:
    """Sample batches of rollouts and reward them, with prompts in another order than training's.

    Args:
        run: whose newest policy is sampled, or its warm start if RL has not begun.
        num_batches: rollout batches to sample, at most.
        from_start: sample the policy that RL starts from.
        shows_references: keep prompts that show their reference (ravr); these rows have "shown" True.
        verifier: a reward that is 1 for right answers; rows have "right". Empty: they do not.
        max_flops: stop after the batch that reaches them.
    Raises:
        Interrupted: a stop signal arrived.
    """
    params = warm_start(run)
    tasks = run.domain.training_tasks(run, params)
    console.print(f"sampling from {len(tasks.ids):,} tasks", highlight=False)
    trainer, state = make_trainer(run, params, tasks)
    if not from_start and run.checkpoints(NAME, read_only=True).latest_step is not None:
        state, _, _ = newest_state(run, params)
    policies, rollout = trainer.policies(state), run.config.rollout
    # A different seed, so that these are not the prompts that training starts with.
    source = tasks.source
    if not shows_references:
        source = replace(source, template=replace(source.template, num_shown=0))
    iterator = TrainIterator(
        source,
        tasks.ids,
        num_trunks=rollout.num_trunks,
        prompts_per_trunk=rollout.prompts_per_trunk,
        group_size=rollout.group_size,
        seed=run.config.run.seed + 1,
        corpora=tasks.corpora,
        weights=tasks.weights,
    )
    verifies = run.make_reward(source, (verifier,)) if verifier else None
    rows, flops = [], 0.0
    with progress_bar("rollouts", num_batches) as progress:
        for number in range(num_batches):
            batch = shard_batch(run.mesh, next(iterator))
            # Training counts steps from 0, so it would reach these sampling keys only after 2^30 steps.
            experience = trainer.roll_out(policies, 2**30 + number, batch, 0)
            flops += step_flops(
                num_parameters(policies[CURRENT]), [to_floats(count_tokens(experience))], 0.0, has_adapters=False,
                num_scorings=0,
            )  # fmt: skip
            columns = completion_columns(
                experience.tasks, experience.rollouts, experience.predictions, experience.earned.rewards,
                run.tokenizer, tasks.source.columns,
            )  # fmt: skip
            columns["shown"] = _of_rows(experience, experience.tasks.references.shown)
            if verifies is not None:
                right = earn(verifies, policies, experience.tasks, experience.rollouts)[1].rewards == 1.0
                columns["right"] = _of_rows(experience, right)
            rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            progress(number + 1)
            check()
            if flops >= max_flops:
                break
    return Sampled(rows=rows, flops=flops, source=source, policy=policies[CURRENT])


def _of_rows(experience: Experience, flags) -> list[bool]:
    """Return flags [U, M] of prompts or [U, M, G] of rollouts in the order of `completion_columns`; None: False."""
    prompts, flags = to_host((experience.tasks.prompts, flags))
    shape = prompts.row_ids.shape
    flags = np.zeros(shape, bool) if flags is None else flags
    flags = np.broadcast_to(flags if flags.ndim == 3 else flags[..., None], shape)
    return flags[prompts.prompt_mask].reshape(-1).tolist()


if __name__ == "__main__":
    run_script(main)
