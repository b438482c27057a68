"""Layouts of question records, each recognised by its fields: verl and Skywork-OR1, MMLU-Pro and SuperGPQA, ARC, MMLU,
GSM8K, MATH, plain question and answer, and TRL's prompt with answer, solution or ground_truth.

A field that is null, empty, or a float that is not finite counts as absent. Structures may be JSON text. An error says
what the record needs; the reader adds the file and the record.
"""

import json
import math
import re
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LayoutError(ValueError):
    """A record that is no question; the message completes "a question record needs ..."."""


def parse_record(record: dict) -> dict[str, Any]:
    """Read one record.

    Returns:
        {"messages": ((role, content), ...), "answers": accepted answers, "choices": options, "category": text}.
        Answers are empty if the record leaves them blank.
    Raises:
        LayoutError: unknown layout, or a field that cannot be read.
    """
    given = {name: value for name, value in record.items() if not _is_absent(value)}
    if "prompt" in given and "reward_model" in given:
        question = _verl(given)
    elif "options" in given:
        question = _options(given)
    elif "answerKey" in given:
        question = _arc(given)
    elif "choices" in given:
        question = _mmlu(given)
    elif "prompt" in given and {"answer", "solution", "ground_truth"} & record.keys():
        answers = [record[name] for name in ("answer", "solution", "ground_truth") if name in record][:1]
        question = _verl(given | {"reward_model": {"ground_truth": "" if answers == [None] else answers[0]}})
    elif {"question", "problem"} & given.keys() and {"answer", "solution"} & record.keys():
        question = _plain(given)
    else:
        raise LayoutError("the fields of a known layout")
    _check(question)
    return question


def _is_absent(value) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, float) and not math.isfinite(value))


def _check(question: dict[str, Any]) -> None:
    for role, content in question["messages"]:
        if not (isinstance(role, str) and role and isinstance(content, str) and content):
            raise LayoutError("a question that is text")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise LayoutError("whole characters; half of a surrogate pair is none") from error
    if question["choices"] and not set(question["answers"]) <= set(LETTERS[: len(question["choices"])]):
        raise LayoutError(f"an answer among its {len(question['choices'])} options")


def _made(messages, answers, record: dict, choices=()) -> dict[str, Any]:
    categories = (record.get(name) for name in ("category", "ability", "discipline", "subject", "type"))
    category = next((c for c in categories if isinstance(c, str)), "")
    return {"messages": tuple(messages), "answers": _answers(answers), "choices": tuple(choices), "category": category}


def _structure(record: dict, name: str, kinds: type | tuple[type, ...]) -> Any:
    """Return a field that is a list or an object, or JSON text of one."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"{name} as a structure; it is text that is not JSON") from error
    if not isinstance(value, kinds):
        raise LayoutError(f"{name} as a structure; it is {type(value).__name__}")
    return value


def _answers(values) -> tuple[str, ...]:
    return tuple(text for text in map(_answer, values) if text)


def _answer(value) -> str:
    """Return an answer as text: 72.0 reads as 72, and absent values as nothing."""
    if _is_absent(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise LayoutError(f"answers that are text or numbers; one is {type(value).__name__}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


# --- Layouts --------------------------------------------------------------------------------------------------------


def _verl(record: dict) -> dict[str, Any]:
    """prompt: messages or text; reward_model.ground_truth: an answer, or a list of them."""
    model, prompt = _structure(record, "reward_model", dict), record["prompt"]
    if "ground_truth" not in model:
        raise LayoutError("reward_model.ground_truth")
    if isinstance(prompt, str) and not prompt.lstrip().startswith(("[", "{")):
        messages = [("user", prompt)]
    else:
        turns = _structure(record, "prompt", list)
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            raise LayoutError("prompt as a list of messages with role and content")
        messages = [(turn["role"], turn["content"]) for turn in turns]
    if not messages or messages[-1][0] != "user":
        raise LayoutError("a prompt whose last message is the user's")
    truth = model["ground_truth"]
    if isinstance(truth, str) and truth.startswith("["):
        # Skywork-OR1 stores a list of accepted answers as JSON text; an interval also begins with a bracket.
        listed = _listed(truth)
        truth = truth if listed is None else listed
    return _made(messages, truth if isinstance(truth, list) else [truth], record)


def _listed(text: str) -> list[str] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, list) and all(isinstance(v, str) for v in values) else None


def _options(record: dict) -> dict[str, Any]:
    """MMLU-Pro: options and the letter as answer. SuperGPQA: options, the text as answer, and answer_letter."""
    options = _structure(record, "options", list)
    answer, letters = record.get("answer_letter", record.get("answer")), tuple(LETTERS[: len(options)])
    is_letter, is_text = answer in letters, options.count(answer) == 1
    is_sure = "answer_letter" in record or (is_letter and record.get("answer_index") == letters.index(answer))
    if is_letter and is_text and not is_sure and options[letters.index(answer)] != answer:
        raise LayoutError(f"answer_letter: the answer {answer!r} is a letter and the text of another option")
    if is_text and not is_letter:
        answer = letters[options.index(answer)]
    return _choice(record.get("question"), options, answer, record)


def _mmlu(record: dict) -> dict[str, Any]:
    """choices: a list of texts; answer: an index from 0, or the letter."""
    choices, answer = _structure(record, "choices", list), record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if answer != int(answer) or not 0 <= answer < min(len(choices), len(LETTERS)):
            raise LayoutError(f"an answer that is an index below {len(choices)}")
        answer = LETTERS[int(answer)]
    return _choice(record.get("question"), choices, answer, record)


def _arc(record: dict) -> dict[str, Any]:
    """question.stem and question.choices, or question and choices with text and label; answerKey is a label."""
    stem, parent = record.get("question"), record
    if isinstance(stem, dict) or (isinstance(stem, str) and stem.lstrip().startswith("{")):
        parent = _structure(record, "question", dict)
        stem = parent.get("stem")
    choices = _structure(parent, "choices", (list, dict))
    if isinstance(choices, dict):
        columns = [choices.get(name) for name in ("text", "label")]
        if not all(isinstance(c, list) for c in columns) or len(columns[0]) != len(columns[1]):
            raise LayoutError("choices with a text and a label each")
        choices = [{"text": text, "label": label} for text, label in zip(*columns, strict=True)]
    if not all(isinstance(c, dict) and {"text", "label"} <= c.keys() for c in choices):
        raise LayoutError("choices with a text and a label each")
    labels, key = [str(c["label"]) for c in choices], _answer(record["answerKey"])
    # Some questions label their options 1 to 4.
    if labels.count(key) != 1 or len(labels) > len(LETTERS):
        raise LayoutError(f"an answerKey that labels one option; it is {key!r} and the labels are {labels}")
    return _choice(stem, [c["text"] for c in choices], LETTERS[labels.index(key)], record)


def _choice(stem, texts: list, answer, record: dict) -> dict[str, Any]:
    if not isinstance(stem, str):
        raise LayoutError("a question that is text")
    if not all(isinstance(t, str) for t in texts) or not 2 <= len(texts) <= len(LETTERS):
        raise LayoutError(f"a list of 2 to {len(LETTERS)} options that are text")
    lines = [stem, *(f"{letter}. {text}" for letter, text in zip(LETTERS, texts))]
    return _made([("user", "\n".join(lines))], [answer], record, texts) if stem else _made([("user", "")], [], record)


def _plain(record: dict) -> dict[str, Any]:
    """question or problem with answer; GSM8K's answer follows the last ####. MATH: the last box of solution."""
    answer = record.get("answer")
    if answer is None and isinstance(record.get("solution"), str):
        answer = last_box(record["solution"])
    answers = answer if isinstance(answer, list) else [answer]
    final = [re.sub(r"(?<=\d),(?=\d{3})", "", a.split("####")[-1].strip()) if "####" in str(a) else a for a in answers]
    return _made([("user", record.get("question", record.get("problem")))], final, record)


def last_box(text: str) -> str | None:
    """Return the content of the last \\boxed{...} up to its balancing brace, or None; escaped braces are text."""
    boxes = list(re.finditer(r"\\boxed *\{", text))
    if not boxes:
        return None
    start, depth, is_escaped = boxes[-1].end(), 1, False
    for i, character in enumerate(text[start:], start):
        if not is_escaped:
            depth += (character == "{") - (character == "}")
            if not depth:
                return text[start:i]
        is_escaped = character == "\\" and not is_escaped
    return None
