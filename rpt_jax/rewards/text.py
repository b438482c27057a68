"""Shaping rewards that read the completion's text: format, repetition, language. Plain Python, for worker processes.

The `judge_` functions are called as rewards/host.py calls judges. A completion starts inside the thought that its
prompt opened, so they put <think> before it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial

_OPEN, _CLOSE = "<think>", "</think>"


# --- Format -------------------------------------------------------------------------------------------------------


def format(text: str, mode: str) -> float:
    """Return whether a text keeps a response format; codes disagree, so the convention is a mode.

    boxed: one thought, then text that ends with one box; ours.
    nover: nothing but a thought and an answer, white space aside (thinkwee/NOVER).
    lines: tags on lines of their own, nothing before; a last line may end the match (open-r1 `format_reward`).
    tag_count: 1/4 for each tag of `lines` that occurs once (open-r1 `tag_count_reward`).
    tags: starts with a thought, an answer follows, each tag once; text may follow (RLPR `format_reward`, R1).
    answer_tags: an answer in tags, each once (RLPR, R1_nothink).
    think: starts with one opening tag and closes it (TRL `think_format_reward`).

    Args:
        text: the whole response, with the <think> that the prompt may have opened.
        mode: one of the above.
    Raises:
        ValueError: unknown mode.
    """
    if mode not in _FORMATS:
        raise ValueError(f"format mode {mode!r}; it must be one of {', '.join(_FORMATS)}")
    return float(_FORMATS[mode](text))


def _is_boxed(text: str) -> bool:
    found = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", text, re.DOTALL)
    if not found or _OPEN in found[1] or _OPEN in found[2] or _CLOSE in found[2]:
        return False
    # The box may hold balanced braces, and nothing may follow it.
    tail = found[2].rstrip()
    start = tail.find("\\boxed{")
    if start < 0 or "\\boxed{" in tail[start + 1 :]:
        return False
    depth = 0
    for place, character in enumerate(tail[start:], start):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return place == len(tail) - 1
    return False


def _is_nover(text: str) -> bool:
    thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if not (thought and answer):
        return False
    expected = f"<think>{thought[1]}</think><answer>{answer[1]}</answer>"
    return "".join(expected.split()) == "".join(text.split())


def _is_in_lines(text: str) -> bool:
    pattern = r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    return re.match(pattern, text, re.DOTALL | re.MULTILINE) is not None


def _tag_count(text: str) -> float:
    return sum(text.count(tag) == 1 for tag in ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")) / 4


def _occur_once(text: str, *tags: str) -> bool:
    return all(text.count(tag) == 1 for tag in tags)


def _has_tags(text: str) -> bool:
    is_in_order = re.match(r"<think>.*</think>.*<answer>.*</answer>", text, re.DOTALL)
    return bool(is_in_order) and _occur_once(text, "<think>", "</think>", "<answer>", "</answer>")


def _has_answer_tags(text: str) -> bool:
    return bool(re.search(r"<answer>.*</answer>", text, re.DOTALL)) and _occur_once(text, "<answer>", "</answer>")


def _has_thought(text: str) -> bool:
    return text.startswith(_OPEN) and text.count(_OPEN) == 1 and _CLOSE in text


_FORMATS = {
    "boxed": _is_boxed, "nover": _is_nover, "lines": _is_in_lines, "tag_count": _tag_count, "tags": _has_tags,
    "answer_tags": _has_answer_tags, "think": _has_thought,
}  # fmt: skip


# --- Repetition ---------------------------------------------------------------------------------------------------


def repetition(items: Sequence, size: int, max_penalty: float = -1.0) -> float:
    """Return max_penalty * (1 - distinct n-grams / n-grams); 0 for fewer items than `size`.

    Source: arXiv:2502.03373, as TRL (token ids) and open-r1 (lower-case words) compute it.

    Args:
        items: token ids or words.
        size: items of an n-gram, at least 1.
        max_penalty: at most 0.
    """
    grams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def repeated_window(text: str, size: int = 10, limit: int = 10) -> float:
    """Return -1 if a window of `size` words occurs at least `limit` times, else 0 (OpenBMB/RLPR)."""
    words = text.split()
    counts = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    return -1.0 if counts and max(counts.values()) >= limit else 0.0


# --- Language -----------------------------------------------------------------------------------------------------

# Scripts, by the first word of a letter's Unicode name. Languages written in Latin letters are told apart by words.
_SCRIPTS = {
    "ar": {"ARABIC"}, "bn": {"BENGALI"}, "el": {"GREEK"}, "he": {"HEBREW"}, "hi": {"DEVANAGARI"},
    "ja": {"HIRAGANA", "KATAKANA", "CJK"}, "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "ta": {"TAMIL"},
    "te": {"TELUGU"}, "th": {"THAI"}, "zh": {"CJK"},
}  # fmt: skip
# Frequent words that carry grammar, not meaning; a word may be in several lists.
_WORDS = {
    "de": "der die das und ist ein eine einen einem einer er sie es wir ihr nicht mit für von zu zum zur den dem des "
    "auf im am in wie viele viel hat haben hatte wenn dann aber auch als an aus bei nach pro jede jeder jedes jeden "
    "sind war wird werden sich ihre seine sein kann noch nur so um über oder was wieviel insgesamt",
    "en": "the a an and is are was were be been of to in on at for with from by he she it they we you his her their "
    "its this that these those how many much does do did has have had if then but so as not or each per every what "
    "when which who will would can all more than there many after",
    "es": "el la los las un una unos unas y es son era de del al en con por para que se su sus lo le les no si como "
    "pero más cuántos cuántas cuánto cuánta cada tiene tienen tenía hay ella ellos él cuando qué entonces también "
    "o e a sin sobre entre ese esa este esta todos todas día total",
    "fr": "le la les un une des et est sont était de du au aux en avec pour par que qui se sa son ses leur leurs il "
    "elle ils elles on nous ne pas si comme mais plus combien chaque a ont avait dans sur ce cette ces quand alors "
    "aussi ou où sans entre tous toutes chacun jour y d l qu n s c j",
    "it": "il lo la i gli le un una uno e è sono era di del della dei delle al alla in con per che si suo sua suoi "
    "non se come ma più quanti quante quanto ogni ha hanno aveva nel nella su questo questa quando allora anche o",
    "nl": "de het een en is zijn was van in op met voor dat die hij zij ze niet als maar ook hoeveel elke heeft "
    "hebben had er aan om bij uit naar dan wat dit deze wordt worden per alle",
    "pt": "o a os as um uma uns umas e é são era de do da dos das no na nos nas em com por para que se seu sua não "
    "como mas mais quantos quantas quanto cada tem têm tinha ele ela eles elas quando então também ou ao à",
}  # fmt: skip
_WORDS_OF = {language: frozenset(words.split()) for language, words in _WORDS.items()}
LANGUAGES = (*_SCRIPTS, *_WORDS)


def language(text: str, code: str) -> float:
    """Return the share of a text that is in a language, in [0, 1]; 1 for a text without letters.

    No code defines this reward officially; this is our definition. For a script of its own: the share of letters in
    that script; Chinese characters count for Japanese in a text with kana (at least 1 in 20 of its CJK letters), else
    for Chinese. For a language in Latin letters: its share of the text's frequent words, times that of Latin letters. A
    word of several languages counts for each in part, and in full for the most likely one.

    Source: the language consistency reward of arXiv:2501.12948 §2.3.2.

    Args:
        text: any text; <think> tags, code and formulas count like other letters.
        code: ISO 639-1, one of `LANGUAGES`.
    Raises:
        ValueError: unknown code.
    """
    if code not in LANGUAGES:
        raise ValueError(f"language {code!r}; it must be one of {', '.join(LANGUAGES)}")
    scripts = Counter(unicodedata.name(c, "OTHER").split()[0] for c in text if c.isalpha())
    letters = sum(scripts.values())
    if not letters:
        return 1.0
    if code in _SCRIPTS:
        kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
        is_japanese = kana > 0 and kana >= 0.05 * (kana + scripts["CJK"])
        if code in ("ja", "zh") and is_japanese != (code == "ja"):
            return 0.0
        return sum(scripts[script] for script in _SCRIPTS[code]) / letters
    latin = scripts["LATIN"] / letters
    known = [[name for name, words in _WORDS_OF.items() if word in words] for word in _words(text)]
    known = [names for names in known if names]
    if not known:
        return latin  # nothing speaks against it
    points = {name: sum((name in names) / len(names) for names in known) for name in _WORDS_OF}
    if points[code] >= max(points.values()) - 1e-9:
        # Words that it shares with other languages count as its own.
        return latin * sum(code in names for names in known) / len(known)
    return latin * points[code] / len(known)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


# --- Syntax -------------------------------------------------------------------------------------------------------

_PAIRS = {")": "(", "]": "[", "}": "{"}


def syntax(text: str) -> float:
    """Return the share of brackets, code fences and $ signs that are closed in order; 1 for a text without them.

    Our definition of a well-formed text; a backslash escapes the next character.
    """
    opened, total, matched = [], 0, 0
    for mark in re.findall(r"\\.|```|[()\[\]{}$]", text, re.DOTALL):
        if mark.startswith("\\"):
            continue
        total += 1
        if mark in ("```", "$"):
            is_closing = bool(opened) and opened[-1] == mark
        else:
            is_closing = mark in _PAIRS and bool(opened) and opened[-1] == _PAIRS[mark]
        if is_closing:
            opened.pop()
            matched += 2
        elif mark not in _PAIRS:
            opened.append(mark)
    return matched / total if total else 1.0


# --- Judges -------------------------------------------------------------------------------------------------------


def _response(completion: bytes) -> str:
    text = completion.decode(errors="replace")
    return text if text.lstrip().startswith(_OPEN) else _OPEN + "\n" + text.removeprefix("\n")


def _judge_format(mode: str, completion: bytes, prediction: bytes | None, columns: dict) -> float:
    return format(_response(completion), mode)


judge_format = partial(_judge_format, "boxed")
judge_format_nover = partial(_judge_format, "nover")
judge_format_lines = partial(_judge_format, "lines")
judge_format_tags = partial(_judge_format, "tags")
judge_format_think = partial(_judge_format, "think")
judge_tag_count = partial(_judge_format, "tag_count")


def judge_repetition(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return `repetition` of lower-case words in threes, at least -1 (open-r1's setting)."""
    return repetition(completion.decode(errors="replace").lower().split(), 3)


def judge_repeated_window(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return `repeated_window` with RLPR's setting."""
    return repeated_window(completion.decode(errors="replace"))


def judge_syntax(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return `syntax`."""
    return syntax(completion.decode(errors="replace"))


def judge_language(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return `language` of the thought: that of the record's field "language", else the one that the task's text shows,
    which for a position is a few tokens long; 1 if it shows none."""
    record = columns.get("record", {})
    asked = record.get("language") or record.get("lang")
    if asked not in LANGUAGES:
        text = " ".join(str(v) for v in record.values()) or columns.get("continuation", b"").decode(errors="replace")
        shares = {code: language(text, code) for code in LANGUAGES}
        asked = max(shares, key=shares.__getitem__)
        if list(shares.values()).count(shares[asked]) > 1:
            return 1.0  # the task does not tell its language
    thought = completion.decode(errors="replace").split(_CLOSE)[0]
    return language(thought, asked)
