"""Seconds from the start of this process to the end of each RL step; a part of `experiments.benchmarks.gpu`.

python -m experiments.benchmarks.gpu_steps DIRECTORY NAME [--dry-run]

The run is DIRECTORY/NAME, and programs are kept in DIRECTORY/programs. Prints one line of JSON at the end.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from experiments.presets import PRESETS
from rpt_jax.config import Config, DecoderConfig
from rpt_jax.train.run import prepare
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.rl import run_rl

# SmolLM2-135M's shape.
MODEL_135M = DecoderConfig(
    family="llama", vocab_size=49_152, num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3,
    head_size=64, rope_theta=1e5, norm_eps=1e-5, qk_norm=False, tie_embeddings=True, activation_dtype="bfloat16",
)  # fmt: skip


class Clock:
    """Stands in for a run's evaluations: notes when the parameters of each step exist."""

    def __init__(self):
        self._start = _process_start()
        self.ends: list[float] = []

    def at_step(self, step: int, params, flops) -> None:
        """Wait for the step and note the time."""
        jax.block_until_ready(params)
        if step:
            self.ends.append(time.time() - self._start)


def _process_start() -> float:
    """Return when this process started, in seconds since the epoch."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return float(booted.split()[1]) + ticks / 100


def make_config(directory: Path, name: str, *, is_dry: bool) -> Config:
    """Return the config of the run, and write its documents."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(2000)]
    path = directory / "documents.jsonl"
    texts = [" ".join(rng.choice(words, 1200)) for _ in range(20 if is_dry else 200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    base, small = PRESETS["text"], dict(num_layers=2, width=64, mlp_width=128, vocab_size=1024, num_heads=2)
    small |= dict(num_kv_heads=1, activation_dtype="float32")
    shape = (
        dict(num_trunks=4, prompts_per_trunk=2, group_size=2) if is_dry else dict(num_trunks=32, prompts_per_trunk=8)
    )
    return replace(
        base,
        run=replace(
            base.run, directory=str(directory / name), num_steps=3 if is_dry else 6, control=False, shapes="few",
            compilation_cache=str(directory / "programs"), completions_every_steps=0,
        ),
        data=replace(base.data, path=str(path), chat=False, template="minimal", trunk_length=512, window_stride=256),
        positions=replace(base.positions, selector="random"),
        model=replace(MODEL_135M, **small) if is_dry else MODEL_135M,
        rollout=replace(base.rollout, **shape, max_completion_tokens=48),
        mesh=replace(base.mesh, microbatch_trunks=0 if is_dry else 16),
    )  # fmt: skip


def main() -> None:
    """Run the steps."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("directory", type=Path)
    command.add_argument("name")
    command.add_argument("--dry-run", action="store_true")
    args = command.parse_args()
    clock = Clock()
    run = fitted(prepare(make_config(args.directory, args.name, is_dry=args.dry_run)))
    params = run.start_params()
    tasks = run.domain.training_tasks(run, params)
    run_rl(run, params, tasks, clock)
    print(json.dumps({"seconds_at_end_of_step": clock.ends}))


if __name__ == "__main__":
    main()
