"""Examples for supervised training: a supervised file, windows of documents, drafts of a text's continuation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpt_jax.config import Config
from rpt_jax.data.documents import Document, lengths_of
from rpt_jax.data.readers import read_records
from rpt_jax.data.templates import Template
from rpt_jax.errors import DataError
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text and its loss weights."""

    trunk: list[int]
    first: int
    """Index of the first weighted trunk token; header tokens and the first token are not predicted."""
    weight: float
    """Loss weight of trunk tokens."""
    completion: list[int] | None
    """Completion tokens, including the end token; loss weight 1. None: plain text."""
    given: int = 0
    """Number of leading completion tokens that are read only: loss weight 0."""

    def num_tokens(self, tail_length: int) -> int:
        """Return the number of trunk tokens, plus tail and completion tokens if there is a completion."""
        return len(self.trunk) + (tail_length + len(self.completion) if self.completion is not None else 0)


def read_examples(path: str, tokenizer: Tokenizer, template: Template, config: Config) -> list[Example]:
    """Read a supervised file.

    A line is {"text", "completion"?, "text_weight"?}. With a completion, the text goes into the template's prompt and
    the completion, with the end token, is its answer; without one, the text is plain. Completion tokens have loss
    weight 1, text tokens `text_weight`: by default 1 in plain text, supervised.context_weight in prompts. Or a line is
    {"trunk_tokens", "completion_tokens", "given_tokens"?, "tokenizer", "template"}: the ids of a rollout, never encoded
    again; only the completion has weight, without its first `given_tokens`: a judge learns its label, not the text.

    Raises:
        DataError: missing file, bad line, ids of another tokenizer, or a sequence that does not fit; names file and
            line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"supervised.path {path!r} is not a file; it must be a jsonl of texts. Set --supervised.path.")
    examples = []
    for name, number, record in read_records(path):
        where = f"{name} line {number}"
        build = _from_tokens if "trunk_tokens" in record else _from_text
        example = build(record, where, tokenizer, template, config)
        for what, size, limit, knob in (
            ("text", len(example.trunk), config.data.trunk_length, "data.trunk_length"),
            (
                "completion",
                len(example.completion or ()),
                config.rollout.max_completion_tokens,
                "rollout.max_completion_tokens",
            ),
        ):
            if size > limit:
                raise DataError(
                    f"{where}: the {what} takes {size} tokens; {knob}={limit} is the limit. "
                    f"Shorten the {what} or raise --{knob.replace('_', '-')}."
                )
        examples.append(example)
    if not examples:
        raise DataError(f"{file} contains no sequence; supervised.path needs at least one line. Check the file.")
    return examples


def _from_text(record: dict, where: str, tokenizer: Tokenizer, template: Template, config: Config) -> Example:
    if not isinstance(record.get("text"), str) or not isinstance(record.get("completion", ""), str | None):
        raise DataError(
            f"{where} has fields {sorted(record)}; it needs a string 'text', and any 'completion' must be a string. "
            "Correct it."
        )
    try:
        text, completion = tokenizer.encode(record["text"]), record.get("completion")
        ids = None if completion is None else [*tokenizer.encode_continuation(completion), tokenizer.eos_id]
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError(
            f"{where} contains half of a surrogate pair ({error}); text must be Unicode. Correct it."
        ) from error
    if completion is None and not text:
        raise DataError(f"{where}: an empty text needs a completion. Remove the line.")
    default = 1.0 if completion is None else config.supervised.context_weight
    weight = record.get("text_weight", default)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise DataError(f"{where}: text_weight is {weight!r:.40}; it must be a number from 0 to a million. Correct it.")
    if completion is None:
        return Example(trunk=plain_trunk(text, tokenizer), first=1, weight=float(weight), completion=None)
    return Example(
        trunk=[*template.header.tolist(), *text],
        first=max(1, len(template.header)),
        weight=float(weight),
        completion=ids,
    )


def _from_tokens(record: dict, where: str, tokenizer: Tokenizer, template: Template, config: Config) -> Example:
    check_ids(record, where, ("trunk_tokens", "completion_tokens"), tokenizer, template)
    trunk, completion = record["trunk_tokens"], record["completion_tokens"]
    given = record.get("given_tokens", 0)
    if type(given) is not int or not 0 <= given < len(completion):
        raise DataError(
            f"{where}: given_tokens is {given!r:.40}; it must be at least 0 and less than the {len(completion)} "
            "completion tokens. Correct it."
        )
    return Example(trunk=trunk, first=1, weight=0.0, completion=completion, given=given)


def check_ids(record: dict, where: str, names: Sequence[str], tokenizer: Tokenizer, template: Template) -> None:
    """Check the fields of a record that hold token ids, and the fingerprints beside them.

    Raises:
        DataError: ids of another tokenizer or template, or no lists of ids.
    """
    if record.get("tokenizer") != tokenizer.fingerprint:
        raise DataError(
            f"{where} has ids of tokenizer {record.get('tokenizer')!r}; this run's is {tokenizer.fingerprint}. "
            "Sample again with this run's tokenizer."
        )
    if record.get("template") != template.fingerprint:
        raise DataError(
            f"{where} was sampled with another prompt template; it must be the run's. Sample again, or use the "
            "--data.template and --data.chat that it was sampled with."
        )
    for ids in map(record.get, names):
        if (
            not isinstance(ids, list)
            or not ids
            or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        ):
            raise DataError(
                f"{where}: {' and '.join(names)} must be lists of ids below {tokenizer.vocab_size}. Write the file "
                "again."
            )


def plain_trunk(tokens, tokenizer: Tokenizer) -> list[int]:
    """Return BOS, if there is one, and document tokens."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + [int(t) for t in tokens]


@dataclass(frozen=True)
class DocumentExamples(Sequence):
    """Plain-text examples of documents, made on access.

    Long documents become windows that share one token, so that every token is predicted exactly once. The first token
    of a document is predicted only if a BOS precedes it.
    """

    documents: Sequence[Document]
    tokenizer: Tokenizer
    size: int
    """Document tokens per example."""
    weight: float
    """Loss weight of the document tokens."""
    ends: np.ndarray
    """i64 [documents], cumulative number of examples."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(number)
        d = int(np.searchsorted(self.ends, number, side="right"))
        first = (number - (int(self.ends[d - 1]) if d else 0)) * (self.size - 1)
        tokens = self.documents[d].tokens[first : first + self.size]
        trunk = plain_trunk(tokens, self.tokenizer)
        # After a BOS, the previous window has already predicted the shared token.
        num_given = len(trunk) - len(tokens) + (first > 0)
        return Example(trunk=trunk, first=max(1, num_given), weight=self.weight, completion=None)

    def sample(self, number: int) -> list[Example]:
        """Return up to `number` examples, spread evenly over the documents."""
        return [self[int(i)] for i in np.linspace(0, len(self) - 1, min(number, len(self)))]


def document_examples(
    documents: Sequence[Document], tokenizer: Tokenizer, trunk_length: int, *, weight: float = 1.0
) -> DocumentExamples:
    """Make plain-text examples of trunk_length tokens, including BOS."""
    size = trunk_length - (tokenizer.bos_id is not None)
    counts = np.maximum(1, -(-(lengths_of(documents) - 1) // (size - 1)))
    return DocumentExamples(documents, tokenizer, size, weight, np.cumsum(counts))


def draft_examples(
    documents: Sequence[Document], tokenizer: Tokenizer, template: Template, config: Config, num_plain: int
) -> list[Example]:
    """Make cold-start examples for a corpus without worked thoughts.

    At a random position, the completion is a draft (the true next tokens), then the first of these tokens in the box.
    Both use the corpus's tokens. Drafts teach the format and looking ahead; useful thoughts are left to RPT. Targets
    that a box cannot hold (braces, half characters) are skipped. Before skipping, supervised.draft_fraction of all
    sequences are drafts.

    Args:
        documents: the corpus.
        tokenizer: the policy's tokenizer.
        template: the prompt template.
        config: the run's config.
        num_plain: number of plain sequences to mix the drafts with.
    """
    share = config.supervised.draft_fraction
    if not share:
        return []
    rng = np.random.default_rng(config.run.seed)
    window = config.data.trunk_length - len(template.header)
    opening, closing = tokenizer.encode_continuation(THINK_CLOSE + BOX_OPEN), tokenizer.encode_continuation("}")
    size, minimum = config.supervised.draft_tokens, config.positions.min_context_tokens
    lengths = lengths_of(documents)
    (usable,) = np.nonzero(lengths > minimum + size)
    weights = lengths[usable].astype(float)
    sequences: list[Example] = []
    wanted = round(num_plain * share / (1 - share)) if len(usable) else 0
    for number in rng.choice(usable, wanted, p=weights / weights.sum()) if wanted else ():
        tokens = documents[number].tokens
        index = int(rng.integers(minimum, len(tokens) - size))
        target = tokenizer.token_bytes(int(tokens[index]))
        if not target or b"{" in target or b"}" in target or "\ufffd" in target.decode(errors="replace"):
            continue
        draft = [int(t) for t in tokens[index : index + size]]
        completion = [*draft, *opening, draft[0], *closing, tokenizer.eos_id]
        if len(completion) > config.rollout.max_completion_tokens:
            raise DataError(
                f"a draft completion takes {len(completion)} tokens; rollout.max_completion_tokens="
                f"{config.rollout.max_completion_tokens} is the limit. Raise it or lower --supervised.draft-tokens."
            )
        trunk = [*template.header, *tokens[max(0, index - window) : index]]
        sequences.append(
            Example(
                trunk=[int(t) for t in trunk],
                first=max(1, len(template.header)),
                weight=config.supervised.context_weight,
                completion=completion,
            )
        )
    return sequences
