"""Reinforcement pre-training on a corpus, from start to report.

python -m experiments.train --preset tiny_text --data.path FILE [--run.directory DIR] [--dry-run] [--SECTION.FIELD X]

The same command again goes on where an interrupted run stopped.
"""

from experiments.cli import describe, parse_config, run_script
from rpt_jax import report
from rpt_jax.config import Config
from rpt_jax.train import stages
from rpt_jax.train.metrics import console


def run(config: Config) -> None:
    """All stages of a run; each resumes from what the run directory holds."""
    prepared = stages.prepare(config)
    params = stages.warm_start(prepared)
    source, selected, heldout = stages.choose_positions(prepared, params)
    console.print(f"{len(selected):,} of {len(source.table):,} positions selected")
    evaluations = stages.Evaluations(prepared=prepared, source=heldout)
    _, flops = stages.run_rpt(prepared, params, source, selected, evaluations)
    if config.run.control:
        stages.run_control(prepared, params, flops, evaluations)
    prepared.run.close()
    page = report.write_report(prepared.run.path)
    console.print(f"report: [bold]{page}[/]   figures: {page.with_name('results.json')}")


def main(argv: list[str]) -> None:
    config, dry_run = parse_config(argv)
    if dry_run:
        print(describe(config))
    else:
        run(config)


if __name__ == "__main__":
    run_script(main)
