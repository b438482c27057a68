"""Compare a GRPO step of this package, TRL and Tunix, alternating in one run on two CPU cores.

python -m experiments.benchmarks.peers --shape rpt|questions [--alternations 3] [--json FILE]
    [--implementations rpt_jax trl trl_one_pass tunix tunix_tensor]

A step is a rollout (prompts in, completions and rewards out) and one AdamW update on it: no KL term, group size 8,
temperature 1, float32. All implementations use the same token ids, number of sampled tokens, reward and model: Qwen3
blocks, 8 layers, width 256, tied embeddings, 10.0 M random parameters.

Every implementation runs in a separate process, which idles during the turns of the others. Each peer has a separate
environment, created on first use in .venv-peers/. The first step compiles and does not count. Figures are medians.
Memory is the peak resident set of the process, including libraries and compilation. A speed-up is relative to the peer
that is fastest in that quantity. The script writes JSON, a chart and the workers' logs.

This package runs on two devices of one core each, with half of the trunks on each. tunix runs on one device with two
threads, which samples fastest; tunix_tensor runs on two devices that share each matrix, which updates fastest. trl runs
8 rows per pass of its update, its fastest setting; trl_one_pass, on request, runs all rows in one pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from experiments.benchmarks.memory import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
NUM_CORES = 2
GROUP_SIZE = 8
LEARNING_RATE = 1e-6
VOCABULARY = 8192
# Stop token of rpt_jax and TRL. It is in no prompt and never sampled, so every completion has full length.
STOP_ID = VOCABULARY - 1
QUANTITIES = ("step", "rollout", "update")
# For each implementation, the name of its environment and worker module, and the worker's options.
IMPLEMENTATIONS = {
    "rpt_jax": ("rpt_jax",),
    "trl": ("trl",),
    "trl_one_pass": ("trl", "--one-pass"),
    "tunix": ("tunix",),
    "tunix_tensor": ("tunix", "--tensor", str(NUM_CORES)),
}
DEFAULT = ("rpt_jax", "trl", "tunix", "tunix_tensor")


class PeerError(RuntimeError):
    """A worker or the installation of its environment failed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Prompts of a batch: each document is cut at each of `cuts`, and the same tail follows every cut.

    Implementations without trunks get every prompt in full; this package gets each document once, with its cuts.

    Attributes:
        num_documents: number of documents.
        cuts: document tokens that each of its prompts contains.
        tail_tokens: tokens of the tail.
        new_tokens: tokens of each completion.
    """

    num_documents: int
    cuts: tuple[int, ...]
    tail_tokens: int
    new_tokens: int

    @property
    def num_prompts(self) -> int:
        """Number of prompts in a batch."""
        return self.num_documents * len(self.cuts)

    @property
    def tokens_sampled(self) -> int:
        """Number of tokens that a step samples."""
        return self.num_prompts * GROUP_SIZE * self.new_tokens

    def documents(self) -> np.ndarray:
        """Return the documents, i32 [documents, longest cut]: the same random ids for every implementation."""
        return np.random.default_rng(0).integers(0, STOP_ID, (self.num_documents, max(self.cuts)), np.int32)

    def tail(self) -> np.ndarray:
        """Return the tail of every prompt, i32 [tail tokens]."""
        return np.random.default_rng(1).integers(0, STOP_ID, self.tail_tokens, np.int32)

    def prompts(self) -> list[np.ndarray]:
        """Return every prompt as one sequence of ids, ordered by document."""
        return [np.concatenate([d[:cut], self.tail()]) for d in self.documents() for cut in self.cuts]


SHAPES = {
    # Positions near the end of their windows, where contexts are long: 16 prompts of 488 to 536 tokens.
    "rpt": Shape(num_documents=4, cuts=(464, 480, 496, 512), tail_tokens=24, new_tokens=64),
    # A question is a document with one cut; the tail represents the end of the template. 8 prompts of 128 tokens.
    "questions": Shape(num_documents=8, cuts=(120,), tail_tokens=8, new_tokens=128),
}


def reward(tokens) -> float:
    """Return the mean token id of a completion, divided by the vocabulary size.

    The rewards of a group all differ and none equals their mean, so every rollout has an advantage. An implementation
    that skips rows without an advantage thus has to run all of them.
    """
    return float(np.mean(tokens)) / VOCABULARY


class Turns:
    """The worker's side: waits for its turn, times the parts of a step and reports them."""

    def __init__(self, answers_fd: int):
        self._answers = os.fdopen(answers_fd, "w")

    def wait(self) -> bool:
        """Block until the driver requests a step, then start the clocks. Return False if no more steps follow."""
        line = sys.stdin.readline()
        if not line or json.loads(line)["command"] != "step":
            return False
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        return True

    def rolled_out(self, tokens_sampled: int) -> None:
        """Record that completions and rewards are ready; the rest of the step is the update."""
        self._rollout_end, self._tokens_sampled = time.perf_counter(), tokens_sampled

    def answer(self) -> None:
        """Stop the clocks and report the step to the driver."""
        end = time.perf_counter()
        figures = {
            "rollout_seconds": self._rollout_end - self._start,
            "update_seconds": end - self._rollout_end,
            "step_seconds": end - self._start,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "tokens_sampled": self._tokens_sampled,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(figures), file=self._answers, flush=True)


def as_worker(parser: argparse.ArgumentParser | None = None) -> tuple[Shape, Turns, argparse.Namespace]:
    """Parse a worker's command line.

    Args:
        parser: with further options of the worker; None: the common ones only.
    Returns:
        (shape, turns, all arguments).
    """
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--answers-fd", type=int, required=True)
    args = parser.parse_args()
    return SHAPES[args.shape], Turns(args.answers_fd), args


def environment(name: str) -> Path:
    """Return the Python interpreter of an environment; install a peer on first use and when its requirements change.

    Raises:
        PeerError: pip failed.
    """
    if name == "rpt_jax":
        return Path(sys.executable)
    requirements = ROOT / f"experiments/benchmarks/peers_requirements_{name}.txt"
    directory = ROOT / ".venv-peers" / name
    python, installed = directory / "bin/python", directory / "installed.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"{name}: installing {requirements.name} in {directory}", flush=True)
        venv.create(directory, clear=True, symlinks=True, with_pip=True)
        if subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements]).returncode:
            raise PeerError(f"{name}: pip failed to install {requirements}; see its message above")
        installed.write_text(requirements.read_text())
    return python


class Worker:
    """The driver's side of one implementation's process."""

    def __init__(self, name: str, shape: str, log: Path):
        self.name, self._shape, self._log = name, SHAPES[shape], log
        module, *options = IMPLEMENTATIONS[name]
        python = environment(module)
        read_fd, write_fd = os.pipe()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(NUM_CORES))
        command = [python, "-m", f"experiments.benchmarks.peer_{module}", *options]
        command += ["--shape", shape, "--answers-fd", str(write_fd)]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | threads | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write_fd],
                text=True,
            )
        os.close(write_fd)
        self._answers = os.fdopen(read_fd)

    def step(self) -> dict:
        """Run one step in the process.

        Raises:
            PeerError: the process exited, or sampled the wrong number of tokens.
        """
        try:
            print(json.dumps({"command": "step"}), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-30:])
            raise PeerError(f"{self.name} exited with status {self._process.wait()}; the end of {self._log}:\n{tail}")
        figures = json.loads(line)
        if figures["tokens_sampled"] != self._shape.tokens_sampled:
            raise PeerError(
                f"{self.name} sampled {figures['tokens_sampled']} tokens; the shape needs {self._shape.tokens_sampled}"
            )
        return figures

    def stop(self) -> None:
        """Ask the process to stop. Kill it if it has not exited after 20 seconds."""
        try:
            self._process.communicate(json.dumps({"command": "stop"}) + "\n", timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def summarise(samples: dict[str, list[dict]]) -> dict:
    """Return the medians and peak memory of each implementation, and this package's speed-ups and memory ratios.

    Args:
        samples: {implementation: figures of each counted step}, from `measure`.
    """
    figures = {
        name: {key: statistics.median(s[key] for s in steps) for key in steps[0]}
        | {"peak_bytes": max(s["peak_bytes"] for s in steps), "samples": steps}
        for name, steps in samples.items()
    }
    summary = {"implementations": figures}
    ours, peers = figures.get("rpt_jax"), [f for name, f in figures.items() if name != "rpt_jax"]
    if ours and peers:
        for quantity in QUANTITIES:
            key = f"{quantity}_seconds"
            summary[f"speedup_{quantity}"] = min(p[key] for p in peers) / ours[key]
    for name in ("trl", "trl_one_pass"):
        if ours and name in figures:
            summary[f"memory_ratio_{name}"] = ours["peak_bytes"] / figures[name]["peak_bytes"]
    return summary


def draw(summary: dict, axes) -> None:
    """Draw one bar per implementation: the rollout, with the update on top."""
    figures = summary["implementations"]
    rollout, update = ([f[f"{part}_seconds"] for f in figures.values()] for part in ("rollout", "update"))
    axes.bar(list(figures), rollout, label="rollout", color="#4477aa")
    bars = axes.bar(list(figures), update, bottom=rollout, label="update", color="#ee6677")
    axes.bar_label(bars, labels=[f"{f['step_seconds']:.1f} s" for f in figures.values()], padding=2)
    axes.margins(y=0.12)
    axes.set(ylabel="seconds per GRPO step", title=f"{summary['shape']}, {NUM_CORES} CPU cores")
    axes.legend(frameon=False)


def show(summary: dict) -> None:
    """Print the medians as a table, and the ratios."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(f"{q}, s" for q in QUANTITIES), "CPU, s", "sampled/s", "peak, GiB")
    for name, f in summary["implementations"].items():
        seconds = [f"{f[f'{key}_seconds']:.2f}" for key in (*QUANTITIES, "cpu")]
        rate, peak = f["tokens_sampled"] / f["rollout_seconds"], f["peak_bytes"] / 2**30
        table.add_row(name, *seconds, f"{rate:.0f}", f"{peak:.2f}")
    console = Console()
    console.print(table)
    for key in [k for k in summary if k.startswith(("speedup_", "memory_ratio_"))]:
        console.print(f"{key} {summary[key]:.2f}")


def measure(names, shape: str, alternations: int, logs: Path) -> dict[str, list[dict]]:
    """Run one step of each implementation in turn; return {implementation: figures of each counted step}."""
    workers, samples = [], {name: [] for name in names}
    try:
        for name in names:
            workers.append(Worker(name, shape, logs.with_name(f"{logs.name}_{name}.log")))
            print(f"{name}: warm-up {workers[-1].step()['step_seconds']:.1f} s", flush=True)
        for turn in range(alternations):
            for worker in workers:
                samples[worker.name].append(step := worker.step())
                parts = ", ".join(f"{q} {step[f'{q}_seconds']:.2f} s" for q in QUANTITIES)
                print(f"{turn + 1}/{alternations} {worker.name}: {parts}", flush=True)
    finally:
        for worker in workers:
            worker.stop()
    return samples


def main(argv: list[str]) -> None:
    """Run the comparison, save the figures and print a table."""
    # Imported here because the peers' environments import this module too, and TRL's has no JAX.
    from experiments.benchmarks.common import save_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--alternations", type=int, default=3, help="counted steps per implementation")
    parser.add_argument("--json", type=Path, help="default: runs/benchmarks/peers_<shape>.json")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=DEFAULT)
    args = parser.parse_args(argv)
    args.json = args.json or Path(f"runs/benchmarks/peers_{args.shape}.json")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    # Workers inherit the affinity, from which XLA sizes its thread pools.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    load = os.getloadavg()[0]
    samples = measure(args.implementations, args.shape, args.alternations, args.json.with_suffix(""))
    summary = {"shape": args.shape, "load_average_before": load} | summarise(samples)
    save_results(args, summary, partial(draw, summary))
    show(summary)


if __name__ == "__main__":
    main(sys.argv[1:])
