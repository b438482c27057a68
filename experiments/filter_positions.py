"""Score a corpus with a proxy model and select positions, in bounded memory. Run it again to resume.

python -m experiments.filter_positions --preset tiny_text --data.path 'corpus/*.parquet' --data.tokenizer DIR
    --proxy.path DIR --data.cache cache [--positions.selector entropy_top_fraction]

Tokenised documents and scored positions go into the cache directory, where a training run with the same data, tokenizer
and proxy reads them. The run directory receives positions.json (counts, threshold, tokens per second, peak memory),
positions.png (entropy histograms of all and of selected positions) and positions.html (text shaded by entropy). Without
--proxy.path, the proxy is the preset's warm-started policy.
"""

import json
import time
from pathlib import Path

from experiments.benchmarks.memory import peak_bytes
from experiments.cli import describe, parse_config, run_script
from rpt_jax.analysis.reports import positions as position_report
from rpt_jax.config import Config
from rpt_jax.data.positions import UNSCORED_SELECTORS, select_from_corpus
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.interruption import watching
from rpt_jax.train.domains import load_proxy
from rpt_jax.train.progress import console
from rpt_jax.train.run import prepare
from rpt_jax.train.stages.warm_start import warm_start


def score(config: Config) -> dict:
    """Score the corpus, select positions, and write positions.json and the plots. Return the figures.

    Raises:
        ConfigError: the selector uses no proxy.
        Interrupted: a stop signal arrived; the scores so far are kept.
    """
    if config.positions.selector in UNSCORED_SELECTORS:
        raise ConfigError(
            f"positions.selector={config.positions.selector!r} uses no proxy; scoring requires a selector that does. "
            "Choose entropy_threshold or entropy_top_fraction."
        )
    started = time.perf_counter()
    run = prepare(config)
    read = time.perf_counter()
    params = None if config.proxy.path else warm_start(run)
    warm = time.perf_counter()
    corpus = run.domain.training_positions(run, *load_proxy(run, params))
    is_new = not corpus.is_scored
    selection = select_from_corpus(corpus, config.positions, seed=config.run.seed)
    seconds = time.perf_counter() - warm
    num_tokens = int(corpus.lengths.sum())
    counts = position_report.entropy_counts(corpus, selection.table)
    figures = {
        "documents": len(corpus.documents),
        "tokens": num_tokens,
        "positions": int(counts.all.sum()),
        "selected": len(selection.table),
        "selector": config.positions.selector,
        "threshold_nats": selection.threshold,
        "reading_seconds": read - started,
        "scoring_seconds": seconds,
        "scored_now": is_new,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_bytes": peak_bytes(),
    }
    directory = Path(config.run.directory)
    (directory / "positions.json").write_text(json.dumps(figures, indent=2))
    position_report.write_picture(directory / "positions.png", counts, selection.threshold)
    position_report.write_sample(
        directory / "positions.html", corpus.part(0), selection, corpus.documents, run.tokenizer
    )
    run.directory.close()
    return figures


def main(argv: list[str]) -> None:
    """Score the preset's corpus and print the figures."""
    config, dry_run = parse_config(argv)
    if dry_run:
        print(describe(config))
        return
    with watching(config.distributed.deadline_seconds):
        print(json.dumps(score(config), indent=2))
    console.print(f"plots: [bold]{config.run.directory}/positions.png[/], positions.html")


if __name__ == "__main__":
    run_script(main)
