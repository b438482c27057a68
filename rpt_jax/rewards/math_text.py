"""The text of a mathematical answer before any algebra: one spelling, its parts, its words, units, bases and moduli.

math-verify parses what it can and drops the rest: words, units, moduli, the base of a numeral, the second case. What it
drops is compared here.
"""

import re
from typing import NamedTuple

import sympy
from sympy.core.function import AppliedUndef

_SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "≠": r"\neq ",
    "≡": r"\equiv ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∈": r"\in ",
    "π": r"\pi ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "∅": r"\emptyset ",
    "，": ",",
    "。": ".",
}
_TEXT = r"\\(?:text|math|mbox)(?:bf|rm|sf|tt|it|normal|up|md)?\s*\{([^{}]*)\}"
# Commands that only change how something looks.
_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?|q?quad)(?![A-Za-z])\.?|\\[,;:!> ()\[\]]|(?<!\\)[$~]"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|\\,|,\\!|\\ )\d{3})+(?![\d])")
_REWRITES = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\[dt]binom"), r"\\binom"),
    (re.compile(r"\\(?:varnothing|O(?![A-Za-z]))|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree(?![A-Za-z])"), r" \\text{degrees}"),
    (re.compile(r"\\(?:l|g)e(?![A-Za-z])"), lambda found: found[0] + "q"),
    (re.compile(r"\\ne(?![A-Za-z])"), r"\\neq"),
    (re.compile(r"\\\$|\\(?:euro|pounds)(?![A-Za-z])|€|£"), ""),
    (re.compile(r"\\?%|(?i:\s*\b(?:percent|per cent)\b)|\s*\\text\{(?:percent|per cent)\}"), r"\\%"),
    (re.compile(r"\\(sqrt|frac)\s*(\w)"), r"\\\1{\2}"),
    (re.compile(r"\\bmod|\\mod(?![A-Za-z])|\(\s*\\?mod\s*([^()]*)\)|\\text\{\s*mod\s*\}"), r"\\pmod{\1}"),
]


def spelled(text: str) -> str:
    """Rewrite an answer in one spelling: without layout, outer $, thousands separators and lead-ins."""
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = _THOUSANDS.sub(_joined_digits, text)
    text = re.sub(r"(?<!\\)\\\\\[[^\]]*\]", r"\\\\", text)  # the height of a row break
    text = _LAYOUT.sub(" ", text.replace("\\\\", "\x00")).replace("\x00", "\\\\")
    text = re.sub(_TEXT, _canonical_text, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _second_arguments(re.sub(r"\s+", " ", text).strip().rstrip(" .;,"))
    text = _cases(text)
    boxed = re.fullmatch(r"\\boxed\s*\{(.*)\}", text)
    return _without_lead_in(boxed[1].strip() if boxed and _is_group("{" + boxed[1] + "}") else text)


def _joined_digits(found: re.Match) -> str:
    # In brackets, a bare comma separates: (1,234) is a pair.
    before = found.string[: found.start()]
    is_inside = any(before.count(a) > before.count(b) for a, b in ("()", "[]", (r"\{", r"\}")))
    return found[0] if is_inside and re.fullmatch(r"[\d,]*", found[0]) else re.sub(r"\D", "", found[0])


def _canonical_text(found: re.Match) -> str:
    """Return \\text{...}; what has no word of its own (\\mathbf{5}, \\mathrm{e}) loses the command."""
    content = found[1].replace("~", " ").strip()
    if not re.search(r"[A-Za-z]", content) or (re.fullmatch("[eid]", content) and "math" in found[0]):
        return f" {content} "
    if found[0].startswith((r"\mathb", r"\mathcal", r"\mathi")) and len(content) == 1:
        return f" {content} "
    return f" \\text{{{content}}} "


def _second_arguments(text: str) -> str:
    """Write \\frac{a}b as \\frac{a}{b}."""
    start = 0
    while (start := text.find(r"\frac{", start)) >= 0:
        end = _closing(text, start + 5)
        start += 5
        if end is not None:
            rest = text[end + 1 :].lstrip()
            if rest and rest[0].isalnum():
                text = f"{text[: end + 1]}{{{rest[0]}}}{rest[1:]}"
    return text


def _closing(text: str, start: int) -> int | None:
    """Return the index of the bracket that closes the one at `start`, whatever closes it."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return None


def _is_group(text: str) -> bool:
    return bool(text) and text[0] in "([{" and _closing(text, 0) == len(text) - 1


def _cases(text: str) -> str:
    """Write the rows of \\begin{cases} as a list: value if condition; value if condition."""
    found = re.fullmatch(r"(.*)\\begin\{cases\}(.*)\\end\{cases\}", text)
    if not found:
        return text
    rows = [row.strip(" ,.;") for row in found[2].split("\\\\")]
    rows = [re.sub(r"\s*,?\s*&\s*(?:\\text\{(?:if|for|when) ?([^{}]*)\})?\s*", _condition, row) for row in rows if row]
    return found[1] + "; ".join(rows)


def _condition(found: re.Match) -> str:
    return " \\text{if} " + (f"\\text{{{found[1]}}} " if found[1] else "")


_LEAD_IN = re.compile(
    r"(?:\\text\{)?\s*[A-Z]?[a-z]{1,}\b(?P<subject>[^,;=]*?)\s*\b(?:is|are|equals)\b(?:\s*:)?\s*\}?(?P<rest>.*)"
)
_NEGATION = re.compile(r"\b(?:not|no|never|or|and|if|when|neither|nor|isn't)\b")


def _without_lead_in(text: str) -> str:
    """Take off "The answer is", unless the sentence denies or conditions something."""
    found = _LEAD_IN.fullmatch(text)
    if not found or _NEGATION.search(found["subject"] + " " + found["rest"]):
        return text
    return found["rest"].strip(" :") or text


# Bare letters that are no word: functions, and products of variables, which are written in order (abc, xy, mn).
_FUNCTION = re.compile(
    "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|max|min|gcd|lcm|mod|deg|det|sqrt|floor|ceil|frac|binom|pi|inf|"
    "sup|lim|arg|dim|ker"
)
_SHORT_WORD = re.compile("no|or|is|if|as|at|by|to|on|of|in|an|[ap]m|[cmk]m|[km]g|ml|lb|ft|[km]b")
_WORD = re.compile(r"\\text\{([^{}]*)\}|\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+|([A-Za-z][A-Za-z']*)")


def _is_word(letters: str) -> bool:
    lower = letters.lower()
    if len(letters) < 2 or _FUNCTION.fullmatch(lower):
        return False
    return bool(_SHORT_WORD.fullmatch(lower)) or (len(letters) > 2 and list(lower) != sorted(lower))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


class Segments(NamedTuple):
    """A text cut at its words: len(mathematics) = len(words) + 1."""

    mathematics: list[str]
    words: list[str]  # in lower case


def segments(text: str) -> Segments:
    """Cut a text at its words; neighbouring words are one."""
    mathematics, words, last = [], [], 0
    for found in _WORD.finditer(text):
        content = found[1] if found[1] is not None else found[2]
        if content is None or (found[1] is None and not _is_word(content)):
            continue
        between = text[last : found.start()].strip()
        content = " ".join(_singular(word) for word in re.findall(r"[^\s.]+", content.lower()))
        if words and not between:
            words[-1] += " " + content
        else:
            mathematics.append(between)
            words.append(content)
        last = found.end()
    return Segments([*mathematics, text[last:].strip()], words)


# Words after a number that are no unit: they change the number, condition it or name another.
_NO_UNIT = re.compile(
    "hundred|thousand|[mbtr]+illion|dozen|score|half|third|quarter|twice|double|and|or|if|when|where|for|mod|modulo|not|"
    "is|are|to|times|choose|base|even|odd|factorial|more|less|greater|than|least|most|plus|minus|otherwise|except|but|"
    "unless|up|each|squared|cubed|root|positive|negative|over|divided|by|from|only|infinitely"
)
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "dollar": "$", "liter": "l", "litre": "l", "inch": "in", "inches": "in", "feet": "ft",
    "foot": "ft", "unit": "", "square": "sq", "cubic": "cu", "deg": "degree",
}  # fmt: skip


def split_unit(text: str) -> tuple[str, tuple[str, ...] | None]:
    """Return (the number, its unit as normal words), or (text, None): "12 square cm" gives ("12", ("cm^2",))."""
    for found in re.finditer(r"(?:(?<=[\d})!%])|(?<=\\pi)) *(?=\\text\{|[A-Za-z]{2,})", text):
        value, unit = text[: found.start()].strip(), text[found.end() :]
        if not re.search(r"\d", value) or segments(value).words:
            continue
        bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", unit)
        bare = re.sub(r"\^\s*\{?\s*(\d)\s*\}?", r"^\1", bare)
        words = re.findall(r"[A-Za-z']+(?:\s*\^\d)?|/", bare)
        is_unit = bool(words) and not re.sub(r"[A-Za-z']+(?:\s*\^\d)?|[/.\s]", "", bare)
        names = {w.lower().split("^")[0].strip() for w in words}
        is_product = not unit.startswith("\\text") and not _is_word(words[0]) if words else False
        if is_unit and len(words) <= 5 and not any(map(_is_no_unit, names)) and not is_product:
            return value, _normal_unit(words)
    return text, None


def _is_no_unit(name: str) -> bool:
    return bool(_NO_UNIT.fullmatch(name) or _FUNCTION.fullmatch(name))


def _normal_unit(words: list[str]) -> tuple[str, ...]:
    names = []
    for word in words:
        name, _, power = word.replace(" ", "").lower().partition("^")
        name = _UNITS.get(name, name)
        names.append(_UNITS.get(_singular(name), _singular(name)) + (f"^{power}" if power else ""))
    for prefix, power in (("sq", "^2"), ("cu", "^3")):
        while prefix in names[:-1]:
            place = names.index(prefix)
            names[place : place + 2] = [names[place + 1] + power]
    return tuple("/" if name == "per" else name for name in names if name)


class Parts(NamedTuple):
    """The parts of a list."""

    brackets: str  # "()", "[)", "{}"; "" without brackets
    items: list[str]


_SEPARATOR = re.compile(
    r"[,;]|\\text\{\s*(?:and|or)\s*\}|\\(?:lor|vee|cup)(?![A-Za-z])|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])"
)


def parts(text: str) -> Parts:
    """Cut an answer into its parts: a set, a tuple, an interval, or a list without brackets. One part: no list."""
    text = _grouping_removed(text)
    brackets, inner = "", text
    body = _plain_brackets(text)
    if _is_group(body):
        brackets, inner = body[0] + body[-1], body[1:-1]
    items = _cut(inner)
    if len(items) == 1 and brackets != "{}":
        return Parts("", [text])
    return Parts(brackets, items)


# Variables, with or without an index.
_NAME = r"[A-Za-z](?:_\{?\w+\}?)?"
_NAMES = re.compile(rf"(\(?\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\)?)\s*(?:=|\\in(?![A-Za-z]))\s*(.*)")


def split_names(text: str) -> tuple[str | None, str]:
    """Return (names, list) of "(x, y) = (1, 2)" and of "x \\in \\{1, 2\\}"; (None, text) of all else."""
    found = _NAMES.fullmatch(text)
    return (found[1].replace(" ", ""), found[2]) if found and _is_group(_plain_brackets(found[2])) else (None, text)


def _plain_brackets(text: str) -> str:
    return text.replace(r"\{", "{").replace(r"\}", "}").replace(r"\langle", "(").replace(r"\rangle", ")").strip()


def _grouping_removed(text: str) -> str:
    """Take off braces and parentheses around one whole expression."""
    while text and text[0] in "({" and _is_group(text) and len(_cut(text[1:-1])) == 1:
        text = text[1:-1].strip()
    return text


def _cut(text: str) -> list[str]:
    items, depth, last = [], 0, 0
    for found in re.finditer(r"[(\[{]|[)\]}]|" + _SEPARATOR.pattern, text):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
        elif depth == 0:
            items.append(text[last : found.start()].strip())
            last = found.end()
    # "a, and b": the empty part between two separators is none.
    return [item for item in [*items, text[last:].strip()] if item]


def has_signs(text: str) -> bool:
    return bool(re.search(r"\\(?:pm|mp)(?![A-Za-z])", text))


def signs(text: str) -> list[str]:
    """Return both readings of an answer with \\pm; the text alone where there is none."""
    if not has_signs(text):
        return [text]
    upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return [re.sub(r"(^|[=({,])\s*\+", r"\1", reading) for reading in (upper, lower)]


class Congruence(NamedTuple):
    residue: str
    modulus: str


def congruence(text: str) -> Congruence | None:
    """Read x \\equiv r \\pmod{m}, with or without x."""
    found = re.fullmatch(r"(?:.*\\equiv)?(.*?)\(?\s*\\pmod\s*\{?([^{}]*)\}?\s*(.*?)\)?", text)
    return Congruence(found[1].strip(" ,"), (found[2] or found[3]).strip()) if found else None


class Numeral(NamedTuple):
    digits: str
    base: int


def numeral(text: str) -> Numeral | None:
    """Read 1604_8 or (1604)_{8}."""
    found = re.fullmatch(r"\(?\s*([0-9][0-9A-Za-z]*)\s*\)?\s*_\s*\{?\s*(-?\d+)\s*\}?", text)
    return Numeral(found[1], int(found[2])) if found else None


def is_set(text: str) -> bool:
    """Return whether a text writes a set by a union or an inequality."""
    return bool(re.search(r"\\cup|[<>]|\\[lg]eq", text))


def sides(text: str) -> list[str]:
    """Return the sides of a chain of equations."""
    return text.split("=") if not re.search(r"[<>]|\\[lgn]eq|\\neq", text) else []


def is_whole(text: str, readings: tuple) -> bool:
    """Return whether math-verify's reading holds every integer and letter of a text.

    What evaluation changes is left out: arguments of binomials, fractions that are reduced, mixed numbers.
    """
    if not readings or isinstance(readings[0], str):
        return bool(readings)
    text = re.sub(r"\\binom\s*\{[^{}]*\}\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\d*\s*\\frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}|\d+\s*/\s*\d+|\^\s*\{?\s*-1\s*\}?", " ", text)
    shown = set()
    for number in readings[0].atoms(sympy.Rational):
        shown |= {abs(number.p), number.q}
    names = "".join(map(str, readings[0].atoms(sympy.Symbol, AppliedUndef))).lower()
    letters = re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text)
    return {int(d) for d in re.findall(r"(?<![\d.])\d+(?!\d*\.\d)", text)} <= shown and all(
        x.lower() in names + "ei" for x in letters
    )
