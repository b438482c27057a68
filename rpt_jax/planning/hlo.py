"""The text of a compiled program (HLO), as XLA prints it: its computations, and how often each runs."""

import math
import re
from collections import defaultdict

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
# The computations that an instruction runs.
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
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


def count_runs(computations: dict[str, list[str]], entry: str, unknown_trips: float) -> dict[str, float]:
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
                for called in CALLED.findall(line):
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
    counter, bound = (definition(condition, name) for name in compared.groups())
    index, limit = re.search(r"get-tuple-element\(.*index=(\d+)", counter), re.search(r"constant\((\d+)\)", bound)
    if not index or not limit:
        return None
    # The counter of an unrolled loop grows by more than one.
    results = next((c for c in body if "ROOT" in c), "").rpartition(" tuple(")[2]
    result = re.findall(r"%([\w.\-]+)", results.partition(")")[0])
    grown = definition(body, result[int(index[1])]) if int(index[1]) < len(result) else ""
    added = re.search(r" add\((.*?)\)", grown)
    names = re.findall(r"%([\w.\-]+)", added[1]) if added else ()
    steps = [re.search(r"constant\((\d+)\)", definition(body, name)) for name in names]
    step = next((int(s[1]) for s in steps if s), 1)
    return float(-(-int(limit[1]) // step))


def definition(computation, name: str) -> str:
    """Return the line that defines a value, or an empty string."""
    return next((c for c in computation if re.match(rf"\s*(?:ROOT )?%?{re.escape(name)} = ", c)), "")


def arrays(shape: str) -> list[int]:
    """Return the bytes of each array in the text of a shape or tuple."""
    return [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
