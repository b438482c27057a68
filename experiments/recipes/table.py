"""Print the figures of a recipe's steps as a Markdown table; a cell has the seeds' values.

python -m experiments.recipes.table runs/r1/seed0 runs/r1/seed1
"""

from pathlib import Path

from experiments.cli import run_script
from rpt_jax.errors import ConfigError
from rpt_jax.train.run_directory import read_json


def table(results: list[list[dict]]) -> str:
    """Return the table: a row for each step that is a policy, in the order of the first seed; errors are the largest.

    Args:
        results: results.json of each seed.
    """
    by_name = [{step["name"]: step for step in of_seed if step["figures"]} for of_seed in results]
    names = list(by_name[0])
    figures = list(dict.fromkeys(f for name in names for f in by_name[0][name]["figures"]))
    lines = ["| step | " + " | ".join([*figures, "FLOPs", "seconds"]) + " |", "|---|" + "---|" * (len(figures) + 2)]
    for name in names:
        steps = [of_seed[name] for of_seed in by_name if name in of_seed]
        cells = [_cell([step["figures"].get(figure) for step in steps]) for figure in figures]
        cells.append(" / ".join(f"{step['flops']:.2g}" for step in steps))
        cells.append(" / ".join(f"{step['seconds']:.0f}" for step in steps))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: list[dict | None]) -> str:
    known = [f for f in found if f is not None]
    if not known:
        return "–"
    return " / ".join(f"{f['value']:.3f}" for f in known) + f" ±{max(f['standard_error'] for f in known):.3f}"


def main(argv: list[str]) -> None:
    """Print the table of the directories."""
    missing = [directory for directory in argv if not (Path(directory) / "results.json").exists()]
    if missing or not argv:
        raise ConfigError(
            f"{missing or 'no directory'}; a recipe's directory has a results.json. Run the recipe first."
        )
    print(table([read_json(Path(directory) / "results.json") for directory in argv]))


if __name__ == "__main__":
    run_script(main)
