"""Train a preset on a corpus or on questions: warm start, RL, control, evaluation, report.

python -m experiments.train --preset tiny_text --data.path my.txt
python -m experiments.train --preset tiny_text --data.path 'papers/*.jsonl' --policy.path DIR --data.chat
python -m experiments.train --preset questions --questions.path train.jsonl --policy.path DIR --reward.terms math
"""

from experiments.cli import describe, parse_config, run_script
from rpt_jax.session import run


def main(argv: list[str]) -> None:
    """Run all stages of the preset; with --dry-run, only print the resolved run."""
    config, dry_run = parse_config(argv, trains=True)
    if dry_run:
        print(describe(config))
    else:
        run(config)


if __name__ == "__main__":
    run_script(main)
