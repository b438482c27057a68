"""Graded completions: labels of outcomes and of steps, for reward models. Text layouts of others, or token ids.

One file serves three kinds of supervision: outcome models read its outcomes, process and value models its steps, and
supervised learning (traces) its completions.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.config import Config
from rpt_jax.data.examples import check_ids
from rpt_jax.data.preferences import PairError, encode_completion, encode_prompt, messages_of, parts_of_pair
from rpt_jax.data.readers import read_records
from rpt_jax.data.templates import Template
from rpt_jax.errors import DataError
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.tokenizer.steps import StepRule, places_of_bytes


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A prompt's completions, and the labels of some of their places.

    Attributes:
        trunk: token ids of the prompt.
        completions: token ids of each.
        places: indices of the tokens behind which each completion has labels.
        labels: of these places. Bradley-Terry: one rank per completion. Outcome: one in [0, 1]. Process: in [0, 1]
            for each step. Value: in [-1, 1] for each step.
        margin: of Bradley-Terry, by how much the better score should exceed the other.
        record: the record as read.
    """

    trunk: list[int]
    completions: list[list[int]]
    places: list[list[int]]
    labels: list[list[float]]
    margin: float = 0.0
    record: dict[str, Any]


_IDS, _PAIR_IDS = ("trunk_tokens", "completion_tokens"), ("trunk_tokens", "chosen_tokens", "rejected_tokens")
_PROMPTS = ("prompt", "text", "question", "problem")


class _BadRecord(ValueError):
    """The message completes "FILE line N ..."."""


def _half_character(error: Exception) -> _BadRecord:
    return _BadRecord(f"contains half of a surrogate pair ({error}); text must be Unicode. Correct it.")


class _Skipped(Exception):
    """The record is well-formed and of no use; the message is the reason."""


_ALIKE = "have no two different completions with different scores"
_UNRATED = "have no rated step"


def read_graded(
    path: str, tokenizer: Tokenizer, template: Template, config: Config, *, whole: bool = False, labelled: bool = True
) -> tuple[list[Graded], dict[str, int]]:
    """Read a file of graded completions for `supervised.objective`.

    bradley_terry: pairs as `preferences.read_pairs` reads them, with a "margin" or without; or {prompt, "completions",
    "scores"}, of which all pairs with different scores count. outcome: {prompt, "completion", "label"}, or token ids
    with "label" or "reward" (the run's own completions). process, value: {prompt, "completions": steps, "labels"}
    (TRL), {"problem", "steps", "label": first wrong step or -1} (ProcessBench), a PRM800K record, or token ids with
    "places" and "labels". A prompt is "prompt", "text", "question" or "problem", a text or messages. Steps are joined
    by steps.delimiter. Labels are numbers or booleans; those of values are 0 to 1 in these layouts, and become -1 to 1.

    Args:
        path, tokenizer, template, config: of the run.
        whole: keep the steps behind the first mistake of ProcessBench's records, as wrong ones; training leaves them
            out, because nobody judged them.
        labelled: every record needs labels, and both kinds must occur. False: they are read to be scored, and missing
            labels are 0.
    Returns:
        (examples, {reason: number of skipped ones}).
    Raises:
        DataError: missing file, bad record, labels that are all equal, or nothing remains; names file and record.
    """
    if not Path(path).is_file():
        raise DataError(f"supervised.path {path!r} is not a file; a reward model learns from one. Set it to a file.")
    read = _READERS[config.supervised.objective]
    rule = StepRule(config.steps, tokenizer)
    found: list[Graded] = []
    too_long_prompt = "have a longer prompt than data.trunk_length"
    too_long = "have a longer completion than rollout.max_completion_tokens"
    skipped = {too_long_prompt: 0, too_long: 0, _ALIKE: 0, _UNRATED: 0}
    for name, number, record in read_records(path):
        where = f"{name} line {number}"
        if "trunk_tokens" in record:
            names = _PAIR_IDS if config.supervised.objective == "bradley_terry" else _IDS
            check_ids(record, where, names, tokenizer, template)
        try:
            examples = read(record, _Coder(tokenizer, template, config, rule, whole, labelled))
        except _Skipped as reason:
            skipped[str(reason)] += 1
            continue
        except (_BadRecord, PairError) as error:
            raise DataError(f"{where} {error}") from error
        for example in examples:
            if len(example.trunk) > config.data.trunk_length:
                skipped[too_long_prompt] += 1
            elif max(map(len, example.completions)) > config.rollout.max_completion_tokens:
                skipped[too_long] += 1
            else:
                found.append(example)
    _check_labels(found, skipped, path, labelled)
    return found, skipped


def _check_labels(found: list[Graded], skipped: dict[str, int], path: str, labelled: bool) -> None:
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "the file is empty"
        raise DataError(
            f"{path} contains no usable completion ({reasons}); a reward model needs some. Correct the file, or raise "
            "--data.trunk-length or --rollout.max-completion-tokens."
        )
    labels = {label for example in found for of in example.labels for label in of}
    if labelled and len(labels) < 2:
        raise DataError(
            f"{path} has one label only, {labels}; a reward model needs completions or steps of both kinds. Add others."
        )


@dataclass(frozen=True)
class _Coder:
    """Encodes the texts of a record."""

    tokenizer: Tokenizer
    template: Template
    config: Config
    rule: StepRule
    whole: bool
    labelled: bool

    def prompt(self, record: dict) -> list[int]:
        value = next((record[n] for n in _PROMPTS if n in record), None)
        messages = messages_of(value.get("problem") if isinstance(value, dict) else value, "user")
        if not messages:
            raise _BadRecord(
                f"has fields {sorted(map(str, record))}; it needs a prompt ({', '.join(_PROMPTS)}), as text or "
                "messages. Correct it."
            )
        try:
            return encode_prompt(messages, self.tokenizer, self.template, self.config)
        except (TypeError, UnicodeEncodeError) as error:
            raise _BadRecord(
                f"contains half of a surrogate pair ({error}); text must be Unicode. Correct it."
            ) from error

    def completion(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise _BadRecord(f"has a completion {text!r:.60}; it must be a text. Correct it.")
        try:
            return encode_completion(text, self.tokenizer)
        except (TypeError, UnicodeEncodeError) as error:
            raise _BadRecord(
                f"contains half of a surrogate pair ({error}); text must be Unicode. Correct it."
            ) from error


def _number(value: Any, what: str, low: float = 0.0, high: float = 1.0) -> float:
    if not isinstance(value, bool | int | float | np.number) or not low <= float(value) <= high:
        raise _BadRecord(f"has {what} {value!r:.40}; it must be a number from {low:g} to {high:g}. Correct it.")
    return float(value)


def _read_ranked(record: dict, coder: _Coder) -> list[Graded]:
    if "trunk_tokens" in record:
        sides = [record.get(name) for name in ("chosen_tokens", "rejected_tokens")]
        trunk, ranks = record["trunk_tokens"], [1.0, 0.0]
    elif "completions" in record:
        texts, ranks = record["completions"], record.get("scores")
        if ranks is None and not coder.labelled and isinstance(texts, list):
            ranks = [0.0] * len(texts)
        if not isinstance(texts, list) or not isinstance(ranks, list) or len(texts) != len(ranks) or len(texts) < 2:
            raise _BadRecord("needs two or more completions and as many scores. Correct it.")
        ranks = [_number(rank, "a score", -1e9, 1e9) for rank in ranks]
        trunk, sides = coder.prompt(record), [coder.completion(text) for text in texts]
    else:
        messages, chosen, rejected = parts_of_pair(record)
        trunk = coder.prompt({"prompt": [{"role": role, "content": content} for role, content in messages]})
        sides, ranks = [coder.completion(text) for text in (chosen, rejected)], [1.0, 0.0]
    if coder.labelled and (len(set(ranks)) < 2 or all(side == sides[0] for side in sides)):
        raise _Skipped(_ALIKE)
    margin = record.get("margin")
    margin = 0.0 if margin is None else _number(margin, "a margin", -1e6, 1e6)
    places, labels = [[len(side) - 1] for side in sides], [[rank] for rank in ranks]
    return [Graded(trunk=trunk, completions=sides, places=places, labels=labels, margin=margin, record=record)]


def _read_outcome(record: dict, coder: _Coder) -> list[Graded]:
    label = record.get("label", record.get("reward", None if coder.labelled else 0.0))
    if label is None:
        raise _BadRecord(f"has fields {sorted(map(str, record))}; an outcome needs a label from 0 to 1. Correct it.")
    label = _number(label, "a label")
    if "trunk_tokens" in record:
        trunk, completion = record["trunk_tokens"], record["completion_tokens"]
    else:
        said = messages_of(record.get("completion"), "assistant")
        if not said:
            raise _BadRecord("has no completion that is text or messages. Correct it.")
        trunk, completion = coder.prompt(record), coder.completion(said[-1][1])
    return [
        Graded(trunk=trunk, completions=[completion], places=[[len(completion) - 1]], labels=[[label]], record=record)
    ]


def _read_steps(record: dict, coder: _Coder) -> list[Graded]:
    if "trunk_tokens" in record:
        tokens = record["completion_tokens"]
        places, labels = record.get("places"), record.get("labels")
        if "steps" in record and record["steps"] != json.loads(json.dumps(asdict(coder.config.steps))):
            raise _BadRecord(
                f"has steps that end as {record['steps']}, but the settings are {asdict(coder.config.steps)}; a model "
                "must learn the steps that it will score. Set --steps as the labels were made."
            )
        if labels is None and not coder.labelled:
            places = coder.rule.ends(tokens)
            labels = [0.0] * len(places)
        if not isinstance(places, list) or not all(type(p) is int and 0 <= p < len(tokens) for p in places):
            raise _BadRecord(
                f"has places {places!r:.60}; they must be indices of its {len(tokens)} tokens. Correct it."
            )
        _check_steps(places, labels)
        labels = [_number(label, "a label") for label in labels]
        return [
            Graded(trunk=record["trunk_tokens"], completions=[tokens], places=[places], labels=[labels], record=record)
        ]
    if coder.config.steps.every_tokens or coder.config.steps.marks:
        raise _BadRecord(
            "has steps as texts, which end at steps.delimiter; the settings have steps.every_tokens or steps.marks. "
            "Remove those."
        )
    steps, labels = _steps_of(record, whole=coder.whole)
    if labels is None and not coder.labelled:
        labels = [0.0] * len(steps)
    _check_steps(steps, labels)
    if not all(isinstance(step, str) and step for step in steps):
        raise _BadRecord("has a step that is no text. Correct it.")
    text, offsets = "", []
    for step in steps:
        text += step.removesuffix(coder.rule.delimiter) + coder.rule.delimiter
        offsets.append(len(text.encode()))
    tokens = coder.completion(text)
    lengths = np.array([len(coder.tokenizer.token_bytes(t)) for t in tokens])
    if lengths.sum() != offsets[-1]:
        raise _BadRecord("has a text that the tokenizer changes, so its steps cannot be placed. Use another tokenizer.")
    # The last step ends with the completion, as where rewards read it.
    places = [*places_of_bytes(lengths, offsets)[:-1], len(tokens) - 1]
    if len(set(places)) < len(places):
        raise _BadRecord("has two steps that end in one token, which can have one label only. Join them.")
    labels = [_number(label, "a label") for label in labels]
    return [Graded(trunk=coder.prompt(record), completions=[tokens], places=[places], labels=[labels], record=record)]


def _check_steps(steps: Sequence, labels: Any) -> None:
    if not steps:
        raise _BadRecord("has no steps; a process model needs at least one. Remove it.")
    if not isinstance(labels, list) or len(labels) != len(steps):
        size = len(labels) if isinstance(labels, list) else repr(labels)
        raise _BadRecord(f"has {len(steps)} steps and {size} labels; every step needs one. Correct it.")


def _steps_of(record: dict, *, whole: bool) -> tuple[list, Any]:
    """Return (texts of the steps, their labels), in the layout of TRL, ProcessBench or PRM800K."""
    if "completions" in record:
        return _list(record["completions"]), record.get("labels")
    if "steps" in record:
        first, steps = record.get("label"), _list(record["steps"])
        if type(first) is not int or not -1 <= first < len(steps):
            raise _BadRecord(
                f"has label {first!r} and {len(steps)} steps; it must be the first wrong step, from 0, or -1. Correct "
                "it."
            )
        last = len(steps) if first < 0 or whole else first + 1
        return steps[:last], [not 0 <= first <= number for number in range(last)]
    if "label" in record and isinstance(record["label"], dict):
        texts, labels = [], []
        for step in _list_of_dicts(record["label"].get("steps")):
            options, chosen = _list_of_dicts(step.get("completions")), step.get("chosen_completion")
            if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(options)):
                raise _BadRecord(f"has chosen_completion {chosen!r} of {len(options)} completions. Correct it.")
            option = step.get("human_completion") or (options[chosen or 0] if options else None)
            if not isinstance(option, dict) or not isinstance(option.get("rating"), int):
                break  # annotators stopped here
            texts.append(option.get("text"))
            labels.append(option["rating"] >= 0)
        if not texts:
            raise _Skipped(_UNRATED)
        return texts, labels
    raise _BadRecord(
        f"has fields {sorted(map(str, record))}; steps come as completions and labels (TRL), as steps and label "
        "(ProcessBench), or as label.steps (PRM800K). Correct it."
    )


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise _BadRecord(f"has {value!r:.60}, which must be a list of steps. Correct it.")
    return value


def _list_of_dicts(value: Any) -> list[dict]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _BadRecord(f"has {value!r:.60}, which must be a list of objects. Correct it.")
    return value


def _read_values(record: dict, coder: _Coder) -> list[Graded]:
    return [
        Graded(**vars(example) | {"labels": [[2 * label - 1 for label in of] for of in example.labels]})
        for example in _read_steps(record, coder)
    ]


_READERS: dict[str, Callable[[dict, _Coder], list[Graded]]] = {
    "bradley_terry": _read_ranked, "outcome": _read_outcome, "process": _read_steps, "value": _read_values,
}  # fmt: skip
