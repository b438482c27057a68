"""A policy in a notebook: sample, think, score and reward, each with the code that the trainer runs.

import rpt_jax
policy = rpt_jax.load("runs/quickstart")        # or a Hugging Face model directory
policy.think("The dial on the safe shows 6. Dan winds it on by 4. Now the dial shows").probabilities
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Config, DataConfig, MeshConfig, PolicyConfig, RunConfig
from rpt_jax.data.questions import Question, make_question_template, question_prompt
from rpt_jax.data.templates import Template, make_template
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import program_shapes
from rpt_jax.rewards.base import earn, make_reader
from rpt_jax.rewards.catalog import judges, make_reward
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.scoring.requests import AFTER_THOUGHT, DIRECT_ANSWER, OPEN, Kept, Scorer
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.tokenizer import THINK_CLOSE, Tokenizer
from rpt_jax.train.policies import check_path, is_run
from rpt_jax.train.run import load_policy
from rpt_jax.train.run_directory import read_config
from rpt_jax.types import Rollouts, TaskBatch

# Trunks and completions are padded to multiples of this, so that texts of similar lengths share a program.
_BLOCK = 64

Prompt = str | Sequence[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token: its text (a partial character shows as U+FFFD), id and probability."""

    text: str
    id: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled completion.

    Attributes:
        text: of the completion, without its stop token.
        tokens: of the completion, with probabilities under the temperature-scaled, untruncated distribution.
        is_finished: whether a stop token ended it; False: the limit did.
    """

    text: str
    tokens: tuple[Token, ...]
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A sampled thought and the prediction after it.

    Attributes:
        text: of the thought, up to </think> if there is one.
        prediction: the text in the completion's last box; None: there is no closed box after a thought.
        sample: the whole completion.
    """

    text: str
    prediction: str | None
    sample: Sample


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Thoughts about a text.

    Attributes:
        thoughts: that were sampled.
        probabilities: of the most likely next tokens, the mean over the thoughts, most likely first.
    """

    thoughts: tuple[Thought, ...]
    probabilities: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of a continuation, nats, in total and by token."""

    logprob: float
    tokens: tuple[Token, ...]


def load(
    path: str | Path,
    *,
    template: str = "",
    chat: bool | None = None,
    dtype: str = "",
    mesh: MeshConfig | None = None,
) -> "Policy":
    """Load the policy of a run or of a Hugging Face model directory.

    Args:
        path: run directory, whose newest policy is loaded, or model directory.
        template: of the prompts of `think`, as data.template; empty: the run's, or minimal for a model.
        chat: wrap these prompts in the chat template; None: as in the run, or False for a model.
        dtype: of activations, float32 or bfloat16; empty: that of the platform.
        mesh: of the devices; None: one device.
    Raises:
        ConfigError, DataError, CheckpointError: an unusable directory or template.
    """
    path = Path(path)
    if not path.exists() and len(path.parts) == 2:
        check_path(str(path))  # perhaps a name on a hub
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} has no config.json; it must be a run directory or a Hugging Face model directory. Check the path."
        )
    base = read_config(path, say=False) if is_run(path) else Config(data=DataConfig(template="minimal"))
    data = replace(
        base.data,
        tokenizer="",
        tokenizer_pattern="",
        template=template or base.data.template,
        chat=base.data.chat if chat is None else chat,
    )
    config = replace(
        base,
        policy=PolicyConfig(path=str(path)),
        mesh=mesh or MeshConfig(),
        data=data,
        run=RunConfig(seed=base.run.seed),
        model=replace(base.model, activation_dtype=dtype),
    )
    config.validate()
    loaded = load_policy(config, lambda tokenizer, resolved: make_template(tokenizer, resolved.data))
    return Policy(config=loaded.config, mesh=loaded.mesh, tokenizer=loaded.tokenizer, params=loaded.params)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy to look at. Texts are plain strings; the same seed gives the same samples.

    Attributes:
        config: with the model's shape; its rollout section holds the defaults of `think`.
        mesh: that holds the parameters.
        tokenizer: of the policy.
        params: tree of arrays.
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    params: Any

    def __repr__(self) -> str:
        m = self.config.model
        return f"Policy({self.config.policy.path}: {m.family}, {m.num_layers} layers of width {m.width})"

    @cached_property
    def template(self) -> Template:
        """Return the template of the prompts of `think`: that of positions, or of the run's questions."""
        if self._asks_questions:
            return make_question_template(self.tokenizer, self.config.questions, self.config.data)
        return make_template(self.tokenizer, self.config.data)

    @property
    def _asks_questions(self) -> bool:
        return bool(self.config.questions.path)

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[Sample]:
        """Continue a text, or answer messages in the chat template.

        Args:
            prompt: a text; or messages, each {"role", "content"}.
            n: number of samples.
            max_tokens: of each.
            temperature: 0 is greedy.
            top_p, top_k: as in `rollout.top_p`, `rollout.top_k`.
            seed: of the noise.
        Raises:
            ConfigError: the prompt and `max_tokens` do not fit the model.
            DataError: the tokenizer has no chat template, or the template fails.
        """
        ids = self._prompt(prompt)
        settings = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        rollouts = self._generate(self._tasks(ids[:-1], ids[-1:], n, max_tokens), seed=seed, **settings)
        return self._samples(to_host(rollouts))

    def next_token(self, text: str, k: int = 10) -> list[Token]:
        """Return the k most likely next tokens, at most 16, without a thought or a template."""
        tasks = self._tasks([*self.template.header, *self._encode(text)], self.template.tail, 1, 1)
        return self._top(self._scorer.answers(DIRECT_ANSWER, self.params, tasks, None))[:k]

    def think(
        self, text: str, n: int = 8, *, max_tokens: int = 0, temperature: float | None = None, seed: int = 0
    ) -> Thinking:
        """Sample thoughts about what comes next, with their predictions, and average the answers after them.

        A policy that was trained on questions is asked the text as a question, in the prompt that training used; the
        probabilities are those of the answer's first token.

        Args:
            text: a document up to a position, or a question.
            n: number of thoughts.
            max_tokens: of each completion; 0: as in training.
            temperature: None: as in training.
            seed: of the noise.
        """
        rollout = self.config.rollout
        max_tokens = max_tokens or rollout.max_completion_tokens
        temperature = rollout.temperature if temperature is None else temperature
        tasks = self._tasks([*self.template.header, *self._asked(text)], self.template.tail, n, max_tokens)
        rollouts = self._generate(
            tasks, max_tokens=max_tokens, temperature=temperature, top_p=rollout.top_p, top_k=rollout.top_k, seed=seed
        )
        # Wide enough for a completion that is one box.
        _, lengths = self.tokenizer.byte_table()
        predictions, _ = self._read(rollouts, min(1024, max_tokens * int(lengths.max())))
        kept = self._scorer.kept(AFTER_THOUGHT, rollouts, predictions.think_end_tokens)
        answers = self._scorer.answers(AFTER_THOUGHT, self.params, tasks, kept)
        samples, predictions = self._samples(to_host(rollouts)), to_host(predictions)
        thoughts = []
        for row, sample in enumerate(samples):
            found, length = predictions.found[0, row], predictions.lengths[0, row]
            text = predictions.bytes[0, row, :length].tobytes().decode(errors="replace") if found else None
            before, mark, _ = sample.text.rpartition(THINK_CLOSE)
            thoughts.append(Thought(text=before if mark else sample.text, prediction=text, sample=sample))
        return Thinking(thoughts=tuple(thoughts), probabilities=tuple(self._top(answers)))

    def score(self, text: str, continuation: str, *, thought: str | None = None) -> Score:
        """Return the log-probability of a continuation at temperature 1.

        Args:
            text: a document up to a position.
            continuation: what comes next.
            thought: to put before it: the template's prompt, the thought, its mark and an open box precede the
                continuation; None: the text alone does.
        Raises:
            ConfigError: an empty continuation, or one that does not fit the model.
        """
        tokens = self.tokenizer.encode_continuation(continuation)
        if not tokens:
            raise ConfigError("the continuation is empty; a score needs at least one token. Pass some text.")
        request = replace(DIRECT_ANSWER if thought is None else AFTER_THOUGHT, num_targets=0)
        written = [] if thought is None else self.tokenizer.encode_continuation(thought)
        kept = Kept(
            tokens=np.asarray(written or [0], np.int32)[None, None],
            length=np.full((1, 1), len(written), np.int32),
            stub=np.full((1, 1), OPEN, np.int32),
        )
        trunk = [*self.template.header, *self._encode(text)]
        tasks = self._tasks(trunk, self.template.tail, 1, len(written) + len(tokens) + 16, reference=tokens)
        kept = None if thought is None else shard_batch(self.mesh, kept)
        scores = to_host(self._scorer.score_after(request, self.params, tasks, kept))
        logprobs = scores.values[0, 0][scores.mask[0, 0]]
        return Score(logprob=float(logprobs.sum()), tokens=self._tokens(tokens, np.exp(logprobs)))

    def reward(
        self, text: str, continuation: str, completions: Sequence[str], *, terms: Sequence[str] = ("prefix",)
    ) -> list[float]:
        """Return the rewards of completions at a position.

        Args:
            text: a document up to a position.
            continuation: the true text from there on.
            completions: each with its thought, mark and box, as a rollout would write it.
            terms: as in `reward.terms`, whatever the run was trained with; no judges such as math or custom.
        Raises:
            ConfigError: nothing to reward, a judge among the terms, or texts that do not fit the model.
        """
        if not completions or not continuation:
            raise ConfigError("a reward needs completions and a continuation; one of them is empty. Pass some text.")
        if judged := judges(terms):
            raise ConfigError(
                f"terms={tuple(terms)}: {', '.join(judged)} judges a task of a run, and a position here has none. Call "
                "the judge's function itself, or use other terms."
            )
        tokens = self.tokenizer.encode_continuation(continuation)[: self.config.data.continuation_tokens]
        # Rollouts end with a stop token.
        rows = [[*self.tokenizer.encode_continuation(text), self.tokenizer.eos_id] for text in completions]
        width = max(map(len, rows))
        trunk = [*self.template.header, *self._encode(text)]
        tasks = self._tasks(trunk, self.template.tail, len(rows), width, reference=tokens)
        values, mask = np.zeros((1, len(rows), width), np.int32), np.zeros((1, len(rows), width), bool)
        for number, row in enumerate(rows):
            values[0, number, : len(row)], mask[0, number, : len(row)] = row, True
        rollouts = Rollouts(
            tokens=values, mask=mask, sampler_logprobs=None, truncated=np.zeros((1, len(rows)), bool), num_rejected=None
        )
        reward = make_reward(replace(self.config.reward, terms=tuple(terms)), self.tokenizer, scorer=self._scorer)
        policies = {CURRENT: self.params, "start": self.params, "average": self.params}
        _, earned, _ = earn(reward, policies, tasks, shard_batch(self.mesh, rollouts))
        return to_host(earned.rewards)[0, 0].tolist()

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.config.model, self.tokenizer, len(self.template.header))

    @cached_property
    def _read(self):
        return make_reader(self.config.reward, self.tokenizer)

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ConfigError("the text is empty; a position needs at least one token before it. Pass some text.")
        return ids

    def _asked(self, text: str) -> list[int]:
        """Return the ids of a position's text, or of a question as training puts it."""
        if not self._asks_questions:
            return self._encode(text)
        question = Question(id="", messages=(("user", text),), answers=())
        return question_prompt(question, self.tokenizer, self.config.questions, self.config.data)

    def _prompt(self, prompt: Prompt) -> list[int]:
        """Return all ids of a prompt to sample from, at least two."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        if isinstance(prompt, str):
            ids = bos + self._encode(prompt)
        else:
            messages = [(message["role"], message["content"]) for message in prompt]
            after = self.tokenizer.encode_rendered(self.tokenizer.chat_parts()[1])
            ids = bos + self.tokenizer.chat_prompt(messages) + after
        if len(ids) < 2:
            raise ConfigError(f"the prompt {prompt!r} is one token; sampling needs at least two. Pass a longer prompt.")
        return ids

    def _tasks(self, trunk, tail, n: int, max_tokens: int, *, reference: Sequence[int] = (0,)) -> TaskBatch:
        """Build one prompt with n rows, on the mesh; without a reference, one token stands for it.

        Raises:
            ConfigError: the prompt and `max_tokens` tokens do not fit the model.
        """
        size, limit = len(trunk) + len(tail) + max_tokens, self.config.model.max_positions
        if size > limit:
            raise ConfigError(
                f"a prompt of {len(trunk) + len(tail)} tokens and {max_tokens} more make {size} positions; the model "
                f"has {limit}. Shorten the text, or lower max_tokens."
            )
        pieces = [self.tokenizer.token_bytes(i) for i in reference]
        text, ends = b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
        task = Task(
            id=0, cut=len(trunk), text=text, boundaries=sorted({int(e) for e in ends if e}), tokens=list(reference)
        )
        tasks = build_tasks(
            [(np.asarray(trunk, np.int32), [task])],
            tail=list(tail),
            row_ids=np.arange(n, dtype=np.int32)[None, None],
            trunk_length=-(-len(trunk) // _BLOCK) * _BLOCK,
            num_bytes=-(-max(1, len(text)) // 8) * 8,
            num_tokens=len(reference),
        )
        return shard_batch(self.mesh, tasks)

    def _generate(self, tasks: TaskBatch, *, max_tokens: int, temperature, top_p, top_k, seed: int) -> Rollouts:
        return generate(
            self.config.model, self.params, tasks.prompts, rollout_key(seed, 0), max_completion_tokens=max_tokens,
            temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=self.config.rollout.stop_ids,
            vocab_size=self.tokenizer.vocab_size, schedule=SCHEDULES[program_shapes(self.config)],
        )  # fmt: skip

    def _samples(self, rollouts: Rollouts) -> list[Sample]:
        samples = []
        for ids, mask, logprobs, truncated in zip(*jax.tree.map(
            lambda x: x[0], (rollouts.tokens, rollouts.mask, rollouts.sampler_logprobs, rollouts.truncated)
        ), strict=True):  # fmt: skip
            written = ids[mask]
            text = written if truncated else written[:-1]
            samples.append(
                Sample(
                    text=self.tokenizer.decode(text.tolist()),
                    tokens=self._tokens(written.tolist(), np.exp(logprobs[mask])),
                    is_finished=not truncated,
                )
            )
        return samples

    def _tokens(self, ids: Sequence[int], probabilities) -> tuple[Token, ...]:
        return tuple(
            Token(text=self.tokenizer.token_bytes(i).decode(errors="replace"), id=int(i), probability=float(p))
            for i, p in zip(ids, probabilities, strict=True)
        )

    def _top(self, answers) -> list[Token]:
        answers = to_host(answers)
        return list(self._tokens(answers.mixture_tokens[0, 0].tolist(), answers.mixture_probabilities[0, 0]))
