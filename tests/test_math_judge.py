"""The judge of mathematical answers: what math-verify takes for the same, and what it cannot read."""

import json
import logging
from pathlib import Path

import pytest

from experiments.benchmarks.judges import PAIRS, cases
from rpt_jax.rewards.math_judge import equal, math

logging.getLogger("math_verify").setLevel(logging.ERROR)
SHARED = Path(__file__).parents[2] / "shared" / "data" / "math" / "omni_math_rule.jsonl"


@pytest.mark.parametrize(("answer", "other", "is_same"), PAIRS)
def test_pairs_by_hand(answer, other, is_same):
    assert equal(answer, other) == is_same


@pytest.mark.parametrize(
    ("answer", "other", "is_same"),
    [
        # Numbers, however large, small or close.
        (r"\frac{2013^{2014}}{2013^{2013}-1}", r"\frac{2013^{2014}}{2013^{2013}-2}", False),
        (r"\sqrt{\frac{2^{2009}-1}{3 \cdot 2^{2008}-1}}", r"\sqrt{\frac{2^{2009}-1}{3 \cdot 2^{2008}-2}}", False),
        ("1-(1/2)^{2016}", "1-(1/2)^{2017}", False),
        (r"\binom{4025}{2012}", r"\binom{4025}{2013}", True),
        (r"1.5 \times 10^{-9}", r"1.6 \times 10^{-9}", False),
        ("5", "4.9999999", False),
        (r"\frac{2}{3}", "0.6666667", True),
        (r"\frac{\pi}{2}", "1.5707963", True),
        (r"\frac{n}{2}", "0.5n", True),
        ("123456789012345678", "123456789012345679", False),
        ("6", "3!", True),
        # Order and brackets.
        ("(3, 4)", "(4, 3)", False),
        ("(1, 2)", "1, 2", True),
        ("-4, 3", "3, -4", True),
        (r"\{(2,3),(3,2)\}", "(3,2), (2,3)", True),
        (r"\{(2,3),(3,2)\}", r"\{(2,3),(2,3)\}", False),
        ("(x, y) = (1, 2)", "(1, 2)", True),
        ("(x, y) = (1, 2)", "(y, x) = (1, 2)", False),
        (r"(0,1) \cup (1,2)", r"(1,2) \cup (0,1)", True),
        (r"(0,1) \cup (1,2)", r"(1,3) \cup (0,1)", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
        # Several answers are not one of them.
        ("5", "5 or 6", False),
        ("5", "5 and 6", False),
        ("6", "5 = 6", False),
        ("6", "2 + 4 = 6", True),
        ("x = 5", "y = 5", False),
        # Words and units.
        ("10", "10 million", False),
        ("12 \\text{ m}", "12m", False),
        ("3 \\text{ hours}", "3 \\text{ minutes}", False),
        ("30^\\circ", "30 degrees", True),
        ("5", "five", False),
        ("\\text{Alice}", "alice", True),
        ("\\text{even}", "\\text{odd}", False),
        ("4:40 \\text{ a.m.}", "4:40 \\text{ p.m.}", False),
        # Residues, bases and cases.
        (r"N \equiv 672 \pmod{1000}", "672", True),
        (r"N \equiv 672 \pmod{1000}", r"672 \pmod{1001}", False),
        (r"n \equiv 1, 3 \pmod 8", r"n \equiv 3, 1 \pmod{8}", True),
        ("900", "1604_8", True),
        (r"2 \text{ if } n \text{ is even}, 3 \text{ if } n \text{ is odd}",
         r"3 \text{ if } n \text{ is odd}, 2 \text{ if } n \text{ is even}", True),
        # Spellings.
        ("11,\\!090", "11090", True),
        ("(1,234)", "(1234)", False),
        (r"\frac{n^2}4", "n^2/4", True),
        (r"\left\lfloor \frac{2n-1}{5} \right\rfloor", r"\lfloor \frac{2n-1}{5} \rfloor", True),
        ("−5", "-5", True),
        ("0.5", ".5", True),
        ("5", ".5", False),
        ("", "", False),
        ("9", "\\cup", False),
    ],
)  # fmt: skip
def test_more_pairs(answer, other, is_same):
    assert equal(answer, other) == is_same


def test_any_accepted_answer_counts_and_no_prediction_earns_nothing():
    assert math(b"", b"\\frac12", {"answers": ("3", "0.5")}) == 1.0
    assert math(b"", b"1", {"answers": ("3", "0.5")}) == 0.0
    assert math(b"", None, {"answers": ("3",)}) == 0.0


@pytest.mark.skipif(not SHARED.exists(), reason="Omni-MATH is not beside the project")
def test_contest_answers():
    """Every 8th answer of Omni-MATH: each spelling of it is accepted, each change of it rejected."""
    answers = [json.loads(line)["answer"] for line in SHARED.read_text().split("\n") if line][::8]
    for (kind, is_same), pairs in cases(answers).items():
        assert not [(a, b) for a, b in pairs if equal(a, b) != is_same], kind
