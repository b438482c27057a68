"""Evaluate a run's newest RPT checkpoint on its held-out documents and print every split.

python -m experiments.evaluate --run runs/quickstart
"""

import argparse
from pathlib import Path

import jax

from experiments.cli import load_run, run_script
from rpt_jax.rl.update import init_state, make_optimizer
from rpt_jax.train import stages

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory with an RPT checkpoint")
    args = parser.parse_args(argv)
    prepared = stages.prepare(load_run(args.run))
    config = prepared.config
    params = stages.warm_start(prepared)
    _, _, heldout = stages.choose_positions(prepared, params)
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    like = init_state(jax.tree.map(lambda x: x.copy(), params), optimizer, prepared.mesh)
    state, record = prepared.checkpoints("rpt").restore(like)
    figures = stages.Evaluations(prepared=prepared, source=heldout).evaluate(state.params, thinking=True, final=True)
    print(f"step {record['step']}: value ± standard error")
    print(f"{'split':<18}{'n':>6}" + "".join(f"{m:>22}" for m in METRICS))
    for split, cells in figures.items():
        values = "".join(f"{cells[m]['value']:>13.3f} ± {cells[m]['standard_error']:.3f} " for m in METRICS)
        print(f"{split:<18}{cells[METRICS[0]]['n']:>6}{values}")
    prepared.run.close()


if __name__ == "__main__":
    run_script(main)
