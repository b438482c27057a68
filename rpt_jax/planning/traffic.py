"""Traffic of a compiled program between devices, read from its text.

Each collective counts once per run of the loops around it, over the mesh axes that its groups span.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<inside>[^}]*)\}"
)
# The TPU compiler spreads an asynchronous collective over fusions with other work. Each repeats the whole collective.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")


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
    computations, entry = _computations(text)
    found: dict[tuple, tuple[float, str, str, float]] = {}
    for name, runs in _runs(computations, entry, unknown_trips).items():
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


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return {name: lines} of all computations, and the name of the entry computation."""
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = []
        else:
            lines.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str, unknown_trips: float) -> dict[str, float]:
    """Return {name: number of runs} of all computations."""
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float, unknown: float) -> None:
        runs[name] += times
        for line in computations.get(name, ()):
            if " while(" in line:
                condition, body = (re.search(rf"{role}=%([\w.\-]+)", line)[1] for role in ("condition", "body"))
                trips = _trips(line, *(computations.get(name, ()) for name in (condition, body)))
                visit(body, times * (unknown if trips is None else trips), 1.0 if trips is None else unknown)
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                for branch in re.findall(r"%([\w.\-]+)", branches[1]):
                    visit(branch, times, unknown)
            else:
                for called in _CALLED.findall(line):
                    if called in computations:
                        visit(called, times, unknown)

    visit(entry, 1.0, unknown_trips)
    return {name: times for name, times in runs.items() if name in computations}


def _trips(line: str, condition, body) -> float | None:
    """Return the trip count of a loop: as XLA notes it, else from the constant limit and step of its counter.

    None: it depends on data.
    """
    if noted := re.search(r'known_trip_count[^}]*"n":"(\d+)"', line):
        return float(noted[1])
    root = next((c for c in condition if "ROOT" in c), "")
    compared = re.search(r"compare\([^%]*%([\w.\-]+),[^%]*%([\w.\-]+)\), direction=LT", root)
    if not compared:
        return None
    counter, bound = (_definition(condition, name) for name in compared.groups())
    index, limit = re.search(r"get-tuple-element\(.*index=(\d+)", counter), re.search(r"constant\((\d+)\)", bound)
    if not index or not limit:
        return None
    # The counter of an unrolled loop grows by more than one.
    results = next((c for c in body if "ROOT" in c), "").rpartition(" tuple(")[2]
    result = re.findall(r"%([\w.\-]+)", results.partition(")")[0])
    grown = _definition(body, result[int(index[1])]) if int(index[1]) < len(result) else ""
    added = re.search(r" add\((.*?)\)", grown)
    names = re.findall(r"%([\w.\-]+)", added[1]) if added else ()
    steps = [re.search(r"constant\((\d+)\)", _definition(body, name)) for name in names]
    step = next((int(s[1]) for s in steps if s), 1)
    return float(-(-int(limit[1]) // step))


def _definition(computation, name: str) -> str:
    """Return the line that defines a value, or an empty string."""
    return next((c for c in computation if re.match(rf"\s*(?:ROOT )?%?{re.escape(name)} = ", c)), "")


def _arrays(shape: str) -> list[int]:
    """Return the bytes of each array in the text of a shape or tuple."""
    return [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]


def _sent(kind: str, shape: str, n: int, is_start: bool, computation: str) -> float:
    arrays = _arrays(shape)
    # The start of an asynchronous operation lists operands before results; that of a reduction lists only results.
    if is_start and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    elif is_start and kind == "collective-permute":
        arrays = arrays[:1]
    size = sum(arrays)
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
