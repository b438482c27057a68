"""Run the quickstart with several seeds and print a Markdown table of the results.

python -m experiments.seeds [--seeds 0 1 2] [--directory runs/seeds]

Finished seeds are not rerun. The seed determines the corpus, the initial parameters and the sampling noise.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments import quickstart
from experiments.cli import run_script

COLUMNS = (
    ("thinking, sampled: before", "before", "sampled_prefix"),
    ("after", "after", "sampled_prefix"),
    ("thinking, greedy: before", "before", "greedy_prefix"),
    ("after", "after", "greedy_prefix"),
    ("direct: before", "before", "direct_prefix"),
    ("after", "after", "direct_prefix"),
    ("control, direct", "control", "direct_prefix"),
)


def table(runs: list[dict]) -> str:
    """Return a Markdown table with one row per split. A cell lists every seed's value and the largest standard error.

    Args:
        runs: results.json of each seed.
    """
    lines = [
        "| split | n | " + " | ".join(title for title, *_ in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for split in (s for s in runs[0]["after"] if all(s in r["after"] for r in runs)):
        n = " / ".join(str(r["after"][split]["sampled_prefix"]["n"]) for r in runs)
        cells = []
        for _, source, metric in COLUMNS:
            figures = [r[source][split][metric] for r in runs]
            values = " / ".join(f"{f['value']:.3f}".removeprefix("0") for f in figures)
            cells.append(f"{values} ±{max(f['standard_error'] for f in figures):.3f}".replace("±0.", "±."))
        lines.append(f"| {split} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Run the seeds that are not finished, then write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args(argv)
    runs = []
    for seed in args.seeds:
        run = args.directory / f"seed{seed}"
        if not (run / "results.json").exists():
            quickstart.main(["--run.seed", str(seed), "--run.directory", str(run)])
        runs.append(json.loads((run / "results.json").read_text()))
    text = table(runs)
    (args.directory / "table.md").write_text(text + "\n")
    print(text)
    gains = [r["after"]["hard determined"]["sampled_prefix"]["value"] for r in runs]
    print(f"\nhard determined, sampled, after: mean {np.mean(gains):.3f}, range over seeds {np.ptp(gains):.3f}")


if __name__ == "__main__":
    run_script(main)
