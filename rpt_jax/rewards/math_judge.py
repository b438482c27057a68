"""The judge of mathematical answers: math-verify, and guards where it errs. Its import takes seconds.

math-verify compares numbers to 15 places, takes a set for a pair, and drops what its parser cannot read: words, units,
moduli, bases, all cases but one. So answers are cut into parts first, whose order counts or not; what the parser would
drop is compared as text; and numbers are compared exactly. experiments/benchmarks/judges.py counts the errors of both.
"""

import itertools
from functools import lru_cache

import sympy
from math_verify import parse, verify

from rpt_jax.rewards import math_text

# Decimal places of comparisons. The many tell apart the closest numbers of contest answers, such as the square roots of
# quotients of 2009-bit integers.
_PLACES, _MANY_PLACES = 60, 2500
# A decimal stands for a number that has no finite one if they agree to this relative error: six digits.
_ROUNDING = sympy.Rational(101, 10**8)


def math(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the prediction equals an accepted answer; only the worker limits its time."""
    if prediction is None:
        return 0.0
    return float(any(equal(answer, prediction.decode(errors="replace")) for answer in columns["answers"]))


def equal(answer: str, prediction: str) -> bool:
    """Return whether a prediction is mathematically the accepted answer."""
    answer, prediction = math_text.spelled(answer), math_text.spelled(prediction)
    return bool(answer) and _equal(answer, prediction)


def _equal(answer: str, prediction: str) -> bool:
    """Compare two spelled texts: their moduli, parts, words, units and bases, and then their values."""
    if _same_spelling(answer, prediction):
        return True
    if not answer or not prediction:
        return False
    both = answer, prediction
    congruences = [math_text.congruence(text) for text in both]
    if any(congruences):
        return _equal_congruences(*congruences, *both)
    if any(map(math_text.has_signs, both)):
        readings = [[part for sign in math_text.signs(text) for part in math_text.parts(sign).items] for text in both]
        return _match(*readings, in_order=False)
    (names, answer), (predicted_names, prediction) = map(math_text.split_names, both)
    if names and predicted_names and names != predicted_names:
        return False
    lists = [math_text.parts(text) for text in (answer, prediction)]
    if any(found.brackets or len(found.items) != 1 for found in lists):
        return _equal_lists(*lists, answer, prediction)
    answer, prediction = (found.items[0] for found in lists)
    if answer.endswith(r"\%") != prediction.endswith(r"\%"):  # 45 stands for 45%, and so does 0.45
        bare = [text.removesuffix(r"\%").strip() for text in (answer, prediction)]
        return _equal(*bare) or _equal_values(answer, prediction)
    (answer, unit), (prediction, predicted_unit) = map(math_text.split_unit, (answer, prediction))
    if unit and predicted_unit and unit != predicted_unit:
        return False
    cut, predicted = map(math_text.segments, (answer, prediction))
    if cut.words or predicted.words:
        return cut.words == predicted.words and all(map(_equal, cut.mathematics, predicted.mathematics))
    numerals = [math_text.numeral(text) for text in (answer, prediction)]
    if any(numerals):
        return _equal_numerals(*numerals, answer, prediction)
    return _same_spelling(answer, prediction) or _equal_values(answer, prediction)


def _same_spelling(a: str, b: str) -> bool:
    return a.replace(" ", "") == b.replace(" ", "")


def _equal_congruences(a, b, answer: str, prediction: str) -> bool:
    if a is None or b is None:  # a residue without its modulus, in either
        return _equal(a.residue if a else answer, b.residue if b else prediction)
    if not _equal(a.modulus, b.modulus):
        return False
    try:
        return (int(a.residue) - int(b.residue)) % int(a.modulus) == 0
    except ValueError:
        return _equal(a.residue, b.residue)


def _equal_numerals(a, b, answer: str, prediction: str) -> bool:
    """Compare numerals with a base; a prediction may leave it out, and an answer without one is decimal."""
    if a and b:
        return a.base == b.base and a.digits.lower() == b.digits.lower()
    if a:
        return a.digits.lower() == prediction.lower()
    try:
        return int(b.digits, b.base) == int(answer)
    except ValueError:
        return False


def _equal_lists(a, b, answer: str, prediction: str) -> bool:
    """Compare lists; brackets may be left out, but those that are there must agree."""
    # Unions and inequalities may be cut differently, and an inequality is a set.
    is_set = any(math_text.is_set(text) for text in (answer, prediction))
    if is_set and _equal_values(answer, prediction):
        return True
    if a.brackets and b.brackets and a.brackets != b.brackets:
        return False
    # Of interval brackets, only the open ones may be a pair's, and be left out.
    if {a.brackets, b.brackets} - {"", "()", "{}"} and a.brackets != b.brackets:
        return False
    in_order = "()" in (a.brackets, b.brackets) or a.brackets not in ("", "{}")
    return _match(a.items, b.items, in_order=in_order)


def _match(answers: list[str], predictions: list[str], *, in_order: bool) -> bool:
    """Return whether each part has its own counterpart."""
    if len(answers) != len(predictions):
        return False
    if in_order:
        return all(map(_equal, answers, predictions))
    left = list(predictions)
    for same in (_same_spelling, _equal):  # equal spellings first: they need no algebra
        unmatched = []
        for answer in answers:
            found = next((i for i, prediction in enumerate(left) if same(answer, prediction)), None)
            if found is None:
                unmatched.append(answer)
            else:
                del left[found]
        answers = unmatched
    return not answers


def _equal_values(answer: str, prediction: str) -> bool:
    """Compare two expressions or relations by their algebra."""
    values, predicted = _parse(answer), _parse(prediction)
    if not all(math_text.is_whole(text, parsed) for text, parsed in ((answer, values), (prediction, predicted))):
        return False
    sides = [_parse(side) for side in math_text.sides(prediction)]
    constants = [side[0] for side in sides if side and _is_number(side[0])]
    if any(_difference(a, b) for a, b in itertools.pairwise(constants)):
        return False  # 5 = 6 is no 6
    a, b = values[0], predicted[0]
    are_equations = isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq)
    differ = None if are_equations and a.lhs != b.lhs else _difference(_value(a), _value(b))
    if verify(list(values), list(predicted), timeout_seconds=None, allow_set_relation_comp=True):
        return differ is not True
    return differ is False


@lru_cache(maxsize=10_000)
def _parse(text: str) -> tuple:
    """Return math-verify's readings: an expression and the text, or the text alone."""
    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))


def _value(expression):
    """Return the right side of an assignment, the element of a set of one, or the expression."""
    if isinstance(expression, sympy.Eq):
        return expression.rhs
    if isinstance(expression, sympy.FiniteSet) and len(expression) == 1:
        return expression.args[0]
    return expression


def _is_number(expression) -> bool:
    return isinstance(expression, sympy.Expr) and not expression.free_symbols


def _difference(a, b) -> bool | None:
    """Return whether two expressions differ in value: False if they are the same, None if that cannot be told.

    Expressions in symbols are compared at rational points, positive and negative, where both are real.
    """
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr) or a.free_symbols != b.free_symbols:
        return None
    symbols = sorted(a.free_symbols, key=str)
    if not symbols:
        return _numbers_differ(a, b)
    compared = 0
    for point in range(4):
        sign = -1 if point % 2 else 1
        values = {s: sympy.Rational(sign * (7 * i + 3 * point + 5), 3) for i, s in enumerate(symbols)}
        x, y = (_evaluated(_without_decimals(e).subs(values), _PLACES) for e in (a, b))
        if x is None or y is None:
            continue
        compared += 1
        if abs(x - y) > abs(x) * sympy.Float(10) ** (10 - _PLACES):
            return True
    return False if compared > 1 else None


def _numbers_differ(a, b) -> bool | None:
    """Compare two numbers: rational ones exactly, decimals as they are or as roundings, others to many places."""
    exact = [_rational(e) for e in (a, b)]
    if None not in exact:
        x, y = exact
        is_decimal = [e.has(sympy.Float) for e in (a, b)]
        if any(is_decimal) and not all(is_decimal):
            # Only a number without a finite decimal may be rounded.
            other = y if is_decimal[0] else x
            if not _is_finite_decimal(other):
                return abs(x - y) > abs(other) * _ROUNDING
        return x != y
    x, y = (_evaluated(e, _MANY_PLACES) for e in (a, b))
    if x is None or y is None:
        return None
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    return bool(abs(x - y) > abs(x) * (_ROUNDING if rounded else sympy.Float(10) ** (10 - _MANY_PLACES)))


def _rational(expression):
    """Return the exact value, decimals taken as they are written, or None."""
    try:
        value = _without_decimals(expression).doit()
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None
    return value if value.is_Rational else None


def _without_decimals(expression):
    """Write decimals as the fractions that they are."""
    return expression.replace(lambda e: e.is_Float, lambda e: sympy.Rational(str(e)))


def _is_finite_decimal(number) -> bool:
    q = number.q
    for prime in (2, 5):
        while q % prime == 0:
            q //= prime
    return q == 1


def _evaluated(expression, places: int):
    """Return a real number to that many places, or None."""
    try:
        value = sympy.N(_without_decimals(expression).doit(), places)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None
    return value if value.is_Float or value.is_Rational else None
