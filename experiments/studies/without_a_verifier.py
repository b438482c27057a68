"""What do rewards without a verifier teach? Methods of `presets.METHODS` next to the prefix reward and a random one.

python -m experiments.studies.without_a_verifier --preset tiny_worked --directory runs/reward --seeds 0 1 2
    --out docs/results/without_a_verifier.json [--arms prefix verifree ...] [--section.field VALUE ...]

Arms start from the seed's warm start and take equally many steps: prefix and random as in is_it_the_reward, whose
--directory can be used, so that they are run once; random_lengths rewards completions that are as long as right ones;
each method has its own loss; both is the prefix reward plus a tenth of the information gain. They resume, and a
finished arm is not run again. The script writes --out after each arm, prints a Markdown table, and draws accuracy over
FLOPs.
"""

import numpy as np

from experiments.cli import run_script
from experiments.presets import METHODS, TINY_WORKED, method_settings
from experiments.studies.is_it_the_reward import missing_arms, parse_study, run_rl_arm
from rpt_jax.analysis.reports.figures import subplots
from rpt_jax.analysis.reports.run import series
from rpt_jax.train.run_directory import read_json

ARMS = {
    "prefix": {"reward.terms": ("prefix",)},
    "random": {"reward.terms": ("random",)},
    "random_lengths": {"reward.terms": ("random_lengths",)},
    **{name: METHODS[name] for name in ("information_gain", "verifree", "rlpr", "nover", "ttrl")},
    "ravr": method_settings("ravr", TINY_WORKED),
    "both": {"reward.terms": ("prefix", "0.1*information_gain")},
}
COLUMNS = (
    ("thinking, sampled", "sampled_prefix"),
    ("direct", "direct_prefix"),
    ("log p, thinking", "reasoned_logprob"),
    ("log p, direct", "direct_logprob"),
    ("tokens", "sampled_thought_tokens"),
    ("vote right", "majority@k"),
    ("its share", "majority_share"),
)
GOAL = 0.8


def flops_to(goal: float, result: dict, split: str) -> float | None:
    """Return the FLOPs at which sampled accuracy reaches the goal, by a line between evaluations; None: never."""
    values = series(result["curve"], split, "sampled_prefix")[0]
    for before, after in zip(range(len(values)), range(1, len(values))):
        if values[before] < goal <= values[after]:
            return float(np.interp(goal, values[[before, after]], np.array(result["flops"])[[before, after]]))
    return None


def table(found: dict, split: str) -> str:
    """Return a Markdown table of a split, one row per arm; a cell has the seeds' values and the largest error."""
    titles = [title for title, _ in COLUMNS]
    lines = [f"| {split} | {' | '.join(titles)} | FLOPs to {GOAL} |", "|---|" + "---|" * (len(titles) + 1)]
    start = [of["prefix"]["before"] for of in found.values() if "prefix" in of]
    rows = {"start": [(figures, None) for figures in start]}
    for arm in ARMS:
        rows[arm] = [(of[arm]["after"], of[arm]) for of in found.values() if arm in of]
    for arm, results in rows.items():
        if results and all(split in figures for figures, _ in results):
            cells = [_cell([figures[split][metric] for figures, _ in results]) for _, metric in COLUMNS]
            spent = [None if result is None else flops_to(GOAL, result, split) for _, result in results]
            cells.append(" / ".join("–" if flops is None else f"{flops:.2g}" for flops in spent))
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figures: list[dict]) -> str:
    return " / ".join(f"{f['value']:.3f}" for f in figures) + f" ±{max(f['standard_error'] for f in figures):.3f}"


def plot(found: dict, splits: list[str]):
    """Draw the first seed's sampled accuracy over FLOPs, a panel for each split; bars are two standard errors."""
    of_seed = next(iter(found.values()))
    figure, axes = subplots(1, len(splits), figsize=(4.6 * len(splits), 3.6), squeeze=False, layout="constrained")
    for axis, split in zip(axes[0], splits):
        for number, (arm, result) in enumerate(of_seed.items()):
            values, errors = series(result["curve"], split, "sampled_prefix")
            axis.errorbar(result["flops"], values, 2 * errors, fmt="-o", ms=3, capsize=2, label=arm, color=f"C{number}")
        axis.set_xlabel("FLOPs after the warm start")
        axis.set_title(split, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, thinking (sampled)")
    axes[0][0].legend(fontsize=7)
    return figure


def main(argv: list[str]) -> None:
    """Run the arms of every seed, then print the tables and draw the picture."""
    args, config = parse_study(argv, list(ARMS), ["hard determined", "all"])
    found = read_json(args.out) if args.out.exists() else {}
    for begun, directory, arm, of_seed in missing_arms(args, config, found):
        of_seed[arm] = run_rl_arm(begun, directory, arm, ARMS[arm])
    for split in args.splits:
        print(table(found, split) + "\n")
    plot(found, args.splits).savefig(args.out.with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_script(main)
