"""Helpers that the benchmarks share: a small model and its tasks, alternating timing, saving of results."""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.types import TaskBatch

# 10.0 M parameters: 8 layers of width 256, tied embeddings. The peers use the same shape.
MODEL_S = DecoderConfig(
    family="qwen3",
    vocab_size=8192,
    num_layers=8,
    width=256,
    mlp_width=1024,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    rope_theta=1e6,
    tie_embeddings=True,
)


def make_tasks(num_trunks: int, cuts, tail: int, group_size: int, vocab_size: int, seed: int = 0) -> TaskBatch:
    """Return NumPy trunks and tails of random ids, with a prompt at each of `cuts`. Continuations are empty.

    Args:
        num_trunks: U.
        cuts: M trunk lengths that prompts see, the same for all trunks; the longest is L.
        tail: E, tokens of each tail.
        group_size: G.
        vocab_size: ids are below vocab_size - 1, because the last id is the stop token.
        seed: seed of the ids.
    """
    rng = np.random.default_rng(seed)
    U, M, G, L = num_trunks, len(cuts), group_size, max(cuts)
    trunks = rng.integers(0, vocab_size - 1, (U, L), np.int32)
    tails = rng.integers(0, vocab_size - 1, (U, M, tail), np.int32)
    batch = build_tasks(
        [(trunk, [Task(id=u * M + m, cut=cut) for m, cut in enumerate(cuts)]) for u, trunk in enumerate(trunks)],
        tail=np.zeros(tail),
        row_ids=np.arange(U * M * G, dtype=np.int32).reshape(U, M, G),
        trunk_length=L,
    )
    return replace(batch, prompts=replace(batch.prompts, tail_tokens=tails))


def alternate(functions: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """Time functions in turn. The first call of each compiles and does not count.

    A function that takes less than 50 ms is called several times per turn; the sample is the turn's mean.

    Args:
        functions: {name: function without arguments that returns a tree of arrays}.
        rounds: number of turns of each function.
    Returns:
        {name: {"median": seconds, "samples": [seconds, ...]}}.
    """

    def turn(function, number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            jax.block_until_ready(function())
        return (time.perf_counter() - start) / number

    for function in functions.values():
        turn(function, 1)
    samples, numbers = {name: [] for name in functions}, dict.fromkeys(functions, 1)
    for number in range(rounds):
        for name, function in functions.items():
            seconds = turn(function, numbers[name])
            if number == 0 and seconds < 0.05:
                numbers[name] = round(0.05 / seconds)
                seconds = turn(function, numbers[name])
            samples[name].append(seconds)
    return {name: {"median": statistics.median(s), "samples": s} for name, s in samples.items()}


def machine() -> dict:
    """Describe the machine. Ratios between programs depend on CPU family and vector units (None if not Linux)."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    family = re.search(r"cpu family\s*: (.*)", cpuinfo)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "family": int(family[1]) if family else None,
        "avx512": bool(re.search(r"\bavx512f\b", cpuinfo)) if cpuinfo else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": metadata.version("jax"),
        "date": datetime.date.today().isoformat(),
    }


def parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """Return a parser with the shared options, --rounds and --json.

    Args:
        doc: the script's docstring, for --help.
        **defaults: name of the JSON file, and optionally rounds; None for a benchmark without rounds.
    """
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if (rounds := defaults.get("rounds", 5)) is not None:
        result.add_argument("--rounds", type=int, default=rounds, help="alternations")
    result.add_argument("--json", type=Path, default=Path(f"runs/benchmarks/{defaults['name']}.json"))
    return result


def save_results(args: argparse.Namespace, figures: dict, draw: Callable, panels: int = 1) -> None:
    """Write figures as JSON with the command and the machine, and as a plot; print the JSON.

    Args:
        args: arguments from `parser`.
        figures: a JSON-able dict.
        draw: called with one axes object per panel.
        panels: number of panels, side by side.
    """
    from rpt_jax.analysis.reports.figures import subplots

    command = " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
    record = {"command": command, "machine": machine()} | figures
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    figure, axes = subplots(1, panels, figsize=(7 if panels == 1 else 3.6 * panels, 4), layout="constrained")
    draw(*np.atleast_1d(axes))
    figure.savefig(args.json.with_suffix(".png"), dpi=130)
    print(json.dumps(record, indent=2))
