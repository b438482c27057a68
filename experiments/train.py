"""Train a preset on a corpus or on questions: warm start, RL, control, evaluation, report.

python -m experiments.train --preset tiny_text --data.path my.txt
python -m experiments.train --preset tiny_text --data.path 'papers/*.jsonl' --policy.path DIR --data.chat
python -m experiments.train --preset questions --questions.path train.jsonl --policy.path DIR --reward.terms math
"""

from experiments.cli import describe, parse_config, run_script
from rpt_jax.analysis.reports import REPORTS
from rpt_jax.config import Config
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.progress import console
from rpt_jax.train.run import Run


def run(config: Config) -> None:
    """Run all stages, resuming each from its checkpoint if there is one, and write the report.

    Raises:
        Interrupted: a stop signal arrived; the last complete step is saved.
    """
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with watching(config.distributed.deadline_seconds):
        report(run_stages(config))


def report(run: Run) -> None:
    """Write the report of a finished run; a run without RL steps has none."""
    if distributed.is_main() and run.config.run.num_steps:
        page = REPORTS[run.domain.name](run.directory.path)
        console.print(f"report: [bold]{page}[/]   figures: {page.with_name('results.json')}")


def main(argv: list[str]) -> None:
    """Run all stages of the preset; with --dry-run, only print the resolved run."""
    config, dry_run = parse_config(argv, trains=True)
    if dry_run:
        print(describe(config))
    else:
        run(config)


if __name__ == "__main__":
    run_script(main)
