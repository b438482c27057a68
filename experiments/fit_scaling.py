"""Fit P(C) = A / C^alpha + P* to a run's evaluations and print it for every split.

python -m experiments.fit_scaling --run runs/quickstart [--metric greedy_prefix]
"""

import argparse
from pathlib import Path

from experiments.cli import run_script
from rpt_jax.analysis.reports.run import collect_results
from rpt_jax.analysis.scaling import fit_power_law
from rpt_jax.errors import DataError


def main(argv: list[str]) -> None:
    """Fit every split of the run and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--metric", default="sampled_prefix", help="metric to fit, such as greedy_prefix")
    args = parser.parse_args(argv)
    results = collect_results(args.run)
    for split, figures in results["after"].items():
        if args.metric not in figures:
            raise DataError(f"--metric {args.metric}; it must be one of the run's: {', '.join(figures)}. Choose one.")
        points = [
            (flops, curve[split][args.metric]["value"])
            for flops, curve in zip(results["flops"], results["curve"], strict=True)
            if flops > 0
        ]
        try:
            fit = fit_power_law(*zip(*points, strict=True))
        except DataError as error:
            print(f"{split:<18} no fit: {error}")
            continue
        low, high = fit.band([points[-1][0] * 2])
        print(
            f"{split:<18} A={fit.A:.4g}  alpha={fit.alpha:.3f}  P*={fit.p_star:.3f}  R2={fit.r2:.3f}  "
            f"at twice the compute {float(fit.predict(points[-1][0] * 2)):.3f} "
            f"(bootstrap, nominal 90%: {low[0]:.3f} to {high[0]:.3f})" + (f"; {fit.doubt}" if fit.doubt else "")
        )


if __name__ == "__main__":
    run_script(main)
