"""Kernels of a program compiled for GPUs: how many run and how much they write, read from the program's text."""

import re
from dataclasses import dataclass

from rpt_jax.planning.hlo import CALLED, arrays, count_runs, definition, split_computations

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)")
# Instructions that start no kernel: they name, group or wait for the results of others.
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "async-start",
}  # fmt: skip
# Instructions whose called computations run as part of them.
_CONTROL = {"while", "conditional", "call", "async-start"}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Kernels of one run of a program, or of one iteration of its loop."""

    count: float
    """Kernels that are started."""
    written: float
    """Bytes of their results. An array that is updated in place counts as the part that changes."""
    by_attention: float
    """Bytes written by attention's kernels."""
    largest_copy: int
    """Bytes of the largest copy."""


def read_kernels(text: str, *, unknown_trips: float) -> tuple[Kernels, Kernels | None]:
    """Return the kernels of (one run, one iteration of the loop whose trip count depends on data; None without one).

    Args:
        text: the compiled program, as XLA prints it.
        unknown_trips: assumed trip count of that loop.
    """
    computations, entry = split_computations(text)
    fused = set()
    for line in (line for lines in computations.values() for line in lines):
        if (found := _INSTRUCTION.match(line)) and found[3] not in _CONTROL:
            fused.update(CALLED.findall(line))
    runs, outside = (
        {name: n for name, n in count_runs(computations, entry, trips).items() if name not in fused}
        for trips in (1.0, 0.0)
    )
    inside = {name: n for name, n in runs.items() if not outside.get(name)}
    once = _add_up(computations, {name: n for name, n in runs.items() if name not in inside})
    if not inside:
        return once, None
    loop = _add_up(computations, inside)
    whole = Kernels(
        count=once.count + unknown_trips * loop.count,
        written=once.written + unknown_trips * loop.written,
        by_attention=once.by_attention + unknown_trips * loop.by_attention,
        largest_copy=max(once.largest_copy, loop.largest_copy),
    )
    return whole, loop


def _add_up(computations: dict[str, list[str]], runs: dict[str, float]) -> Kernels:
    count, written, by_attention, largest_copy = 0.0, 0.0, 0.0, 0
    for name, times in runs.items():
        for line in computations[name]:
            found = _INSTRUCTION.match(line)
            if not found or found[3] in _FREE or found[3].endswith("-done"):
                continue
            size = _written(found, computations, name)
            count, written = count + times, written + times * size
            if re.search(r'op_name="[^"]*attention', line):
                by_attention += times * size
            if found[3].startswith("copy"):
                largest_copy = max(largest_copy, size)
    return Kernels(count=count, written=written, by_attention=by_attention, largest_copy=largest_copy)


def _written(found: re.Match, computations: dict[str, list[str]], computation: str) -> int:
    """Return the bytes that an instruction writes."""
    line, kind, sizes = found[0], found[3], arrays(found[2])
    if kind == "copy-start":
        return sizes[0]
    if kind == "fusion":
        called = computations[CALLED.search(line)[1]]
        root = next(other for other in called if "ROOT" in other)
        parts = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
        results = [definition(called, name) for name in parts] or [root] * len(sizes)
        return sum(_changed(result, called, size) for result, size in zip(results, sizes, strict=True))
    if kind == "dynamic-update-slice":
        return _changed(line, computations[computation], sizes[0])
    # Results that share an argument's buffer are updated in places that the text does not tell.
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\s*\}", line)
    shared = {int(n or 0) for n in re.findall(r"\{(\d*)\}: \(", aliased[1])} if aliased else set()
    return sum(size for i, size in enumerate(sizes) if i not in shared)


def _changed(line: str, called: list[str], size: int) -> int:
    """Return the bytes that one result of a fusion changes: those of the update, if it is an update in place."""
    while (found := _INSTRUCTION.match(line)) and found[3] == "bitcast":
        line = definition(called, re.search(r"%([\w.\-]+)", found[4])[1])
    if not found or found[3] != "dynamic-update-slice":
        return size
    update = definition(called, re.findall(r"%([\w.\-]+)", found[4])[1])
    return sum(arrays(_INSTRUCTION.match(update)[2]))
