"""Runs in processes of their own: one, or several on one machine that act as hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rpt_jax.data import synthetic

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(directory: Path) -> Path:
    synthetic.write_corpus(directory, seed=0, num_train=60, num_heldout=30, short_sequences=40, long_sequences=40)
    return directory


def flags(corpus: Path, run: Path, *extra: str) -> list[str]:
    """A run of all stages but the control, seconds long."""
    settings = {
        "--preset": "tiny_worked", "--run.directory": run, "--run.num-steps": 4, "--run.completions-every-steps": 1,
        "--data.path": corpus / "train.jsonl", "--data.heldout-path": corpus / "heldout.jsonl",
        "--data.tokenizer": corpus / "tokenizer", "--positions.entropy-threshold": 0.5, "--model.num-layers": 2,
        "--model.width": 32, "--model.mlp-width": 48, "--model.num-heads": 2, "--model.num-kv-heads": 2,
        "--model.head-size": 16, "--supervised.path": corpus / "warm_start.jsonl", "--supervised.num-steps": 4,
        "--supervised.batch-size": 20, "--rollout.num-trunks": 8, "--rollout.group-size": 4,
        "--rollout.max-completion-tokens": 30, "--mesh.microbatch-trunks": 4, "--checkpoint.every-steps": 2,
        "--eval.every-steps": 2, "--eval.num-positions": 10, "--eval.final-num-positions": 12, "--eval.num-samples": 2,
        "--eval.batch-trunks": 16,
    }  # fmt: skip
    words = [str(word) for pair in settings.items() for word in pair]
    return [*words, "--run.no-tensorboard", "--run.no-control", *extra]


def start(
    arguments: list[str], log: Path, *, devices: int = 1, module: str = "experiments.train", **environment: str
) -> subprocess.Popen:
    """A script, its output in `log`. Programs that were compiled once are kept for all processes."""
    environment = (
        os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        | environment
    )
    with log.open("ab") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def start_hosts(arguments: list[str], logs: list[Path], *, devices: int, **environment: str) -> list[subprocess.Popen]:
    """As many processes as logs, joined over loopback."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = [
        *arguments,
        "--distributed.coordinator",
        f"localhost:{port}",
        "--distributed.num-processes",
        str(len(logs)),
    ]
    return [
        start([*shared, "--distributed.process-id", str(i)], log, devices=devices, **environment)
        for i, log in enumerate(logs)
    ]


def finish(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit statuses; processes that are still there after so long are killed, and fail the test."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
