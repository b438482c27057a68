"""Sample rollouts from a preset's policy and write the rewarded ones to a file for a cold start.

python -m experiments.rejection_sample --preset tiny_text --data.path my.txt --policy.path DIR --out cold_start.jsonl
    [--batches 10] [--per-prompt 2] [--min-reward 1]

The policy is the run's newest RL checkpoint, or its warm start if there is none. Use the file as --supervised.path. The
script prints how many rollouts were kept, and how many were dropped for each reason.
"""

import argparse
import json
from pathlib import Path

from experiments.cli import describe, parse_config, run_script
from rpt_jax.data.batches import TrainIterator
from rpt_jax.errors import DataError
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.train.progress import progress_bar
from rpt_jax.train.recorder import completion_columns
from rpt_jax.train.rejection import accepted_rows, write_examples
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.rl import NAME, make_trainer
from rpt_jax.train.stages.warm_start import warm_start


def main(argv: list[str]) -> None:
    """Sample the rollouts, write the accepted ones and print the counts."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=not {"-h", "--help"} & set(argv))
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--per-prompt", type=int, default=2)
    parser.add_argument("--min-reward", type=float, default=1.0)
    args, rest = parser.parse_known_args(argv)
    config, dry_run = parse_config(rest)
    if dry_run:
        print(describe(config))
        return
    run = fitted(prepare(config))
    params = warm_start(run)
    tasks = run.domain.training_tasks(run, params)
    trainer, state = make_trainer(run, params, tasks)
    if run.checkpoints(NAME, read_only=True).latest_step is not None:
        state, _, _ = newest_state(run, params)
    policies = trainer.policies(state)
    rollout = config.rollout
    shape = dict(num_trunks=rollout.num_trunks, prompts_per_trunk=rollout.prompts_per_trunk)
    # A different seed, so that these are not the prompts that training starts with.
    iterator = TrainIterator(
        tasks.source,
        tasks.ids,
        group_size=rollout.group_size,
        seed=config.run.seed + 1,
        corpora=tasks.corpora,
        weights=tasks.weights,
        **shape,
    )
    rows = []
    with progress_bar("rollouts", args.batches) as progress:
        for number in range(args.batches):
            batch = shard_batch(run.mesh, next(iterator))
            # Training counts steps from 0, so it would reach these sampling keys only after 2^30 steps.
            experience = trainer.roll_out(policies, 2**30 + number, batch, 0)
            columns = completion_columns(experience, run.tokenizer, tasks.source.columns)
            rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            progress(number + 1)
    kept, counts = accepted_rows(rows, min_reward=args.min_reward, per_prompt=args.per_prompt)
    print(json.dumps(counts))
    if not kept:
        raise DataError(
            f"none of {len(rows)} rollouts ended with a reward of at least {args.min_reward}; a cold start requires "
            "some. Sample more (--batches), use a better policy, or lower --min-reward."
        )
    write_examples(args.out, kept, tokenizer=run.tokenizer.fingerprint, template=run.template.fingerprint)
    run.directory.close()


if __name__ == "__main__":
    run_script(main)
