"""Scoring passes that a reward or an evaluation requests: log-probabilities of a target after a prompt and a thought.

A request is data; `Scorer.score` runs it through the model's one graph. Rollouts share their trunk, as in the update.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig, StepsConfig
from rpt_jax.errors import ConfigError
from rpt_jax.scoring.answers import Answers, answer_statistics, choice_logprobs
from rpt_jax.scoring.logprobs import score
from rpt_jax.scoring.scalars import ScalarModel, in_units, score_tokens
from rpt_jax.scoring.vocabulary import longest_prefix_tokens, vocabulary_index
from rpt_jax.sequences import append_targets, completions, without_hints
from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.types import Prompts, Rollouts, TaskBatch, record


@dataclass(frozen=True, kw_only=True)
class Request:
    """One scoring pass.

    Raises:
        ValueError: the direct view with a thought or a stub.
    """

    name: str
    policy: Literal["current", "start", "average", "reward_model", "process_model"] = "current"
    """The policy in training, the policy it started from, or its moving average; or a reward model of the scorer."""
    view: Literal["prompt", "direct"] = "prompt"
    """prompt: after the template, like rollouts; direct: after document tokens alone, without a template."""
    keep: Literal["nothing", "thought", "completion", "pair"] = "thought"
    """Tokens to put before the stub. thought: those of the rollout up to the end of the last </think>; a token that
    runs past it is replaced by its part of the mark. completion: all but a stop token. pair: all, then `between`, then
    the completion of the group's rollout that is `rival` places further on."""
    between: str = ""
    rival: int = 0
    stub: str = ""
    """Text before the target; an open thought is closed before it, except after a pair."""
    target: Literal["reference", "prediction", "choices", "completion"] = "reference"
    """reference: the task's tokens; prediction: the longest vocabulary entry that begins the prediction; choices: each
    of `choices`, all in one place; completion: the rollout's own tokens, behind nothing but its prompt."""
    choices: tuple[str, ...] = ()
    """Texts of one token each."""
    num_targets: int = 0
    """Number of leading reference tokens to score. 0: all."""
    is_tempered: bool = False
    """At the temperature of the rollouts, instead of 1."""
    readout: Literal["logprobs", "end", "steps"] = "logprobs"
    """What to read: log-probabilities of the target's tokens; or of a reward model, whose target is the completion, its
    score behind the last token, or behind every step (`Scores.mask` tells where those end)."""

    def __post_init__(self):
        if self.view == "direct" and (self.keep != "nothing" or self.stub):
            raise ValueError(f"request {self.name!r}: the direct view has no template, so no thought and no stub")


# The answer's first token, after a thought and in a box; and after the document alone.
AFTER_THOUGHT = Request(name="answer", keep="thought", stub=BOX_OPEN, num_targets=1)
DIRECT_ANSWER = Request(name="direct_answer", view="direct", keep="nothing", num_targets=1)


@record
class Scores:
    """The result of a scoring pass."""

    values: Any  # f32 [U, R, A], log-probabilities of the target's tokens, nats; padding 0
    mask: Any  # bool [U, R, A], real target tokens
    tokens_run: Any  # i32 [U], tokens that the model ran


# Indices of stubs: after an open thought, after a closed one, and from here on in place of a token past the mark.
OPEN, CLOSED, _AFTER_CLOSE = range(3)


@record
class Kept:
    """Tokens to put before a stub."""

    tokens: Any  # i32 [U, R, C]
    length: Any  # i32 [U, R], number of leading tokens to keep
    stub: Any  # i32 [U, R], index of the stub that follows them


@record
class Appended:
    """Rows of kept tokens, a stub and a target, as a request scores them and an update may learn them."""

    tokens: Any  # i32 [U, R, T], right-padded
    mask: Any  # bool [U, R, T], real tokens
    kept: Any  # i32 [U, R], number of leading tokens that the rollout sampled
    first: Any  # i32 [U, R], index of the target's first token


@dataclass(frozen=True)
class Scorer:
    """Runs requests.

    Attributes:
        config: the model's shape.
        tokenizer: of the model.
        header_length: trunk tokens before the document, including BOS.
        trunks_at_once: U -> number of trunks to run at a time, a divisor of U; None: all.
        temperature: of the rollouts, for requests that are tempered.
        models: reward models, by the name that requests use.
        steps: where steps end, for a process model that does not know.
    """

    config: DecoderConfig
    tokenizer: Any
    header_length: int
    trunks_at_once: Callable[[int], int] | None = None
    temperature: float = 1.0
    models: Mapping[str, ScalarModel] = field(default_factory=dict)
    steps: StepsConfig = field(default_factory=StepsConfig)

    @cached_property
    def _index(self):
        return vocabulary_index(self.tokenizer.byte_table())

    def score(self, request: Request, params, tasks: TaskBatch, rollouts: Rollouts, predictions) -> Scores:
        """Run one request. Where a prompt shows its reference, the prompt before it, which does not, takes its place.

        Args:
            request: what to score.
            params: of the request's policy.
            tasks, rollouts: of one batch.
            predictions: `answer.Predictions` of the rollouts, [U, R, ...].
        """
        tasks = replace(tasks, prompts=_without_hints(tasks))
        if request.readout != "logprobs":
            return self._score_scalars(request, tasks.prompts, rollouts)
        if request.target == "choices":
            return self._score_choices(request, params, tasks, rollouts, predictions)
        if request.target == "completion":
            return self._score(request, params, tasks.prompts, None, (rollouts.tokens, rollouts.mask.sum(-1)))
        targets = self._targets(request, tasks, predictions)
        is_direct = request.view == "direct"
        kept = None if is_direct else self._kept_of(request, tasks, rollouts, predictions)
        return self._score(request, params, tasks.prompts, kept, targets)

    def _score_scalars(self, request: Request, prompts: Prompts, rollouts: Rollouts) -> Scores:
        """Return a reward model's scores in its units, [U, R, 1] or [U, R, C]."""
        model, mask = self.models[request.policy], rollouts.mask
        sequences = _completions(prompts, rollouts.tokens, mask)
        scalars = score_tokens(model.config, model.params, sequences, trunks_at_once=self.at_once(prompts))
        ends = None
        if request.readout == "steps":
            ends = self._step_rule.ends_of_rows(rollouts.tokens, mask)
        return _scalar_scores(prompts, scalars, mask, ends, objective=model.objective)

    @cached_property
    def _step_rule(self) -> StepRule:
        return StepRule(self.models["process_model"].steps or self.steps, self.tokenizer)

    def _score_choices(self, request: Request, params, tasks: TaskBatch, rollouts: Rollouts, predictions) -> Scores:
        """Return the log-probability of each choice behind the stub, [U, R, K].

        Raises:
            ConfigError: a choice is not one token.
        """
        ids_K = self.choice_ids(request)
        # A token in the choices' place; its value does not matter.
        U, R = rollouts.tokens.shape[:2]
        targets = jnp.full((U, R, 1), ids_K[0], jnp.int32), jnp.ones((U, R), jnp.int32)
        kept, at_once = (
            self._kept_of(request, tasks, rollouts, predictions),
            self.at_once(tasks.prompts),
        )
        prompts, sequences, first_UR = self._sequences(request, tasks.prompts, kept, *targets)
        logprobs = choice_logprobs(self.config, params, sequences, first_UR, ids_K, trunks_at_once=at_once)
        padded = jnp.zeros((U, R, sequences.branch_tokens.shape[-1]), jnp.float32)
        counted = _gather(prompts, padded, first_UR, targets[1], num_targets=1)
        mask = jnp.broadcast_to(counted.mask, logprobs.shape)
        return Scores(values=jnp.where(mask, logprobs, 0.0), mask=mask, tokens_run=counted.tokens_run)

    def choice_ids(self, request: Request) -> tuple[int, ...]:
        """Return the token of each choice.

        Raises:
            ConfigError: a choice is not one token.
        """
        rows = [self.tokenizer.encode_continuation(text) for text in request.choices]
        if any(len(ids) != 1 for ids in rows):
            raise ConfigError(
                f"the tokenizer spells {request.choices} as {[len(ids) for ids in rows]} tokens; a judge's scores must "
                "be one token each. Use another tokenizer, or another reward than self_evaluation and candidate_choice."
            )
        return tuple(ids[0] for ids in rows)

    def score_after(self, request: Request, params, tasks: TaskBatch, kept: Kept | None) -> Scores:
        """Score the references after thoughts made by hand; arguments as in `answers`."""
        return self._score(request, params, tasks.prompts, kept, _references(tasks, request.num_targets))

    def _score(self, request: Request, params, prompts: Prompts, kept: Kept | None, targets) -> Scores:
        at_once = self.at_once(prompts)
        prompts, sequences, first_UR = self._sequences(request, prompts, kept, *targets)
        temperature = self.temperature if request.is_tempered else 1.0
        logprobs = score(self.config, params, sequences, temperature=temperature, trunks_at_once=at_once)
        return _gather(prompts, logprobs, first_UR, targets[1], num_targets=targets[0].shape[-1])

    def answers(self, request: Request, params, tasks: TaskBatch, kept: Kept | None) -> Answers:
        """Return the distribution of the answer's first token after each row's thought.

        Args:
            request: what comes before the answer; its target is the reference.
            params: of the policy.
            tasks: of one batch.
            kept: thoughts, from `kept` or made by hand; None in the direct view, which has none.
        """
        tokens, lengths = _references(tasks, 1)
        _, sequences, first_UR = self._sequences(request, tasks.prompts, kept, tokens, lengths)
        return answer_statistics(
            self.config, params, sequences, first_UR, tokens[..., 0], num_prompts=tasks.prompts.cuts.shape[1],
            trunks_at_once=self.at_once(tasks.prompts),
        )  # fmt: skip

    def append(self, request: Request, tasks: TaskBatch, rollouts: Rollouts, predictions, choices_UMG=None) -> Appended:
        """Return the rows that `score` runs, in the prompt view; arguments as there.

        Args:
            choices_UMG: i32, index of the choice that is each row's target, if the request's targets are choices.
        """
        if request.target == "choices":
            chosen_UR = jnp.asarray(self.choice_ids(request))[choices_UMG].reshape(rollouts.mask.shape[:2])
            targets = chosen_UR[..., None], jnp.ones_like(chosen_UR)
        else:
            targets = self._targets(request, tasks, predictions)
        kept = self._kept_of(request, tasks, rollouts, predictions)
        tokens, mask, first = _append(kept.tokens, kept.length, *self._stubs(request.stub), kept.stub, *targets)
        sampled = rollouts.mask.sum(-1) if request.keep == "pair" else kept.length
        return Appended(tokens=tokens, mask=mask, kept=sampled, first=first)

    def row_width(self, request: Request, num_sampled: int, num_reference: int) -> int:
        """Return how long rows are, T of `append`, for rollouts and references of up to that many tokens."""
        if request.target == "completion":
            return num_sampled
        width = self._stubs(request.stub)[0].shape[1] if request.view == "prompt" else 0
        if request.keep == "pair":
            width += num_sampled + self._between(request)[0].shape[1]
        if request.keep != "nothing":
            width += num_sampled
        return width + (1 if request.choices else min(request.num_targets or num_reference, num_reference))

    def _sequences(self, request: Request, prompts: Prompts, kept, targets_URA, lengths_UR):
        """Return (prompts in the request's view, sequences, index i32 [U, R] of each row's first target)."""
        if request.view == "direct":
            bos_id = self.tokenizer.bos_id
            prompts = _documents_alone(prompts, header_length=self.header_length, bos_id=bos_id)
        if kept is None:
            mask, first_UR = jnp.arange(targets_URA.shape[-1]) < lengths_UR[..., None], jnp.zeros_like(lengths_UR)
            return prompts, _completions(prompts, targets_URA, mask), first_UR
        stubs = self._stubs(request.stub)
        tokens, mask, first_UR = _append(kept.tokens, kept.length, *stubs, kept.stub, targets_URA, lengths_UR)
        return prompts, _completions(prompts, tokens, mask), first_UR

    def at_once(self, prompts: Prompts) -> int:
        """Return the number of trunks of a pass's rounds; 0: all."""
        return self.trunks_at_once(len(prompts.cuts)) if self.trunks_at_once else 0

    def _targets(self, request: Request, tasks: TaskBatch, predictions):
        """Return (tokens i32 [U, R, A], lengths i32 [U, R])."""
        if request.target == "prediction":
            U, R, X = predictions.bytes.shape
            rows = predictions.bytes.reshape(U * R, X), predictions.lengths.reshape(U * R)
            chosen_UR = longest_prefix_tokens(self._index, *rows).reshape(U, R)
            return jnp.maximum(chosen_UR, 0)[..., None], (chosen_UR >= 0).astype(jnp.int32)
        return _references(tasks, request.num_targets)

    def _kept_of(self, request: Request, tasks: TaskBatch, rollouts: Rollouts, predictions) -> Kept:
        if request.keep == "pair":
            num_prompts = tasks.prompts.cuts.shape[1]
            return _pairs(rollouts, *self._between(request), num_prompts=num_prompts, rival=request.rival)
        return self.kept(request, rollouts, predictions.think_end_tokens)

    def kept(self, request: Request, rollouts: Rollouts, think_end_tokens_UR) -> Kept:
        """Return the tokens of the rollouts to put before the stub, and which stub follows them; not for pairs."""
        if request.keep == "nothing":
            nothing = jnp.zeros_like(think_end_tokens_UR)
            return Kept(tokens=rollouts.tokens[..., :0], length=nothing, stub=nothing)
        is_thought = request.keep == "thought"
        return _kept(rollouts, think_end_tokens_UR, self._closers, is_thought=is_thought)

    def _between(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """Return the text between the completions of a pair, as (ids [1, W], lengths [1])."""
        ids = self.tokenizer.encode_continuation(request.between)
        return np.asarray([ids], np.int32), np.asarray([len(ids)], np.int32)

    def replaced_bytes(self, stub: np.ndarray) -> np.ndarray:
        """Return how many bytes of the stub with this index stand for a token that ran past the </think>."""
        return np.array([0, 0, *(len(start.encode()) for start in self._starts)])[stub]

    @cached_property
    def _closers(self) -> np.ndarray:
        """Return the index of each token's stub, i32 [V], if that token completes a </think>; see `_stubs`."""
        starts = self._starts
        return np.array([_AFTER_CLOSE + starts.index(start) if start else CLOSED for start in self._starts_V], np.int32)

    @cached_property
    def _starts(self) -> list[str]:
        return sorted({start for start in self._starts_V if start})

    @cached_property
    def _starts_V(self) -> list[str]:
        """Return what each token holds of a </think> that it completes and runs past; empty: it does not."""
        token_bytes = self.tokenizer.token_bytes
        return [start_past_close(token_bytes(i)) for i in range(self.tokenizer.vocab_size)]

    def _stubs(self, stub: str) -> tuple[np.ndarray, np.ndarray]:
        """Return all stubs, as (ids [S, W], lengths [S]): after an open thought, after a closed one, and in place of
        each token that runs past the </think>."""
        texts = [THINK_CLOSE + stub, stub, *(start + stub for start in self._starts)]
        ids = [self.tokenizer.encode_continuation(text) for text in texts]
        lengths = np.array([len(i) for i in ids], np.int32)
        table = np.zeros((len(ids), max(1, lengths.max())), np.int32)
        for row, of_row in zip(table, ids):
            row[: len(of_row)] = of_row
        return table, lengths


def start_past_close(token: bytes) -> str:
    """Return the start of a token that completes a </think> and runs past it, up to the end of the mark.

    Such a token cannot be kept: ">\\" holds the backslash of a box. Empty: the token ends with the mark, or cannot
    complete one.
    """
    mark = THINK_CLOSE.encode()
    ends = [n for n in range(1, len(token) + 1) if mark.endswith(token[:n]) or token[:n].endswith(mark)]
    if not ends or ends[-1] == len(token):
        return ""
    return token[: ends[-1]].decode(errors="ignore")


_append, _completions, _without_hints = map(jax.jit, (append_targets, completions, without_hints))


@partial(jax.jit, static_argnames="objective")
def _scalar_scores(prompts: Prompts, scalars_URC, mask_URC, ends_URC, *, objective: str) -> Scores:
    lengths_UR = mask_URC.sum(-1)
    is_real_UR = jnp.repeat(prompts.prompt_mask, mask_URC.shape[1] // prompts.cuts.shape[1], axis=1)
    stems_U = prompts.trunk_lengths + jnp.sum(prompts.prompt_mask * prompts.tail_lengths, axis=1)
    values = in_units(objective, scalars_URC)
    if ends_URC is None:
        values = jnp.take_along_axis(values, jnp.maximum(lengths_UR - 1, 0)[..., None], axis=-1)
        ends_URC = (lengths_UR > 0)[..., None]
    mask = ends_URC & is_real_UR[..., None]
    return Scores(
        values=jnp.where(mask, values, 0.0),
        mask=mask,
        tokens_run=jnp.where(prompts.prompt_mask.any(-1), stems_U + jnp.sum(is_real_UR * lengths_UR, axis=1), 0),
    )


@partial(jax.jit, static_argnames="num_targets")
def _references(tasks: TaskBatch, num_targets: int):
    references, G = tasks.references, tasks.prompts.row_ids.shape[-1]
    A = references.tokens.shape[-1]
    width = min(num_targets or A, A)
    tokens_UMA, lengths_UM = references.tokens[..., :width], jnp.minimum(references.lengths, width)
    return jnp.repeat(tokens_UMA, G, axis=1), jnp.repeat(lengths_UM, G, axis=1)


@partial(jax.jit, static_argnames="is_thought")
def _kept(rollouts: Rollouts, think_end_tokens_UR, closers_V, *, is_thought: bool) -> Kept:
    is_closed = think_end_tokens_UR > 0
    # An open thought keeps all its tokens except a stop token; padding keeps none.
    num_open = jnp.maximum(0, rollouts.mask.sum(-1) - ~rollouts.truncated)
    if not is_thought:
        return Kept(tokens=rollouts.tokens, length=num_open, stub=is_closed.astype(jnp.int32))
    last = jnp.maximum(think_end_tokens_UR - 1, 0)
    closer_UR = closers_V[jnp.take_along_axis(rollouts.tokens, last[..., None], axis=-1)[..., 0]]
    stub_UR = jnp.where(is_closed, closer_UR, OPEN)
    closed_UR = jnp.where(closer_UR >= _AFTER_CLOSE, last, think_end_tokens_UR)
    return Kept(tokens=rollouts.tokens, length=jnp.where(is_closed, closed_UR, num_open), stub=stub_UR)


@partial(jax.jit, static_argnames=("num_prompts", "rival"))
def _pairs(rollouts: Rollouts, between_1W, length_1, *, num_prompts: int, rival: int) -> Kept:
    """Put each group's rollouts, moved by `rival` places, after its own."""
    U, R, _ = rollouts.tokens.shape

    def moved(x):
        grouped = x.reshape(U, num_prompts, R // num_prompts, *x.shape[2:])
        return jnp.roll(grouped, -rival, axis=2).reshape(x.shape)

    # The own stop token ends the first text; nothing must follow that of the second but the stub.
    lengths_UR = moved(jnp.maximum(0, rollouts.mask.sum(-1) - ~rollouts.truncated))
    zeros = jnp.zeros((U, R), jnp.int32)
    tokens, mask, _ = append_targets(
        rollouts.tokens, rollouts.mask.sum(-1), between_1W, length_1, zeros, moved(rollouts.tokens), lengths_UR
    )
    return Kept(tokens=tokens, length=mask.sum(-1), stub=zeros + CLOSED)


@partial(jax.jit, static_argnames=("header_length", "bos_id"))
def _documents_alone(prompts: Prompts, *, header_length: int, bos_id: int | None) -> Prompts:
    """Return prompts without a template: BOS and the document up to each cut."""
    num_bos = 0 if bos_id is None else 1
    U, M = prompts.cuts.shape
    tokens_UL = jnp.pad(prompts.trunk_tokens[:, header_length:], ((0, 0), (num_bos, 0)), constant_values=bos_id or 0)
    shift = num_bos - header_length
    return Prompts(
        trunk_tokens=tokens_UL,
        trunk_lengths=jnp.maximum(prompts.trunk_lengths + shift, 0),
        cuts=jnp.clip(prompts.cuts + shift, 1, tokens_UL.shape[1]),
        tail_tokens=jnp.zeros((U, M, 0), jnp.int32),
        tail_lengths=jnp.zeros((U, M), jnp.int32),
        prompt_mask=prompts.prompt_mask,
        row_ids=prompts.row_ids,
    )


@partial(jax.jit, static_argnames="num_targets")
def _gather(prompts: Prompts, logprobs_URT, first_UR, lengths_UR, *, num_targets: int) -> Scores:
    columns_A = jnp.arange(num_targets)
    is_real_UR = jnp.repeat(prompts.prompt_mask, logprobs_URT.shape[1] // prompts.cuts.shape[1], axis=1)
    mask_URA = (columns_A < lengths_UR[..., None]) & is_real_UR[..., None]
    places_URA = jnp.minimum(first_UR[..., None] + columns_A, logprobs_URT.shape[-1] - 1)
    values_URA = jnp.take_along_axis(logprobs_URT, places_URA, axis=-1)
    stems_U = prompts.trunk_lengths + jnp.sum(prompts.prompt_mask * prompts.tail_lengths, axis=1)
    # A row's last token is predicted, not run.
    rows_U = jnp.sum(is_real_UR * jnp.maximum(first_UR + lengths_UR - 1, 0), axis=1)
    return Scores(
        values=jnp.where(mask_URA, values_URA, 0.0),
        mask=mask_URA,
        tokens_run=jnp.where(prompts.prompt_mask.any(-1), stems_U + rows_U, 0).astype(jnp.int32),
    )
