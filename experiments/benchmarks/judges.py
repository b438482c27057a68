"""Count the errors of the mathematics judge, and of math-verify alone, on the answers of real question files.

python -m experiments.benchmarks.judges QUESTIONS... [--limit N] [--show] [--json FILE]

QUESTIONS are question files (docs/corpora.md). From each accepted answer come spellings of the same answer, which must
be accepted, and other answers, which must not. Each kind is counted on its own: the answers that it applies to, and the
errors of both judges. --show prints every error. A hand-written list of pairs is judged last.
"""

import logging
import re
import time
from collections.abc import Callable

from experiments.benchmarks.common import parser, save_results
from rpt_jax.data.questions import read_questions
from rpt_jax.rewards.host import JudgePool

_INTEGER = re.compile(r"\d+")
# One number, possibly a fraction or a root, without a sign.
_NUMBER = re.compile(r"(?:\d+(?:\.\d+)?)?\s*(?:\\[dt]?frac\{\d+\}\{\d+\}|\\sqrt\{?\d+\}?|\\pi)?")
_PAIR = re.compile(r"\(([^(){}\[\],]+),([^(){}\[\],]+)\)")


def _is_number(answer: str) -> bool:
    return bool(answer) and bool(_NUMBER.fullmatch(answer)) and bool(re.search(r"[1-9]", answer))


def _next_integer(answer: str, which: int) -> str | None:
    found = list(_INTEGER.finditer(answer))
    if not found:
        return None
    digits = found[which]
    return f"{answer[: digits.start()]}{str(int(digits[0]) + 1).zfill(len(digits[0]))}{answer[digits.end() :]}"


def _swapped(answer: str) -> str | None:
    found = _PAIR.search(answer)
    if not found or found[1].strip() == found[2].strip():
        return None
    return f"{answer[: found.start()]}({found[2].strip()}, {found[1].strip()}){answer[found.end() :]}"


def _when(applies: Callable[[str], bool], change: Callable[[str], str]):
    return lambda answer: change(answer) if applies(answer) else None


def _decimal(answer: str) -> str | None:
    found = re.fullmatch(r"\\frac\{(\d+)\}\{(2|4|5|8|10|20|25|50)\}", answer)
    return f"{int(found[1]) / int(found[2])!r}" if found else None


def _reversed_set(answer: str) -> str | None:
    found = re.fullmatch(r"\\\{([^(){}\[\]]+,[^(){}\[\]]+)\\\}", answer)
    return "\\{" + ", ".join(reversed(found[1].split(","))) + "\\}" if found else None


OTHERS: dict[str, Callable[[str], str | None]] = {
    "last integer + 1": lambda answer: _next_integer(answer, -1),
    "first integer + 1": lambda answer: _next_integer(answer, 0),
    "sign": _when(_is_number, lambda answer: "-" + answer),
    "hedge: or another": _when(_is_number, lambda answer: f"{answer} \\text{{ or }} {_next_integer(answer, -1)}"),
    "hedge: a list": _when(_is_number, lambda answer: f"{answer}, {_next_integer(answer, -1)}"),
    "a false equation": _when(_is_number, lambda answer: f"{_next_integer(answer, -1)} = {answer}"),
    "a million of it": _when(_is_number, lambda answer: f"{answer} \\text{{ million}}"),
    "residue of a modulus + 1": _when(lambda a: r"\pmod" in a, lambda answer: _next_integer(answer, -1)),
    "pair in the other order": _swapped,
    "set for a pair": _when(lambda answer: bool(_PAIR.fullmatch(answer)), lambda answer: "\\{" + answer[1:-1] + "\\}"),
}
# Changes that leave the value as it was.
_STILL_EQUAL = {
    r"\binom{4025}{2013}",
    r"\frac{\left(\left\lfloor\frac{2018-1337}{2}\right\rfloor\right)}{2^{2017}}",
}
SAME: dict[str, Callable[[str], str | None]] = {
    "itself": lambda answer: answer,
    "in dollars": _when(lambda answer: "$" not in answer, lambda answer: f"${answer}$"),
    "a full stop": lambda answer: f"{answer}.",
    "\\dfrac": _when(lambda answer: "\\frac" in answer, lambda answer: answer.replace("\\frac", "\\dfrac")),
    "\\left(": _when(
        lambda answer: "(" in answer and "\\left" not in answer and "\\(" not in answer,
        lambda answer: answer.replace("(", "\\left(").replace(")", "\\right)"),
    ),
    "x =": _when(_is_number, lambda answer: f"x = {answer}"),
    "a sentence": _when(_is_number, lambda answer: f"The answer is {answer}"),
    "a unit": _when(_is_number, lambda answer: f"{answer} \\text{{ cm}}"),
    "a bare unit": _when(_is_number, lambda answer: f"{answer} dollars"),
    "thousands": _when(
        lambda answer: bool(re.fullmatch(r"\d{4,}", answer)), lambda answer: f"{int(answer):,}"
    ),
    "a decimal": _decimal,
    "set in another order": _reversed_set,
}  # fmt: skip

# (accepted answer, another answer, whether it is the same)
PAIRS = [
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False),
    ("12 \\text{ cm}", "12 \\text{ km}", False),
    ("12 \\text{ cm}^2", "12 \\text{ cm}", False),
    ("12 \\text{ cm}^2", "12 \\text{ square centimeters}", True),
    ("(1, 2)", "\\{1, 2\\}", False),
    ("\\{1, 2\\}", "(1, 2)", False),
    ("\\{1, 2\\}", "2, 1", True),
    ("x \\equiv 3 \\pmod 7", "x \\equiv 4 \\pmod 7", False),
    ("x \\equiv 3 \\pmod 7", "x \\equiv 10 \\pmod{7}", True),
    ("1604_8", "1604_9", False),
    ("1604", "1604_8", False),
    ("1604_8", "1604", True),
    ("\\begin{cases} 2 & n \\text{ even} \\\\ 3 & n \\text{ odd}\\end{cases}",
     "\\begin{cases} 2 & n \\text{ even} \\\\ 4 & n \\text{ odd}\\end{cases}", False),
    ("\\begin{cases} 2 & n \\text{ even} \\\\ 3 & n \\text{ odd}\\end{cases}",
     "\\begin{cases} 2 & n \\text{ odd} \\\\ 3 & n \\text{ even}\\end{cases}", False),
    ("\\begin{cases} 2 & n \\text{ even} \\\\ 3 & n \\text{ odd}\\end{cases}",
     "2 \\text{ if } n \\text{ even}; 3 \\text{ if } n \\text{ odd}", True),
    ("\\frac{1}{\\sqrt{n}}", "\\sqrt{\\frac{1}{n}}", True),
    ("\\sqrt{x^2}", "x", False),
    ("\\emptyset", "\\varnothing", True),
    ("18", "18 dollars", True),
    ("18", "\\$18", True),
    ("18", "18 \\text{ or more}", False),
    ("18", "\\text{not } 18", False),
    ("no", "on", False),
    ("\\text{no solution}", "No solutions", True),
    ("10^{-7}", "2 \\cdot 10^{-7}", False),
    ("0.0000001", "0.0000002", False),
    ("\\frac{1}{3}", "0.333333", True),
    ("\\frac{1}{3}", "0.33", False),
    ("\\frac{3}{4}", "0.7500001", False),
    ("45\\%", "45", True),
    ("\\pm 2", "2, -2", True),
    ("\\pm 2", "2", False),
    ("x = 1 \\text{ or } x = 2", "1, 2", True),
    ("x = 1 \\text{ or } x = 2", "1", False),
    ("x < 2", "(-\\infty, 2)", True),
    ("(-\\infty, 2]", "x \\leq 2", True),
    ("(-\\infty, 2]", "x < 2", False),
    ("[0, 1)", "[0, 1]", False),
    ("2^{10}", "1024", True),
    ("\\frac{4}{3}", "\\frac43", True),
    ("n!", "n (n-1)!", True),
    ("x^2 - 1", "(x-1)(x+1)", True),
    ("x^2 - 1", "(x-1)^2", False),
]  # fmt: skip

JUDGES = {"math-verify": "experiments.benchmarks.judges:library", "with guards": "rpt_jax.rewards.math_judge:math"}


def library(completion: bytes, prediction: bytes, columns: dict) -> float:
    """Judge by math-verify alone."""
    from math_verify import parse, verify

    a, b = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (columns["answers"][0], prediction.decode()))
    return float(verify(a, b, timeout_seconds=None))


def cases(answers: list[str]) -> dict[tuple[str, bool], list[tuple[str, str]]]:
    """Return (answer, other spelling or other answer) by (kind, whether it is the same)."""
    found = {}
    for is_same, kinds in ((False, OTHERS), (True, SAME)):
        for kind, change in kinds.items():
            changed = [(answer, change(answer.strip())) for answer in answers]
            found[kind, is_same] = [(a, b) for a, b in changed if b is not None and (is_same or b not in _STILL_EQUAL)]
    return found


def main() -> None:
    arguments = parser(__doc__, name="judges", rounds=None)
    arguments.add_argument("questions", nargs="+", help="question files")
    arguments.add_argument("--limit", type=int, help="answers of each file, evenly spread; all without it")
    arguments.add_argument("--show", action="store_true", help="print every error")
    args = arguments.parse_args()
    logging.disable(logging.WARNING)
    pools = {name: JudgePool(f, num_workers=2, time_limit=20.0) for name, f in JUDGES.items()}
    groups = {"pairs": {}}
    for path in args.questions:
        answers = [a for q in read_questions(path) for a in q.answers if a.strip()]
        step = max(1, len(answers) // args.limit) if args.limit else 1
        groups[path] = cases(answers[::step])
    for a, b, is_same in PAIRS:
        groups["pairs"].setdefault(("by hand", is_same), []).append((a, b))
    results = {}
    for path, kinds in groups.items():
        print(f"{path}\n  {'kind':<28}{'must be':<10}{'cases':>7}" + "".join(f"{name:>20}" for name in JUDGES))
        for (kind, is_same), pairs in kinds.items():
            errors, seconds = {}, {}
            for name, pool in pools.items():
                start = time.perf_counter()
                rewards = pool.judge([(b"", b.encode(), {"answers": (a,)}) for a, b in pairs])
                seconds[name] = time.perf_counter() - start
                # A judge that fails or takes too long earns nothing.
                wrong = [p for p, r in zip(pairs, rewards, strict=True) if (r == 1.0) != is_same]
                errors[name] = wrong
                if args.show:
                    for a, b in wrong:
                        print(f"    {name}: {'false reject' if is_same else 'false accept'}: {a!r} and {b!r}")
            print(
                f"  {kind:<28}{'accepted' if is_same else 'rejected':<10}{len(pairs):>7}"
                + "".join(f"{len(errors[n]):>9} in {seconds[n]:>5.0f} s" for n in JUDGES),
                flush=True,
            )
            results.setdefault(path, {})[f"{kind}: {'same' if is_same else 'other'}"] = {
                "cases": len(pairs),
                "errors": {n: len(e) for n, e in errors.items()},
                "seconds": seconds,
            }
    for pool in pools.values():
        pool.close()
    save_results(args, results, lambda axes: _draw(results, axes))


def _draw(results: dict, axes) -> None:
    kinds = sorted({kind for group in results.values() for kind in group}, reverse=True)
    for place, name in enumerate(JUDGES):
        totals = [
            sum(group.get(kind, {"errors": {name: 0}})["errors"][name] for group in results.values()) for kind in kinds
        ]
        axes.barh([y - 0.2 + 0.4 * place for y in range(len(kinds))], totals, 0.4, label=name)
    axes.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="errors", xscale="symlog")
    axes.legend()


if __name__ == "__main__":
    main()
