"""Evaluate a run's newest RL checkpoint on held-out documents or questions, and print every split.

python -m experiments.evaluate --run runs/quickstart [--eval.num-samples 16] [--eval.max-documents 60]
python -m experiments.evaluate --run runs/quickstart --data.heldout-path other.jsonl
python -m experiments.evaluate --run runs/text --questions.path gsm8k_test.jsonl --reward.terms math

Settings of the evaluation, the data, the rollouts and the rewards may differ from the run's. The script writes nothing
to the run, which may still be training. The run's own texts need not be there any more: their tokens are in its cache.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from experiments.cli import load_run, run_script
from experiments.zero_shot import table
from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.models.lora import join
from rpt_jax.rewards.catalog import shows_references
from rpt_jax.train.domains import cache_directory
from rpt_jax.train.evaluation import Evaluations
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.run_directory import read_config
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
    config = load_run(args.run, flags)
    questions, own = config.questions, read_config(args.run, say=False)
    if own.questions.path and config.data.heldout_path != own.data.heldout_path:
        raise ConfigError(
            f"--data.heldout-path with --run {args.run}, which was trained on questions; other questions stand in "
            "--questions.path. Use that flag."
        )
    if questions.path != own.questions.path:
        # All of these questions are to be judged, not the share that a training run would hold out.
        is_given = questions.heldout_path != own.questions.heldout_path
        config = replace(
            config,
            questions=replace(questions, heldout_path=questions.heldout_path if is_given else questions.path),
            rollout=replace(config.rollout, prompts_per_trunk=2 if shows_references(config.reward) else 1),
        )
    with tempfile.TemporaryDirectory() as overlay:
        run = fitted(prepare(with_overlay(config, Path(overlay)), read_only=True, judges=True))
        start = warm_start(run)
        state, frozen, step = newest_state(run, start)
        evaluations = Evaluations(run=run, source=run.domain.heldout(run, start), start=start)
        figures = evaluations.evaluate(join(frozen, state.params), thinking=True, final=True)["splits"]
    print(f"step {step}: value ± standard error")
    if run.domain.name == "questions":
        print(f"{len(run.domain.held_out.questions)} questions of {config.questions.heldout_path or 'the run'}")
        print(table(figures))
        return
    print(f"{'split':<18}{'n':>6}" + "".join(f"{m:>22}" for m in METRICS))
    for split, cells in figures.items():
        values = "".join(f"{cells[m]['value']:>13.3f} ± {cells[m]['standard_error']:.3f} " for m in METRICS)
        print(f"{split:<18}{cells[METRICS[0]]['n']:>6}{values}")
    run.directory.close()


def with_overlay(config: Config, overlay: Path) -> Config:
    """Return the config with a cache that shows what the run's holds, and takes what is new."""
    cache = cache_directory(config)
    for pattern in ("documents-*", "positions-*", "questions-*"):
        for path in cache.glob(pattern):
            (overlay / path.name).symlink_to(path.resolve())
    return replace(config, data=replace(config.data, cache=str(overlay)))


if __name__ == "__main__":
    run_script(main)
