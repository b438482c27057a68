"""Prompt templates as token ids: trunk = BOS + header + document window, tail = the request after the context.

Header and tail are tokenised separately and do not depend on the position, so all cuts of a document share its trunk,
and the document keeps the corpus's tokens. The templates keep the meaning, not the words, of the paper's variants
(arXiv:2506.08007 Table 10).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from rpt_jax.config import Config, DataConfig
from rpt_jax.config.schema import flag_of
from rpt_jax.data.documents import Document
from rpt_jax.errors import ConfigError
from rpt_jax.sequences import Task
from rpt_jax.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer

# One long fence for every document: a fence chosen for the text would leak its future to a shared trunk.
_FENCE = "`" * 7

_TASK = (
    "Continue a text. Under the heading ### Context you find its beginning; say which token comes next. First reason "
    "step by step about what could follow, then give the token inside \\boxed{}. A token may begin with a space, and "
    "the space is part of it: for a piece of a word write \\boxed{ pre}, for an operator \\boxed{ +}. Put nothing but "
    "the token inside the braces and do not wrap it in \\text{}.\n\n"
)
_CANDIDATES = (
    "While you reason, list several tokens that could come next, weigh them against each other, and only then "
    "choose.\n\n"
)

# name -> (header, tail), both around the raw context.
_TEMPLATES = {
    "minimal": ("", ""),
    "v0": (_TASK + "### Context\n", "\n"),
    "v6": (
        _TASK + _CANDIDATES + f"### Context\n{_FENCE}\n",
        f"\n{_FENCE}\n\nNow list candidates for the token that follows the context, decide, and box your choice.\n",
    ),
}


_QUESTION_TEMPLATES = ("boxed", "none")
CONTEXT, QUESTION = "{context}", "{question}"


def with_prompt_texts(config: Config, kept: Config | None = None) -> Config:
    """Return the config with the texts of prompt files instead of their names, so that a run does not need the files.

    Args:
        config: of this start.
        kept: of the run that it resumes, whose text stands for a file that is gone; None: a new run.
    Raises:
        ConfigError: data.template or questions.template names neither a template nor a text file with one place for the
            context or the question.
    """
    old = ("", "") if kept is None else (kept.data.template, kept.questions.template)
    template = _prompt_text("data.template", config.data.template, tuple(_TEMPLATES), CONTEXT, old[0])
    question = _prompt_text("questions.template", config.questions.template, _QUESTION_TEMPLATES, QUESTION, old[1])
    return replace(
        config,
        data=replace(config.data, template=template),
        questions=replace(config.questions, template=question),
    )


def _prompt_text(setting: str, value: str, names: tuple[str, ...], place: str, kept: str) -> str:
    """Return the name of a template, or the text of one; a file's last newline is not part of it."""
    if value in names:
        return value
    text = value
    if place not in value:
        required = f"it must be {', '.join(names)}, or a text file that holds {place} once"
        if not _is_file(value):
            if place in kept:
                return kept
            problem = f"{setting}={value!r:.80}; {required}, and there is no such file"
            raise ConfigError(f"{problem}. Correct {flag_of(setting)}.")
        try:
            text = Path(value).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{setting}={value!r} is not UTF-8 ({error}); {required}. Convert the file.") from error
    if text.count(place) != 1:
        raise ConfigError(
            f"the prompt of {setting} holds {place} {text.count(place)} times; it must hold it once. Correct the text: "
            f"{text[:80]!r}."
        )
    return text


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:  # a text that is too long for a name
        return False


@dataclass(frozen=True, kw_only=True)
class Template:
    """Token ids around a context.

    Attributes:
        header: i32 [.], before the document window, including BOS; may be empty.
        tail: i32 [E], after the cut; never empty.
        hint: ids before and after the reference in a tail that shows it.
        num_shown: leading tokens of the reference that every second prompt shows. 0: each task has one prompt, which
            shows none; otherwise two, first the one that shows none.
    """

    header: np.ndarray
    tail: np.ndarray
    hint: tuple[Sequence[int], Sequence[int]] = ((), ())
    num_shown: int = 0

    @property
    def prompts_per_task(self) -> int:
        """Return 2 if every second prompt shows its reference, else 1."""
        return 2 if self.num_shown else 1

    @property
    def hint_width(self) -> int:
        """Return how many tokens the longest tail has more than `tail`."""
        return sum(map(len, self.hint)) + self.num_shown - len(self.tail) if self.num_shown else 0

    @property
    def width(self) -> int:
        """Return the number of tokens of the longest tail."""
        return len(self.tail) + self.hint_width

    def prompts_of(self, task: Task) -> list[Task]:
        """Return the task once for each of its prompts."""
        if not self.num_shown:
            return [task]
        before, after = self.hint
        shown = [int(token) for token in task.tokens[: self.num_shown]]
        return [task, replace(task, hinted_tail=[*before, *shown, *after])]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of both."""
        return hashlib.sha256(repr((self.header.tolist(), self.tail.tolist())).encode()).hexdigest()[:16]


def make_template(tokenizer: Tokenizer, config: DataConfig) -> Template:
    """Tokenise the configured template.

    Args:
        tokenizer: of the policy.
        config: whose template is a name or a text, as `with_prompt_texts` leaves it.
    Raises:
        ConfigError: the header leaves no tokens for text, or fewer than the window stride; or the tokenizer cannot
            spell the response marks.
        DataError: data.chat without a usable chat template.
    """
    header, tail = _TEMPLATES.get(config.template) or config.template.split(CONTEXT)
    show, after = hint_texts(config.template == "minimal"), ""
    if config.chat:
        before, after = tokenizer.chat_parts()
        header = before + header
    separator = "" if config.template == "minimal" else "\n"
    # A template that opens the thought itself opens it behind the hint.
    bare = tail.rstrip().removesuffix(THINK_OPEN) if tail.rstrip().endswith(THINK_OPEN) else tail
    hint = bare + show[0], open_thought(show[1] + after, separator)
    tail = open_thought(tail + after, separator)
    check_marks(tokenizer)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encode_header = tokenizer.encode_rendered if config.chat else partial(tokenizer.encode, specials=True)
    encode_tail = tokenizer.encode_rendered if config.chat else partial(tokenizer.encode_continuation, specials=True)
    template = Template(
        header=np.asarray(bos + (encode_header(header) if header else []), np.int32),
        tail=np.asarray(encode_tail(tail), np.int32),
        hint=(encode_tail(hint[0]), encode_tail(hint[1])),
    )
    if len(template.header) >= config.trunk_length:
        raise ConfigError(
            f"the prompt before the text takes {len(template.header)} of data.trunk_length={config.trunk_length} "
            "tokens; at least one must be left for text. Raise --data.trunk-length."
        )
    window = config.trunk_length - len(template.header)
    if config.window_stride > window:
        raise ConfigError(
            f"data.window_stride={config.window_stride} is longer than the {window} document tokens that a trunk of "
            f"{config.trunk_length} holds after its header; windows must touch or overlap. Lower --data.window-stride."
        )
    return template


def make_plain_template(tokenizer: Tokenizer, config: DataConfig) -> Template:
    """Make a template that opens no thought: the assistant's turn, or a blank line, follows the prompt."""
    tail = tokenizer.chat_parts()[1] if config.chat else "\n\n"
    encode = tokenizer.encode_rendered if config.chat else tokenizer.encode_continuation
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Template(header=np.asarray(bos, np.int32), tail=np.asarray(encode(tail), np.int32))


# Around a reference that the prompt shows, so that the policy writes a thought that leads to it.
_SHOWN = (
    "\nYou already know what the answer is: \\boxed{",
    "}. Think aloud in the first person, step by step, as you would without knowing it, until it follows. Do not say "
    "that it was given.\n",
)


def hint_texts(is_bare: bool) -> tuple[str, str]:
    """Return the texts before and after a reference that the prompt shows; a bare prompt has no words for it."""
    return ("\\boxed{", "}") if is_bare else _SHOWN


def open_thought(tail: str, separator: str) -> str:
    """Return the tail with an open thought at its end: as the chat template leaves it, or with `<think>` added."""
    if THINK_CLOSE in tail:
        raise ConfigError(
            f"the chat template ends a prompt with {tail!r}, which closes a thought; the policy must open one. Set the "
            "template's switch, e.g. --data.chat-template-kwargs enable_thinking=true."
        )
    if tail.rstrip().endswith(THINK_OPEN):
        return tail
    return tail + THINK_OPEN + separator


def check_marks(tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the tokenizer cannot spell the marks of thoughts and answers."""
    for mark in (THINK_OPEN, THINK_CLOSE + "\\boxed{}"):
        spelled = tokenizer.decode(tokenizer.encode_continuation(mark))
        if spelled != mark:
            raise ConfigError(
                f"the tokenizer spells {mark!r} as {spelled!r}; these marks delimit thoughts and answers. "
                "Use a tokenizer that can write them (add them as non-special tokens)."
            )


def continuation(document: Document, index: int, token_bytes: list[bytes], num_tokens: int) -> tuple[bytes, list[int]]:
    """Return the true bytes of up to `num_tokens` tokens from `index` on, and the lengths in bytes at which tokens end.

    The tokens are the corpus's; a zero-byte token adds no length (arXiv:2506.08007 eq. 3).
    """
    pieces = [token_bytes[t] for t in document.tokens[index : index + num_tokens]]
    ends = np.cumsum([len(p) for p in pieces])
    return b"".join(pieces), sorted({int(end) for end in ends if end > 0})


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """Properties of every token id that the selection of positions needs."""

    lengths: np.ndarray
    """i64 [V], number of bytes."""
    starts_inside: np.ndarray
    """bool [V], the first byte continues a UTF-8 character."""
    leaves_box: np.ndarray
    """bool [V], closes a brace that it has not opened, so no prediction that begins with it stays inside its box."""


def token_facts(token_bytes: list[bytes], *, boxed_mode: str = "balanced") -> TokenFacts:
    """Compute the facts of all token ids.

    Args:
        token_bytes: bytes of every id.
        boxed_mode: the reward's mode; unless it is balanced, a box can hold any token.
    """

    def closes_first(token: bytes) -> bool:
        depth, is_escaped = 0, False
        for byte in token:
            depth += 0 if is_escaped else (byte == ord("{")) - (byte == ord("}"))
            if depth < 0:
                return True
            is_escaped = byte == ord("\\") and not is_escaped
        return False

    return TokenFacts(
        leaves_box=np.array([boxed_mode == "balanced" and b"}" in b and closes_first(b) for b in token_bytes], bool),
        lengths=np.array([len(b) for b in token_bytes]),
        starts_inside=np.array([bool(b) and (b[0] & 0xC0) == 0x80 for b in token_bytes]),
    )


def candidate_mask(tokens: np.ndarray, facts: TokenFacts, *, min_context_tokens: int, num_tokens: int) -> np.ndarray:
    """Return the positions that can be tasks, bool [length].

    Excluded: too little context; a context that ends inside a UTF-8 character; targets of which none of the first
    `num_tokens` tokens ends between characters; targets without bytes (special tokens); targets that no box can hold.
    """
    length, numbers = len(tokens), np.arange(len(tokens))
    has_bytes = facts.lengths[tokens] > 0
    # A boundary is between characters if the next byte, if any, starts one.
    next_with_bytes = _next_true(has_bytes, default=length)
    inside = np.append(facts.starts_inside[tokens], False)
    is_whole = ~inside[next_with_bytes]
    next_whole_end = _next_true(is_whole[1:], default=length + num_tokens)[:length]
    reachable = next_whole_end - numbers < num_tokens
    can_be_boxed = ~facts.leaves_box[tokens]
    return (numbers >= min_context_tokens) & is_whole[:length] & has_bytes & reachable & can_be_boxed


def _next_true(flags: np.ndarray, *, default: int) -> np.ndarray:
    """Return the index of the first True at or after each place, i64 [length + 1]."""
    places = np.append(np.where(flags, np.arange(len(flags)), default), default)
    return np.minimum.accumulate(places[::-1])[::-1]
