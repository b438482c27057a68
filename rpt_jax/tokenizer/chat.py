"""Chat templates: the text that they put around messages. `Tokenizer.chat_prompt` turns it into ids."""

from collections.abc import Callable, Iterator

import transformers

from rpt_jax.errors import DataError

Messages = list[tuple[str, str]]


def render(
    backend: transformers.PreTrainedTokenizerFast, messages: Messages, where: str, *, opens_turn: bool = True
) -> str:
    """Render a conversation as text.

    Args:
        backend: with the template.
        messages: of the conversation.
        where: name of the tokenizer, for errors.
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
        )
    except Exception as error:  # Jinja and the template may raise anything
        raise DataError(
            f"the chat template of tokenizer {where} fails on roles {[r for r, _ in messages]} ({error}). "
            "Set --data.no-chat, or use other messages."
        ) from error


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


def pieces(render: Callable[[Messages], str], messages: Messages, where: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it is a message) pieces of the conversation, up to the end of its last message.

    Raises:
        DataError: as `parts`, or the template's end depends on the conversation.
    """
    marks = [f"\u27e6{number}\u27e7" for number in range(len(messages))]
    text = render([(role, mark) for (role, _), mark in zip(messages, marks)])
    after = parts(render, where)[1]
    if not text.endswith(marks[-1] + after) or any(text.count(mark) != 1 for mark in marks):
        raise DataError(
            f"the chat template of tokenizer {where} renders {[r for r, _ in messages]} as {text!r:.200}; "
            f"it must contain each message once and {after!r} after the last. Set --data.no-chat."
        )
    for (_, content), mark in zip(messages, marks):
        before, text = text.split(mark)
        yield before, False
        yield content, True
