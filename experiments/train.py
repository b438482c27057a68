"""Train a preset: corpus or questions, policy, warm start, tasks, RL, control, evaluation, report.

python -m experiments.train --preset tiny_text --data.path my.txt
python -m experiments.train --preset tiny_text --data.path 'papers/*.jsonl' --policy.path DIR --data.chat
python -m experiments.train --preset questions --questions.path train.jsonl --policy.path DIR --reward.name math
"""

from experiments.cli import describe, parse_config, run_script
from rpt_jax.analysis.reports import questions as question_report
from rpt_jax.analysis.reports import run as report
from rpt_jax.config import Config
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.train import stages
from rpt_jax.train.metrics import console


def run(config: Config) -> None:
    """All stages of a run; each goes on from what the run directory holds.

    Raises:
        Interrupted: told to stop; what was done is saved.
    """
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with watching(config.distributed.deadline_seconds):
        prepared = stages.prepare(config)
        params = stages.warm_start(prepared)
        tasks = stages.choose_tasks(prepared, params)
        console.print(f"{len(tasks.ids):,} tasks")
        evaluations = stages.Evaluations(prepared=prepared, source=tasks.heldout)
        flops = stages.run_rl(prepared, params, tasks, evaluations)
        if config.run.control and not config.questions.path:
            stages.run_control(prepared, params, flops, evaluations)
        prepared.run.close()
    if distributed.is_main():
        write = question_report.write_report if config.questions.path else report.write_report
        page = write(prepared.run.path)
        console.print(f"report: [bold]{page}[/]   figures: {page.with_name('results.json')}")


def main(argv: list[str]) -> None:
    config, dry_run = parse_config(argv)
    if dry_run:
        print(describe(config))
    else:
        run(config)


if __name__ == "__main__":
    run_script(main)
