"""Plan a preset for TPUs or GPUs, without them: memory, arithmetic, traffic, kernels and a roofline.

python -m experiments.plan --preset rpt_qwen2_5_14b --topology v5p:4x4x4 [--json FILE] [--tail-tokens 64]
    [--no-nearest] [--section.field VALUE ...]

A slice of TPUs is v4, v5e, v5p or v6e and its shape; it requires libtpu, their compiler: pip install -e '.[tpu]'. A
host of GPUs is a100, h100 or h200 and their number, such as h100:8; it requires pip install -e '.[gpu-aot]' and ptxas,
of the CUDA 13 toolkit. On a GPU, XLA would measure which kernel is fastest for each product; here it takes its
defaults. mesh.fsdp becomes the number of chips / (data x tensor). If the run does not fit, the exit status is 3, and
the script compiles the nearest settings until some fit.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax

from experiments.cli import parse_config, run_script
from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.planning.estimate import nearest_settings
from rpt_jax.planning.plan import Plan, make_plan, on_chip
from rpt_jax.planning.topologies import describe_topology, fit_mesh, larger_topologies
from rpt_jax.train.policies import shape_of, with_shape
from rpt_jax.train.progress import console


def main(argv: list[str]) -> None:
    """Plan the preset, search for settings that fit if it does not, and print the plans."""
    # Nothing runs on a device here, so leave this machine's accelerators free.
    jax.config.update("jax_platforms", "cpu")
    # Programs for hardware that is not here cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--topology", required=not {"-h", "--help"} & set(argv))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tail-tokens", type=int, default=64)
    parser.add_argument("--no-nearest", action="store_true")
    args, rest = parser.parse_known_args(argv)
    config, _ = parse_config(rest)
    chip, devices = describe_topology(args.topology)
    if config.policy.path:
        config = replace(config, model=with_shape(config.model, shape_of(config.policy.path)))
        config.validate()
    config = on_chip(fit_mesh(config, len(devices)), chip, args.tail_tokens, console.print)

    def make(config: Config, topology: str) -> Plan:
        return make_plan(config, topology, args.tail_tokens, console.print)

    plan = make(config, args.topology)
    result = {"preset": rest, "mesh": vars(config.mesh)} | plan.to_json()
    print(describe(plan, config))
    if not plan.fits and not args.no_nearest:
        result["nearest"] = None
        for changes, topology, nearer in nearest(config, args.topology, args.tail_tokens, chip.memory):
            console.print(f"trying {' '.join(changes)}")
            found = make(nearer, topology)
            if found.fits:
                print(f"\nfits with: {' '.join(changes)}\n\n{describe(found, nearer)}")
                result["nearest"] = {"changes": changes, "plan": found.to_json()}
                break
        else:
            print("\nnone of the settings tried fits.")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if not plan.fits:
        sys.exit(3)


def nearest(config: Config, topology: str, num_tail: int, memory: float) -> Iterator[tuple[list[str], str, Config]]:
    """Yield (changes, topology, config) to compile: up to two on this topology, then up to one on each larger one.

    Args:
        config: config that does not fit.
        topology: such as v5p:4x4x4.
        num_tail: tokens of the prompt after the text.
        memory: bytes of HBM per chip.
    """
    for changes, nearer in itertools.islice(nearest_settings(config, num_tail, memory), 2):
        yield changes, topology, nearer
    for larger in larger_topologies(topology):
        try:
            bigger = fit_mesh(config, len(describe_topology(larger)[1]))
        except ConfigError:  # more chips than the batch can be split over
            return
        for changes, nearer in itertools.islice(nearest_settings(bigger, num_tail, memory), 1):
            yield [f"--topology {larger}", *changes], larger, nearer


def describe(plan: Plan, config: Config) -> str:
    """Format the plan as text tables."""
    gib, mesh, chip = 2**30, config.mesh, plan.chip
    room = max(p.peak + p.resident for p in plan.programs)
    lines = [
        f"{plan.topology}: {mesh.num_devices} chips of {chip.memory / gib:.0f} GiB, mesh data {mesh.data} x "
        f"fsdp {mesh.fsdp} x tensor {mesh.tensor}; {plan.parameters / 1e9:.2f} G parameters",
        ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in plan.sizes.items()),
        f"{'FITS' if plan.fits else 'DOES NOT FIT'}: peak {room / gib:.1f} of {chip.memory / gib:.0f} GiB",
        "",
        "memory per chip                       GiB",
        *(f"  {name:<32}{size / gib:>8.2f}" for name, size in plan.memory.items()),
        "",
        "programs          runs   temporaries, GiB   compiled in    collectives per run and chip",
    ]
    for p in plan.programs:
        moved = ", ".join(
            f"{t.kind} over {t.axes or 'all'} {t.bytes / 1e9:.2f} GB ({t.count:.0f})"
            for t in p.traffic
            if t.bytes > 1e7
        )
        lines.append(
            f"  {p.name:<14}{p.runs:>6.3g}{p.temporary / gib:>19.2f}{p.compile_seconds:>12.0f} s    "
            + (moved or ("too big" if not p.fits else "-"))
        )
    if not all(p.fits for p in plan.programs):
        return "\n".join(lines)
    lines += [
        "",
        "per step and chip    TFLOP   read+written, GB   sent, GB   least, GB   ratio     seconds   limited by",
    ]
    for p in plan.phases:
        ratio = p["traffic"] / p["least_traffic"] if p["least_traffic"] else float("nan")
        lines.append(
            f"  {p['name']:<14}{p['flops'] / 1e12:>12.1f}{p['bytes'] / 1e9:>19.1f}{p['traffic'] / 1e9:>11.1f}"
            f"{p['least_traffic'] / 1e9:>12.1f}{ratio:>8.2f}{max(p['seconds'].values()):>12.2f}   {p['limited_by']}"
        )
    lines += [f"  a step takes at least {plan.seconds:.1f} s (roofline, all completions at full length)"]
    return "\n".join([*lines, *(describe_kernels(plan, config) if chip.platform == "gpu" else ())])


def describe_kernels(plan: Plan, config: Config) -> list[str]:
    """Format the kernels of a plan for GPUs as lines of a table."""
    gib, mib = 2**30, 2**20
    lines = ["", "kernels                      number   written, GiB   by attention   largest copy, MiB"]
    for p in plan.programs:
        rows = {f"{p.name}, a run": p.kernels, f"{p.name}, a token": p.token_kernels}
        for name, kernels in rows.items():
            if kernels is not None:
                lines.append(
                    f"  {name:<22}{kernels.count:>11,.0f}{kernels.written / gib:>15.2f}"
                    f"{kernels.by_attention / gib:>15.2f}{kernels.largest_copy / mib:>20.2f}"
                )
        if p.token_kernels is not None:
            lines.append(f"  {p.token_kernels.count / config.model.num_layers:.1f} kernels per layer and token")
    return lines


if __name__ == "__main__":
    run_script(main)
