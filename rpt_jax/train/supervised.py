"""Next-token and completion-only training through the same sequences, update and optimizer as RPT.

It is the warm start (documents and worked thoughts) and the control (documents at matched compute).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import numpy as np

from rpt_jax.config import Config
from rpt_jax.data.documents import Document, decode_utf8, parse_json_line
from rpt_jax.data.prompts import Template
from rpt_jax.errors import DataError
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.rl.update import supervised_loss, update
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE, Tokenizer
from rpt_jax.train.compute import num_parameters, update_flops
from rpt_jax.train.metrics import progress_bar, to_host
from rpt_jax.types import Sequences, TrainBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One text, and what the loss sees of it."""

    trunk: list[int]
    first: int
    """First trunk column with weight: header tokens, and the first token, are not predicted."""
    weight: float
    """Loss weight of trunk tokens."""
    completion: list[int] | None
    """With its end token; loss weight 1."""

    def num_tokens(self, tail_length: int) -> int:
        return len(self.trunk) + (tail_length + len(self.completion) if self.completion is not None else 0)


def read_sequences(path: str, tokenizer: Tokenizer, template: Template, config: Config) -> list[Sequence]:
    """A warm-start file, line by line.

    A line is {"text", "completion"?, "text_weight"?}. With a completion the text becomes the template's prompt and the
    completion, with the end token, its answer; without one it is plain text. Completion tokens have loss weight 1,
    text tokens `text_weight`: by default 1 in plain text, supervised.context_weight in prompts.

    Raises:
        DataError: missing file, bad line, or a sequence that does not fit; names file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"supervised.path {path!r} is no file; it must be a jsonl of texts. Set --supervised.path.")
    L, C = config.data.trunk_length, config.rollout.max_completion_tokens
    sequences = []
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        record = parse_json_line(decode_utf8(raw, file, number), file, number)
        if not isinstance(record.get("text"), str) or not isinstance(record.get("completion", ""), str | None):
            raise DataError(
                f"{file} line {number} has fields {sorted(record)}; it needs a string 'text', and any 'completion' "
                "must be a string. Correct it."
            )
        if not isinstance(record.get("text_weight", 1.0), int | float):
            raise DataError(f"{file} line {number}: text_weight is no number; it must be at least 0. Correct it.")
        text, completion = tokenizer.encode(record["text"]), record.get("completion")
        if completion is None:
            trunk, ids = plain_trunk(text, tokenizer), None
        else:
            trunk, ids = [*template.header, *text], [*tokenizer.encode_continuation(completion), tokenizer.eos_id]
        for name, size, limit, knob in (
            ("text", len(trunk), L, "data.trunk_length"),
            ("completion", len(ids or ()), C, "rollout.max_completion_tokens"),
        ):
            if size > limit:
                raise DataError(
                    f"{file} line {number}: the {name} takes {size} tokens; {knob}={limit} is the limit. "
                    f"Shorten the {name} or raise --{knob.replace('_', '-')}."
                )
        weight = record.get("text_weight", 1.0 if ids is None else config.supervised.context_weight)
        first = 1 if ids is None else max(1, len(template.header))
        sequences.append(Sequence(trunk=trunk, first=first, weight=float(weight), completion=ids))
    if not sequences:
        raise DataError(f"{file} holds no sequence; supervised.path needs at least one line. Check the file.")
    return sequences


def plain_trunk(tokens, tokenizer: Tokenizer) -> list[int]:
    """BOS (where there is one) and document tokens."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + [int(t) for t in tokens]


def document_sequences(
    documents: list[Document], tokenizer: Tokenizer, trunk_length: int, *, weight: float = 1.0
) -> list[Sequence]:
    """Plain-text sequences of documents. Long ones become windows that share one token, so that every token but a
    document's first is predicted once."""
    size = trunk_length - (tokenizer.bos_id is not None)
    return [
        Sequence(trunk=plain_trunk(d.tokens[first : first + size], tokenizer), first=1, weight=weight, completion=None)
        for d in documents
        for first in range(0, max(1, len(d.tokens) - 1), size - 1)
    ]


def draft_sequences(
    documents: list[Document], tokenizer: Tokenizer, template: Template, config: Config, num_plain: int
) -> list[Sequence]:
    """Cold start for a corpus without worked thoughts: supervised.draft_fraction of all sequences, beside `num_plain`.

    At a random position the completion is the true next tokens as a draft, then the first of them in the box, all in
    the corpus's own tokens. It teaches the format, and to look ahead; what thoughts are good for is left to RPT.
    Targets that a box cannot hold (braces, half characters) are left out.
    """
    share = config.supervised.draft_fraction
    if not share:
        return []
    rng = np.random.default_rng(config.run.seed)
    window = config.data.trunk_length - len(template.header)
    opening, closing = tokenizer.encode_continuation(THINK_CLOSE + BOX_OPEN), tokenizer.encode_continuation("}")
    size, minimum = config.supervised.draft_tokens, config.positions.min_context_tokens
    usable = [d for d in documents if len(d.tokens) > minimum + size]
    weights = np.array([len(d.tokens) for d in usable], float)
    sequences: list[Sequence] = []
    wanted = round(num_plain * share / (1 - share)) if usable else 0
    for number in rng.choice(len(usable), wanted, p=weights / weights.sum()) if wanted else ():
        tokens = usable[number].tokens
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
            Sequence(
                trunk=[int(t) for t in trunk],
                first=max(1, len(template.header)),
                weight=config.supervised.context_weight,
                completion=completion,
            )
        )
    return sequences


def make_batch(sequences: list[Sequence], config: Config, tail) -> TrainBatch:
    """Dense numpy TrainBatch; R is 1 where any sequence has a completion, else 0."""
    U, L = len(sequences), config.data.trunk_length
    has_branches = any(s.completion is not None for s in sequences)
    R, E, C = int(has_branches), len(tail), config.rollout.max_completion_tokens
    trunk_tokens, trunk_weights = np.zeros((U, L), np.int32), np.zeros((U, L), np.float32)
    cuts = np.ones((U, R), np.int32)
    branch_tokens, branch_mask = np.zeros((U, R, E + C), np.int32), np.zeros((U, R, E + C), bool)
    for u, s in enumerate(sequences):
        trunk_tokens[u, : len(s.trunk)] = s.trunk
        trunk_weights[u, s.first : len(s.trunk)] = s.weight
        if s.completion is not None:
            cuts[u, 0] = len(s.trunk)
            branch_tokens[u, 0, : E + len(s.completion)] = [*tail, *s.completion]
            branch_mask[u, 0, : E + len(s.completion)] = True
    completion_mask = branch_mask[:, :, E:]
    total = max(1e-9, trunk_weights.sum() + completion_mask.sum())
    return TrainBatch(
        sequences=Sequences(trunk_tokens=trunk_tokens, cuts=cuts, branch_tokens=branch_tokens, branch_mask=branch_mask),
        completion_mask=completion_mask,
        token_weights=(completion_mask / total).astype(np.float32),
        trunk_weights=(trunk_weights / total).astype(np.float32),
        advantages=None,
        sampler_logprobs=None,
        old_logprobs=None,
        ref_logprobs=None,
    )


def sequence_order(num_sequences: int, *, shuffle: bool, seed: int) -> grain.MapDataset:
    """Endless indices: file order, or reshuffled each epoch."""
    order = grain.MapDataset.range(num_sequences)
    return (order.seed(seed).shuffle() if shuffle else order).repeat()


def train_supervised(
    stage: str,
    config: Config,
    state: TrainState,
    optimizer,
    mesh,
    sequences: list[Sequence],
    *,
    tail,
    shuffle: bool,
    num_steps: int | None,
    max_flops: float | None,
    log: Callable[[str, int, dict], None],
    on_step: Callable[[int, TrainState, float], None] = lambda *_: None,
) -> tuple[TrainState, float]:
    """Run updates until `num_steps` or until `max_flops` are spent, whichever is given.

    Args:
        on_step: called with (steps done, state, FLOPs spent) after every update.
    Returns:
        (state, FLOPs spent).
    """
    loss_fn = partial(supervised_loss, config.model)
    order = sequence_order(len(sequences), shuffle=shuffle, seed=config.run.seed)
    size, num_params = config.supervised.batch_size, num_parameters(state.params)
    flops, step = 0.0, 0
    total = num_steps if num_steps is not None else 100
    with progress_bar(stage, total) as progress:
        while (step < num_steps) if num_steps is not None else (flops < max_flops):
            rows = [sequences[order[step * size + i]] for i in range(size)]
            batch = make_batch(rows, config, tail)
            num_tokens = sum(s.num_tokens(len(tail)) for s in rows)
            state, metrics = update(
                state, shard_batch(mesh, batch), loss_fn=loss_fn, optimizer=optimizer, num_microbatches=1
            )
            step += 1
            flops += update_flops(num_params, num_tokens)
            if step % 10 == 0 or step == num_steps:
                record = to_host(metrics)
                log(stage, step, record | {"flops": flops})
                done = step if num_steps is not None else min(total, round(100 * flops / max_flops))
                progress(done, f"loss {record['loss']:.3f}")
            on_step(step, state, flops)
    return state, flops
