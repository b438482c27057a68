"""The whole pipeline in minutes on two CPU cores: make the puzzle corpus, train, run the control, evaluate, report.

python -m experiments.quickstart [--run.seed N] [--run.directory DIR] [--section.field VALUE ...]
"""

from dataclasses import replace
from pathlib import Path

from experiments.cli import describe, parse_config, run_script
from rpt_jax.config import Config
from rpt_jax.data.synthetic import write_corpus
from rpt_jax.parallel import distributed
from rpt_jax.session import run

NUM_TRAIN, NUM_HELDOUT = 12_000, 800
# Warm-start updates on puzzles of one or two steps; longer puzzles follow.
NUM_SHORT_STEPS = 200


def with_corpus(config: Config) -> Config:
    """Return the config with the paths of the files that `write_corpus` writes into the run directory."""
    corpus = Path(config.run.directory) / "corpus"
    data = replace(
        config.data,
        path=str(corpus / "train.jsonl"),
        heldout_path=str(corpus / "heldout.jsonl"),
        tokenizer=str(corpus / "tokenizer"),
    )
    supervised = replace(config.supervised, path=str(corpus / "warm_start.jsonl"))
    return replace(config, data=data, supervised=supervised)


def main(argv: list[str]) -> None:
    """Make the corpus if it is missing, then run all stages."""
    config, dry_run = parse_config(argv, default_preset="tiny_worked")
    if not config.data.path:
        config = with_corpus(config)
    if dry_run:
        print(describe(config))
        return
    distributed.start(config.distributed)
    make_corpus_once(config)
    run(config)


def make_corpus_once(config: Config) -> None:
    """Write the run's corpus unless it is complete."""
    with distributed.main_first("quickstart corpus"):
        if not (Path(config.run.directory) / "corpus" / "tokenizer" / "tokenizer.json").exists():
            make_corpus(config)


def make_corpus(config: Config) -> None:
    """Write the run's corpus. The tokenizer is written last, so its presence means that the corpus is complete."""
    size, short = config.supervised.batch_size, min(NUM_SHORT_STEPS, config.supervised.num_steps)
    write_corpus(
        Path(config.run.directory) / "corpus",
        seed=config.run.seed,
        num_train=NUM_TRAIN,
        num_heldout=NUM_HELDOUT,
        short_sequences=short * size,
        long_sequences=(config.supervised.num_steps - short) * size,
    )


if __name__ == "__main__":
    run_script(main)
