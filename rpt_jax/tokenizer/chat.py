"""Chat templates: the text that they put around messages. `Tokenizer.chat_prompt` turns it into ids."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import transformers

from rpt_jax.errors import ConfigError, DataError

Messages = list[tuple[str, str]]
# Plane 15 of private use: characters that no text of ours holds.
_PRIVATE = 0xF0000


def render(
    backend: transformers.PreTrainedTokenizerFast,
    messages: Messages,
    where: str,
    *,
    options: dict[str, Any],
    date: datetime | None = None,
    opens_turn: bool = True,
) -> str:
    """Render a conversation as text.

    Args:
        backend: with the template.
        messages: of the conversation.
        where: name of the tokenizer, for errors.
        options: further variables of the template.
        date: that the template writes; None: the current one.
        opens_turn: end with the start of the assistant's turn.
    Raises:
        DataError: there is no template, or it fails on these messages.
    """
    if not backend.chat_template:
        raise DataError(
            f"tokenizer {where} has no chat template, which data.chat=True needs. "
            "Set --data.no-chat or use a chat model's tokenizer."
        )
    try:
        return backend.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=opens_turn,
            tokenize=False,
            chat_template=_with_date(backend.chat_template, date),
            **options,
        )
    except Exception as error:  # Jinja and the template may raise anything
        raise DataError(
            f"the chat template of tokenizer {where} fails on roles {[r for r, _ in messages]} ({error}). "
            "Set --data.no-chat, or use other messages."
        ) from error


def _with_date(template: Any, date: datetime | None) -> Any:
    """Replace strftime_now("format") in a template by the formatted date."""
    if date is None or not isinstance(template, str):
        return template
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(date.strftime(call[2])), template)


def parts(render: Callable[[Messages], str], where: str) -> tuple[str, str]:
    """Return the text that the template puts before and after a single user message.

    Raises:
        DataError: the tokenizer has no chat template, or the template changes the message.
    """
    message = "\u27e6message\u27e7"
    text = render([("user", message)])
    if text.count(message) != 1:
        raise DataError(
            f"the chat template of tokenizer {where} repeats or drops the user message ({text!r}); "
            "it must contain it once. Set --data.no-chat."
        )
    before, after = text.split(message)
    return before, after


def pieces(
    render: Callable[[Messages], str], messages: Messages, tokens: Sequence[str], where: str
) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its tokens are control tokens) pieces of a conversation as the template renders it.

    What a message spells like a token is text. Such text is hidden from the template behind characters of private use,
    and the rendering must be the same as without hiding: a template may edit messages, but not by these tokens.

    Args:
        render: messages -> text.
        messages: of the conversation.
        tokens: spellings to hide.
        where: name of the tokenizer, for errors.
    Raises:
        DataError: the template fails, or edits a message by one of the tokens in it.
    """
    present = [t for t in sorted(tokens, key=len, reverse=True) if any(t in content for _, content in messages)]
    hidden = {chr(_PRIVATE + number): token for number, token in enumerate(present)}

    def hide(text: str) -> str:
        for mark, token in hidden.items():
            text = text.replace(token, mark)
        return text

    text = render([(role, hide(content)) for role, content in messages])
    parts = re.split(f"([{''.join(hidden)}])", text) if hidden else [text]
    if hidden and "".join(hidden.get(part, part) for part in parts) != render(messages):
        raise DataError(
            f"the chat template of tokenizer {where} edits messages by {present}, which stand in them as text. Remove "
            "them from the messages, or set --data.no-chat."
        )
    for part in parts:
        if part:
            yield hidden.get(part, part), part not in hidden


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse data.chat_template_kwargs: NAME=VALUE, where VALUE is JSON, or text if it is not.

    Raises:
        ConfigError: an entry without a name or a value, or a repeated name.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals) or name in options:
            raise ConfigError(
                f"data.chat_template_kwargs contains {text!r}; an entry is NAME=VALUE, each name once. Correct it."
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
