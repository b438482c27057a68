"""Traffic of a compiled program between devices, read from its text.

Each collective counts once per run of the loops around it, over the mesh axes that its groups span.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from rpt_jax.planning.hlo import arrays, count_runs, split_computations

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<inside>[^}]*)\}"
)
# The TPU compiler spreads an asynchronous collective over fusions with other work. Each repeats the whole collective.
_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, in one run of a program."""

    kind: str
    """One of `_KINDS`."""
    axes: str
    """Names of the mesh axes, joined by +."""
    count: float
    """Number of runs of these collectives."""
    bytes: float
    """Bytes that each device sends in all of them. With n devices in a group, one run sends (n - 1) / n of a gathered
    or scattered array, twice that of a reduced one, and a permuted array whole."""


def read_traffic(text: str, axes: dict[str, int], *, unknown_trips: float = 1.0) -> list[Traffic]:
    """Return the collectives of a program, added up by kind and axes.

    Args:
        text: the compiled program, as XLA prints it.
        axes: the mesh's axes and sizes; devices are numbered in the mesh's order.
        unknown_trips: assumed trip count of a loop whose trip count depends on data; inside such a loop, another one
            runs once per iteration.
    """
    computations, entry = split_computations(text)
    found: dict[tuple, tuple[float, str, str, float]] = {}
    for name, runs in count_runs(computations, entry, unknown_trips).items():
        for number, line in enumerate(computations[name]):
            if match := _COLLECTIVE.search(line):
                kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
                group = _group(line, kind)
                chain = _CHAIN.search(line)
                one = ("chain", chain[1]) if chain else (name, number)
                # Parts of a chain inside loops run more often than its start.
                if len(group) > 1 and (one not in found or runs < found[one][0]):
                    sent = _sent(kind, match[1], len(group), match[3] is not None, name)
                    found[one] = runs, kind, _spanned(group, axes), sent
    counts: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for runs, kind, spanned, sent in found.values():
        total = counts[kind, spanned]
        total[0] += runs
        total[1] += runs * sent
    return [
        Traffic(kind=kind, axes=spanned, count=count, bytes=sent)
        for (kind, spanned), (count, sent) in sorted(counts.items())
    ]


def _sent(kind: str, shape: str, n: int, is_start: bool, computation: str) -> float:
    sizes = arrays(shape)
    # The start of an asynchronous operation lists operands before results; that of a reduction lists only results.
    if is_start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]
    elif is_start and kind == "collective-permute":
        sizes = sizes[:1]
    size = sum(sizes)
    if kind == "reduce-scatter":
        # If the TPU compiler fuses it, it is written as a reduction of the whole array.
        return size * (n - 1) / n if "all-reduce-scatter" in computation else size * (n - 1)
    if kind == "collective-permute":
        return float(size)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(line: str, kind: str) -> list[int]:
    """Return the devices of the first group."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
        return [int(pairs[1]), int(pairs[2])] if pairs else []
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(i) for i in explicit[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = ([int(i) for i in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(math.prod(source)).reshape(source)
        return (numbers if order is None else numbers.transpose(order)).reshape(shape)[0].tolist()
    if named := _NAMED_GROUPS.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named["sizes"])}
        inside = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named["inside"])]
        numbers = np.arange(math.prod(sizes.values()))
        if named["source"]:
            numbers = numbers.reshape([int(i) for i in named["source"].split(",")])
            numbers = numbers.transpose([int(i) for i in named["order"].split(",")]) if named["order"] else numbers
        numbers = numbers.reshape(list(sizes.values()))
        rest = [axis for axis in range(numbers.ndim) if axis not in inside]
        return numbers.transpose(rest + inside).reshape(-1, math.prod(numbers.shape[i] for i in inside))[0].tolist()
    raise ValueError(f"cannot read the device groups of a collective: {line.strip():.300}")


def _spanned(group: list[int], axes: dict[str, int]) -> str:
    coordinates = np.stack(np.unravel_index(group, list(axes.values())))
    return "+".join(name for name, row in zip(axes, coordinates, strict=True) if len(set(row.tolist())) > 1)
