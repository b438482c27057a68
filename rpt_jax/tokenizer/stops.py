"""Stop ids: every token that ends a completion according to the tokenizer, its chat template or a model directory."""

import json
from pathlib import Path

from rpt_jax.errors import DataError

GENERATION_CONFIG = "generation_config.json"


def find_stop_ids(tokenizer, directory: Path | None) -> dict[int, list[str]]:
    """Collect the stop ids of a policy.

    Args:
        tokenizer: a `vocabulary.Tokenizer`.
        directory: that may hold generation_config.json and config.json; None: there is none.
    Returns:
        {id: names of the sources that name it}, the tokenizer's end token first.
    Raises:
        DataError: eos_token_id of a file is not an id of the tokenizer or a list of such.
    """
    found = {tokenizer.eos_id: ["tokenizer"]}
    for name in (GENERATION_CONFIG, "config.json") if directory is not None else ():
        for token_id in _end_ids(directory / name, tokenizer):
            found.setdefault(token_id, []).append(name)
    if (turn_end := tokenizer.turn_end()) is not None:
        found.setdefault(turn_end, []).append("chat template")
    return found


def read_generation_config(directory: Path) -> dict:
    """Return generation_config.json of a directory, or an empty object.

    Raises:
        DataError: it is not a JSON object.
    """
    return _read_object(directory / GENERATION_CONFIG)


def _read_object(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); replace the damaged file.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is a JSON {type(value).__name__}; it must be an object. Replace it.")
    return value


def _end_ids(path: Path, tokenizer) -> list[int]:
    value = _read_object(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
        raise DataError(
            f"{path}: eos_token_id is {value!r:.80}; it must be ids of the tokenizer, below {tokenizer.vocab_size}. "
            "Use files that belong together."
        )
    return ids
