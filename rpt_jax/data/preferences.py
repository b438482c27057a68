"""Pairs of a better and a worse completion of one prompt, in TRL's layouts or as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpt_jax.config import Config
from rpt_jax.data.examples import check_ids
from rpt_jax.data.readers import read_records
from rpt_jax.data.templates import Template
from rpt_jax.errors import DataError
from rpt_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Token ids of a prompt's trunk and of its two completions, end token included."""

    trunk: list[int]
    chosen: list[int]
    rejected: list[int]


_IDS = ("trunk_tokens", "chosen_tokens", "rejected_tokens")


def read_pairs(
    path: str, tokenizer: Tokenizer, template: Template, config: Config
) -> tuple[list[Pair], dict[str, int]]:
    """Read a preference file.

    A record is {"prompt", "chosen", "rejected"}, each text or messages; or {"chosen", "rejected"} of messages that
    share all but their last ones; or {"trunk_tokens", "chosen_tokens", "rejected_tokens", "tokenizer", "template"}:
    ids, never encoded again. With data.chat, a prompt is rendered by the chat template.

    Returns:
        (pairs, {reason: number of skipped pairs}): equal completions, and pairs that are too long.
    Raises:
        DataError: missing file, bad record, or no pair remains; names file and record.
    """
    if not Path(path).is_file():
        raise DataError(
            f"supervised.path {path!r} is not a file; supervised.objective='dpo' needs pairs. Set --supervised.path."
        )
    pairs, skipped = [], {"have equal completions": 0, "have a longer prompt than data.trunk_length": 0}
    too_long = "have a longer completion than rollout.max_completion_tokens"
    skipped[too_long] = 0
    for name, number, record in read_records(path):
        where = f"{name} line {number}"
        if "trunk_tokens" in record:
            check_ids(record, where, _IDS, tokenizer, template)
            trunk, chosen, rejected = (record[name] for name in _IDS)
        else:
            trunk, chosen, rejected = _encoded(record, where, tokenizer, template, config)
        if chosen == rejected:
            skipped["have equal completions"] += 1
        elif len(trunk) > config.data.trunk_length:
            skipped["have a longer prompt than data.trunk_length"] += 1
        elif max(len(chosen), len(rejected)) > config.rollout.max_completion_tokens:
            skipped[too_long] += 1
        else:
            pairs.append(Pair(trunk=trunk, chosen=chosen, rejected=rejected))
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "the file is empty"
        raise DataError(
            f"{path} contains no usable pair ({reasons}); it needs at least one. Correct the file, or raise "
            "--data.trunk-length or --rollout.max-completion-tokens."
        )
    return pairs, skipped


def encode_prompt(
    messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, template: Template, config: Config
) -> list[int]:
    """Return the ids of a prompt's trunk: the template's header, then the messages, rendered with data.chat."""
    if config.data.chat:
        return [*template.header.tolist(), *tokenizer.chat_prompt(list(messages))]
    return [*template.header.tolist(), *tokenizer.encode("\n\n".join(content for _, content in messages))]


def encode_completion(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a completion with the end token."""
    return [*tokenizer.encode_continuation(text), tokenizer.eos_id]


def _encoded(record: dict, where: str, tokenizer: Tokenizer, template: Template, config: Config) -> list[list[int]]:
    try:
        messages, chosen, rejected = parts_of_pair(record)
        prompt = encode_prompt(messages, tokenizer, template, config)
        return [prompt, *(encode_completion(text, tokenizer) for text in (chosen, rejected))]
    except PairError as error:
        raise DataError(f"{where} {error}") from error
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError(
            f"{where} contains half of a surrogate pair ({error}); text must be Unicode. Correct it."
        ) from error


class PairError(ValueError):
    """A record that is no pair; the message completes "FILE line N ..."."""

    def __init__(self, found: str):
        super().__init__(
            f"has {found}; a preference record needs prompt, chosen and rejected, each text or messages of role and "
            "content, or chosen and rejected alone as messages that share their beginning (TRL). Correct it."
        )


def parts_of_pair(record: dict) -> tuple[list[tuple[str, str]], str, str]:
    """Return (messages of the prompt, chosen text, rejected text).

    Raises:
        PairError: the record is no pair.
    """
    if not {"chosen", "rejected"} <= record.keys():
        raise PairError(f"fields {sorted(map(str, record))}")
    sides = [messages_of(record[name], "assistant") for name in ("chosen", "rejected")]
    prompt = messages_of(record["prompt"], "user") if "prompt" in record else []
    if prompt is None or None in sides:
        raise PairError("a field that is neither text nor messages")
    if "prompt" not in record:
        shared = 0
        while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
            shared += 1
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    elif sides[0][: len(prompt)] == prompt == sides[1][: len(prompt)]:
        # The conversation is repeated in both sides.
        sides = [side[len(prompt) :] for side in sides]
    if not prompt or any(len(side) != 1 for side in sides):
        raise PairError("sides that do not end with one message of their own behind a prompt")
    return prompt, sides[0][0][1], sides[1][0][1]


def messages_of(value, role: str) -> list[tuple[str, str]] | None:
    """Return messages as (role, content); a text is one of this role. None: it is neither."""
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, Sequence):
        return None
    found = [(m.get("role"), m.get("content")) for m in value if isinstance(m, dict)]
    is_whole = len(found) == len(value) and all(isinstance(part, str) for message in found for part in message)
    return found if found and is_whole else None
