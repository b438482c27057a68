"""Measure the peak host memory of loading a Hugging Face checkpoint onto one device.

python -m experiments.benchmarks.load_memory [--gigabytes 2] [--directory DIR]

The script writes a synthetic bfloat16 checkpoint in one file (kept with --directory) and loads it in a separate
process. It prints JSON: size of the checkpoint and of its largest tensor, peak resident memory, seconds, and whether
the peak is within the bound of checkpoint + largest tensor + 500 MB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.memory import peak_bytes


def write_synthetic(directory: Path, gigabytes: float) -> None:
    """Write a Qwen3-shaped checkpoint of about this size, filled with ones."""
    import jax
    import jax.numpy as jnp

    from rpt_jax.config import DecoderConfig, MeshConfig
    from rpt_jax.models.decoder import abstract_params
    from rpt_jax.models.hf import save_hf
    from rpt_jax.parallel.mesh import make_mesh

    shape = dict(vocab_size=32_000, width=2048, mlp_width=8192, num_heads=16, num_kv_heads=4, head_size=128)
    layer_bytes = 2 * (2 * 2048 * 16 * 128 + 2 * 2048 * 4 * 128 + 3 * 2048 * 8192)
    top_bytes = 2 * 2 * 32_000 * 2048
    num_layers = max(1, round((gigabytes * 1e9 - top_bytes) / layer_bytes))
    config = DecoderConfig(num_layers=num_layers, **shape)
    params = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bfloat16), abstract_params(config, make_mesh(MeshConfig())))
    save_hf(directory, config, params, max_shard_bytes=2**62)


def load(directory: Path) -> None:
    """Load the checkpoint and print its peak memory and seconds as JSON."""
    import jax

    from rpt_jax.models.hf import load_hf

    start = time.perf_counter()
    _, params = load_hf(directory)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": seconds}))


def main(argv: list[str]) -> None:
    """Write the checkpoint if it is missing, load it in a separate process and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, help="directory for the checkpoint; default: a temporary one")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary) / "checkpoint"
        if not directory.exists():
            write_synthetic(directory, args.gigabytes)
        file = directory / "model.safetensors"
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        offsets = [e["data_offsets"] for n, e in json.loads(header).items() if n != "__metadata__"]
        largest, size = max(end - begin for begin, end in offsets), file.stat().st_size
        command = [sys.executable, "-m", "experiments.benchmarks.load_memory", "--load", str(directory)]
        out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    bound = size + largest + 500_000_000
    figures = {"checkpoint_bytes": size, "largest_tensor_bytes": largest, "bound_bytes": bound} | out
    print(json.dumps(figures | {"is_within_bound": out["peak_bytes"] <= bound}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
