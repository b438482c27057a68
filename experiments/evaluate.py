"""Evaluate a run's newest RL checkpoint on its held-out documents or questions, and print every split.

python -m experiments.evaluate --run runs/quickstart [--eval.num-samples 16] [--mesh.fsdp 1]

The script writes nothing to the run, which may still be training.
"""

import argparse
from pathlib import Path

from experiments.cli import load_run, run_script
from experiments.zero_shot import table
from rpt_jax.models.lora import join
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.warm_start import warm_start

METRICS = (
    "sampled_prefix",
    "greedy_prefix",
    "direct_prefix",
    "pass@k",
    "majority@k",
    "reasoned_logprob",
    "direct_logprob",
)


def main(argv: list[str]) -> None:
    """Evaluate the newest checkpoint and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory with an RL checkpoint")
    args, flags = parser.parse_known_args(argv)
    run = fitted(prepare(load_run(args.run, flags), read_only=True))
    start = warm_start(run)
    state, frozen, step = newest_state(run, start)
    evaluations = Evaluations(run=run, source=run.domain.heldout(run, start), start=start)
    figures = evaluations.evaluate(join(frozen, state.params), thinking=True, final=True)["splits"]
    print(f"step {step}: value ± standard error")
    if run.domain.name == "questions":
        print(table(figures))
        return
    print(f"{'split':<18}{'n':>6}" + "".join(f"{m:>22}" for m in METRICS))
    for split, cells in figures.items():
        values = "".join(f"{cells[m]['value']:>13.3f} ± {cells[m]['standard_error']:.3f} " for m in METRICS)
        print(f"{split:<18}{cells[METRICS[0]]['n']:>6}{values}")
    run.directory.close()


if __name__ == "__main__":
    run_script(main)
