"""RPT on SmolLM2-135M from nothing: fetch the model, cold start, RPT, control, report.

python -m experiments.recipes.smollm2_rpt --data.path omni_math.jsonl --data.text-template '{problem}\\n\\n{solution}'
python -m experiments.recipes.smollm2_rpt --gsm8k train.jsonl      # solutions with labelled results
python -m experiments.recipes.smollm2_rpt                          # Python's language documentation
    [--preset smollm2 | smollm2_gpu] [--run.directory runs/smollm2_rpt] [--section.field VALUE ...]

Two runs: cold_start teaches the response format on drafts of the text, and rpt starts from it, so other runs can too.
Both resume: after any interruption, run the same command again. The weights are those of a Q4_1 file, dequantised.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from experiments import fetch_smollm2
from experiments.cli import describe, parse_config, run_script
from experiments.recipes.corpora import write_gsm8k, write_python_docs
from rpt_jax.config import Config
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.session import report
from rpt_jax.train.pipeline import Recipe, run_recipe
from rpt_jax.train.progress import console


def stages(config: Config) -> Recipe:
    """Return the two runs: a cold start without RPT, and RPT without a cold start."""
    shared = replace(config, data=replace(config.data, cache=config.data.cache or f"{config.run.directory}/cache"))
    start = replace(shared, run=replace(config.run, num_steps=0))
    rpt = replace(shared, policy=replace(config.policy, path=""), supervised=replace(config.supervised, num_steps=0))
    return [("cold_start", start), ("rpt", rpt)]


def with_corpus(config: Config, gsm8k: Path | None) -> Config:
    """Return the config with the path of a corpus, which is written to the run directory unless data.path names one."""
    if config.data.path or config.data.mixture:
        return config
    out = Path(config.run.directory) / ("gsm8k.jsonl" if gsm8k else "python_docs.jsonl")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_gsm8k(gsm8k, out) if gsm8k else write_python_docs(out)
    return replace(config, data=replace(config.data, path=str(out)))


def report_once(path: Path) -> None:
    """Write the report of a run that has none yet."""
    if not (path / "report.html").exists():
        report(path)


def main(argv: list[str]) -> None:
    """Fetch the model if it is missing, then run the recipe."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl")
    args, flags = parser.parse_known_args(argv)
    config, dry_run = parse_config(flags, default_preset="smollm2")
    if dry_run:
        print(describe(config))
        return
    distributed.start(config.distributed)
    console.quiet = not distributed.is_main()
    with distributed.main_first("model and corpus"):
        if not (Path(config.policy.path) / "config.json").exists():
            fetch_smollm2.main(["--out", config.policy.path])
        config = with_corpus(config, args.gsm8k)
    with watching(config.distributed.deadline_seconds):
        run_recipe(stages(config), config.run.directory, after_each=report_once)


if __name__ == "__main__":
    run_script(main)
