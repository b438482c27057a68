"""Train controls for a finished run: supervised training from its warm start, with the FLOPs that RL spent.

python -m experiments.controls --run runs/quickstart [--learning-rates 3e-4 1e-3 3e-3]

Each control runs once per learning rate. documents: next-token training on the training documents. cold_start: more
training on the warm start's sequences. The script writes controls.json to the run directory and prints a table.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from experiments.cli import load_run, run_script
from rpt_jax.analysis.reports.run import collect_results, headline_split
from rpt_jax.errors import ConfigError
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.run import prepare
from rpt_jax.train.stages.control import continue_supervised
from rpt_jax.train.stages.warm_start import warm_start

METRICS = ("direct_prefix", "sampled_prefix", "greedy_prefix")


def main(argv: list[str]) -> None:
    """Train and evaluate every control at every learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    args, flags = parser.parse_known_args(argv)
    results = collect_results(args.run)
    config = load_run(args.run, flags)
    run = prepare(config, read_only=True)
    documents = run.domain.control_examples(run)
    if documents is None:
        raise ConfigError(
            f"--run {args.run} is a run on {run.domain.name}; controls require documents. Choose a run on documents."
        )
    params = warm_start(run)
    evaluations = Evaluations(run=run, source=run.domain.heldout(run, params), start=params)
    sources = {"documents": documents}
    if run.warm_examples:
        # A warm-start file is in training order, so its second half is what the warm start ended with.
        half = len(run.warm_examples) // 2 if config.supervised.path else 0
        sources["cold_start"] = [run.warm_examples[i] for i in range(half, len(run.warm_examples))]
    split, rows = headline_split(results), []
    for name, sequences in sources.items():
        for rate in args.learning_rates:
            optimizer = replace(config.supervised.control_optimizer, learning_rate=rate)
            trained, _, _ = continue_supervised(run, params, sequences, optimizer, results["flops"][-1])
            figures = evaluations.evaluate(trained, thinking=True, final=True)["splits"]
            rows.append({"control": name, "learning_rate": rate, "splits": figures})
            cells = "  ".join(f"{m} {figures[split][m]['value']:.3f}" for m in METRICS)
            print(f"{name:<10}  lr {rate:g}  {split}: {cells}  (n={figures[split][METRICS[0]]['n']})", flush=True)
            (args.run / "controls.json").write_text(json.dumps(rows, indent=2))
    run.directory.close()


if __name__ == "__main__":
    run_script(main)
