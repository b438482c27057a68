"""Scoring passes that a reward or an evaluation requests: log-probabilities of a target after a prompt and a thought.

A request is data; `Scorer.score` runs it through the model's one graph. Rollouts share their trunk, as in the update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.scoring.logprobs import score
from rpt_jax.scoring.vocabulary import longest_prefix_tokens, vocabulary_index
from rpt_jax.sequences import append_targets, completions
from rpt_jax.tokenizer import THINK_CLOSE
from rpt_jax.types import Prompts, Rollouts, TaskBatch, record


@dataclass(frozen=True, kw_only=True)
class Request:
    """One scoring pass.

    Raises:
        ValueError: the direct view with a thought or a stub.
    """

    name: str
    policy: Literal["current", "start", "average"] = "current"
    """The policy in training, the policy it started from, or its moving average."""
    view: Literal["prompt", "direct"] = "prompt"
    """prompt: after the template, like rollouts; direct: after document tokens alone, without a template."""
    keep: Literal["nothing", "thought", "completion"] = "thought"
    """Tokens of the rollout to put before the stub. thought: up to the end of the last </think>."""
    stub: str = ""
    """Text before the target; an open thought is closed before it."""
    target: Literal["reference", "prediction"] = "reference"
    """reference: the task's tokens; prediction: the longest vocabulary entry that begins the prediction."""
    num_targets: int = 0
    """Number of leading reference tokens to score. 0: all."""

    def __post_init__(self):
        if self.view == "direct" and (self.keep != "nothing" or self.stub):
            raise ValueError(f"request {self.name!r}: the direct view has no template, so no thought and no stub")


@record
class Scores:
    """The result of a scoring pass."""

    values: Any  # f32 [U, R, A], log-probabilities of the target's tokens at temperature 1, nats; padding 0
    mask: Any  # bool [U, R, A], real target tokens
    tokens_run: Any  # i32 [U], tokens that the model ran


@dataclass(frozen=True)
class Scorer:
    """Runs requests.

    Attributes:
        config: the model's shape.
        tokenizer: of the model.
        header_length: trunk tokens before the document, including BOS.
        trunks_at_once: U -> number of trunks to run at a time, a divisor of U; None: all.
    """

    config: DecoderConfig
    tokenizer: Any
    header_length: int
    trunks_at_once: Callable[[int], int] | None = None

    @cached_property
    def _index(self):
        return vocabulary_index(self.tokenizer.byte_table())

    def score(self, request: Request, params, tasks: TaskBatch, rollouts: Rollouts, predictions) -> Scores:
        """Run one request.

        Args:
            request: what to score.
            params: of the request's policy.
            tasks, rollouts: of one batch.
            predictions: `answer.Predictions` of the rollouts, [U, R, ...].
        """
        targets = self._targets(request, tasks, predictions)
        at_once = self.trunks_at_once(len(tasks.prompts.cuts)) if self.trunks_at_once else 0
        if request.view == "direct":
            bos_id = self.tokenizer.bos_id
            prompts = _documents_alone(tasks.prompts, header_length=self.header_length, bos_id=bos_id)
            tokens, lengths = targets
            mask, first_UR = jnp.arange(tokens.shape[-1]) < lengths[..., None], jnp.zeros_like(lengths)
        else:
            prompts, (kept, keep_UR, which_UR) = tasks.prompts, _kept(request, rollouts, predictions.think_end_tokens)
            tokens, mask, first_UR = _append(kept, keep_UR, *self._stubs(request), which_UR, *targets)
        sequences = _completions(prompts, tokens, mask)
        logprobs = score(self.config, params, sequences, temperature=1.0, trunks_at_once=at_once)
        return _gather(prompts, logprobs, first_UR, targets[1], num_targets=targets[0].shape[-1])

    def _targets(self, request: Request, tasks: TaskBatch, predictions):
        """Return (tokens i32 [U, R, A], lengths i32 [U, R])."""
        if request.target == "prediction":
            U, R, X = predictions.bytes.shape
            rows = predictions.bytes.reshape(U * R, X), predictions.lengths.reshape(U * R)
            chosen_UR = longest_prefix_tokens(self._index, *rows).reshape(U, R)
            return jnp.maximum(chosen_UR, 0)[..., None], (chosen_UR >= 0).astype(jnp.int32)
        return _references(tasks, request.num_targets)

    def _stubs(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """Return the stubs after an open thought and after a closed one: (ids [2, W], lengths [2])."""
        close, stub = (self.tokenizer.encode_continuation(text) for text in (THINK_CLOSE, request.stub))
        return np.array([close + stub, stub + [0] * len(close)], np.int32), np.array([len(close + stub), len(stub)])


_append, _completions = jax.jit(append_targets), jax.jit(completions)


@partial(jax.jit, static_argnames="num_targets")
def _references(tasks: TaskBatch, num_targets: int):
    references, G = tasks.references, tasks.prompts.row_ids.shape[-1]
    A = references.tokens.shape[-1]
    width = min(num_targets or A, A)
    tokens_UMA, lengths_UM = references.tokens[..., :width], jnp.minimum(references.lengths, width)
    return jnp.repeat(tokens_UMA, G, axis=1), jnp.repeat(lengths_UM, G, axis=1)


@partial(jax.jit, static_argnames="request")
def _kept(request: Request, rollouts: Rollouts, think_end_tokens_UR):
    """Return (tokens [U, R, C], number to keep i32 [U, R], index of the stub i32 [U, R])."""
    is_closed = think_end_tokens_UR > 0
    # An open thought keeps all its tokens except a stop token; padding keeps none.
    num_open = jnp.maximum(0, rollouts.mask.sum(-1) - ~rollouts.truncated)
    if request.keep == "nothing":
        nothing = jnp.zeros_like(num_open)
        return rollouts.tokens[..., :0], nothing, nothing
    keep_UR = num_open if request.keep == "completion" else jnp.where(is_closed, think_end_tokens_UR, num_open)
    return rollouts.tokens, keep_UR, is_closed.astype(jnp.int32)


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
