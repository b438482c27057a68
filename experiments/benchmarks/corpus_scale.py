"""Read, score and select from a large corpus in bounded memory.

python -m experiments.benchmarks.corpus_scale [--gigabytes 1] [--directory DIR]

The script writes jsonl files of artificial prose (seeded, with Zipfian word frequencies) and runs
experiments.filter_positions on them in a separate process with a tiny random proxy. It prints the figures as JSON:
documents, tokens, positions, tokens per second, peak memory. DIR is kept, so a second run shows what the cache saves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_FILE_BYTES = 100_000_000


def write_prose(directory: Path, num_bytes: float) -> None:
    """Write jsonl files of about `num_bytes` in total.

    Documents have up to 2,000 words. The thousand most frequent words make up most of the text.
    """
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)])
    weights = 1 / np.arange(1, len(words) + 1)
    directory.mkdir(parents=True, exist_ok=True)
    written, number = 0, 0
    while written < num_bytes:
        in_file = 0
        with (directory / f"part-{number:03d}.jsonl").open("w") as file:
            while in_file < min(_FILE_BYTES, num_bytes - written):
                chosen = words[rng.choice(len(words), 200_000, p=weights / weights.sum())]
                start = 0
                while start < len(chosen):
                    size = int(rng.integers(200, 2000))
                    line = json.dumps({"text": " ".join(chosen[start : start + size]) + "."}) + "\n"
                    file.write(line)
                    in_file, start = in_file + len(line), start + size
        written, number = written + in_file, number + 1


def main(argv: list[str]) -> None:
    """Write the corpus if it is missing, filter it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--directory", type=Path, help="directory for corpus and cache; default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        if not (directory / "corpus").exists():
            write_prose(directory / "corpus", args.gigabytes * 1e9)
        flags = {
            "--preset": "tiny_text",
            "--run.directory": directory / "run",
            "--data.path": directory / "corpus" / "*.jsonl",
            "--data.tokenizer-vocab-size": 1024,
            "--data.trunk-length": 128,
            "--data.window-stride": 128,
            "--positions.max-documents": 0,
            "--positions.max-tokens": 0,
            "--positions.selector": "entropy_top_fraction",
            "--positions.max-positions-per-window": 1,
            "--supervised.num-steps": 0,
            "--eval.batch-trunks": 128,
            "--model.num-layers": 1,
            "--model.width": 16,
            "--model.mlp-width": 32,
            "--model.num-heads": 1,
            "--model.num-kv-heads": 1,
            "--model.head-size": 16,
        }
        command = [sys.executable, "-m", "experiments.filter_positions"]
        command += [str(word) for pair in flags.items() for word in pair]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        size = sum(f.stat().st_size for f in (directory / "corpus").iterdir())
    print(json.dumps({"corpus_bytes": size} | figures, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
