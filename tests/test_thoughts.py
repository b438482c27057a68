"""Answers after swapped thoughts: every condition from whole logits of plain sequences, filler lengths, calibration."""

import dataclasses

import jax
import numpy as np
import pytest
from test_evals import evaluation  # noqa: F401  (a fixture)

from rpt_jax.evals.thoughts import CONDITIONS, DIRECT, FILLER, NONE, OTHER, OWN, ThoughtEvaluator, calibration_error
from rpt_jax.models import decoder
from rpt_jax.scoring.requests import CLOSED, OPEN, Kept, start_past_close

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(scope="module")
def thinking(evaluation):  # noqa: F811
    evaluator, params = evaluation
    found = ThoughtEvaluator(
        config=evaluator.config, mesh=evaluator.mesh, tokenizer=evaluator.tokenizer, source=evaluator.source,
        splits=evaluator.splits, scorer=evaluator.reward.scorer,
    )  # fmt: skip
    return found, params


def test_every_condition_from_whole_logits(thinking):
    evaluator, params = thinking
    source, tokenizer, config = evaluator.source, evaluator.tokenizer, evaluator.config
    ids = evaluator.splits["all"]
    own = evaluator._own(params, ids)
    mark, box, dot = (tokenizer.encode(text) for text in ("</think>", "\\boxed{", "."))
    logits_fn = jax.jit(lambda tokens: jax.nn.log_softmax(decoder.logits(config.model, params, tokens)))

    def logprobs_after(prompt):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(prompt)] = prompt
        return np.asarray(logits_fn(padded), np.float64)[0, len(prompt) - 1]

    def thought(i, k):
        kept = own.tokens[i, k, : own.length[i, k]].tolist()
        assert (kept[-1:] == mark) == (own.stub[i, k] == CLOSED)
        return kept if own.stub[i, k] == OPEN else kept[:-1]

    expected = {name: {"correct": [], "mixture_correct": [], "logprob": [], "confidence": []} for name in CONDITIONS}
    n, K = len(ids), config.eval.num_samples
    for i, position in enumerate(ids):
        document = source.documents[source.table.document[position]].tokens
        target = int(document[source.table.index[position]])
        batch = source.make([[int(position)]], prompts_per_trunk=1, group_size=1)
        context = batch.prompts.trunk_tokens[0, : batch.prompts.cuts[0, 0]].tolist()
        prompt = [*context, *source.template.tail]
        rows = {
            OWN: [[*prompt, *thought(i, k), *mark, *box] for k in range(K)],
            OTHER: [[*prompt, *thought((i + n // 2) % n, k), *mark, *box] for k in range(K)],
            FILLER: [[*prompt, *dot * len(thought(i, k)), *mark, *box] for k in range(K)],
            NONE: [[*prompt, *mark, *box]],
            DIRECT: [context],
        }
        for name, of_condition in rows.items():
            logprobs = np.array([logprobs_after(row) for row in of_condition])
            mixture = np.exp(logprobs).mean(0)
            cells = expected[name]
            # Every token of this vocabulary but the marks is one byte: a right prediction is the true token.
            cells["correct"].append(np.mean(logprobs.argmax(-1) == target))
            cells["mixture_correct"].append(float(mixture.argmax() == target))
            cells["logprob"].append(np.log(mixture[target]))
            cells["confidence"].append(mixture.max())
    figures = evaluator.evaluate(params)["all"]
    for name, cells in expected.items():
        for metric, values in cells.items():
            got = figures[name][metric]
            assert got["n"] == n
            np.testing.assert_allclose(got["value"], np.mean(values), atol=2e-5, err_msg=f"{name} {metric}")
        if name != OWN:
            gains = np.subtract(expected[OWN]["logprob"], cells["logprob"])
            got = figures[name]["own_minus_logprob"]
            np.testing.assert_allclose(got["value"], gains.mean(), atol=2e-5)
            np.testing.assert_allclose(got["standard_error"], gains.std(ddof=1) / np.sqrt(n), atol=2e-5)


def test_filler_is_as_long_as_the_thought_before_its_mark(thinking):
    """A mark of several tokens, whole or cut by a token that runs past it; an open thought counts whole."""
    evaluator, _ = thinking
    texts = {1: b"ab", 2: b"c</", 3: b"think", 4: b">", 5: b"d", 6: b"</"}

    class Spelled:
        vocab_size = 7

        def token_bytes(self, i):
            return texts.get(i, b"")

        def byte_table(self):
            return None, np.array([len(texts.get(i, b"")) for i in range(7)])

        def encode_continuation(self, text):
            return [0]

    class SpelledScorer:
        def replaced_bytes(self, stub):
            return np.where(stub == 2, 1, 0)

    evaluator = dataclasses.replace(evaluator, tokenizer=Spelled(), scorer=SpelledScorer())
    kept = Kept(
        tokens=np.array([[[1, 5, 6, 3, 4, 0], [1, 2, 3, 4, 0, 0], [5, 1, 6, 3, 0, 0], [1, 5, 5, 0, 0, 0]]]),
        length=np.array([[5, 4, 4, 3]]),
        # Closed; closed, its mark begins inside a token; ">" was part of a longer token; open.
        stub=np.array([[CLOSED, CLOSED, 2, OPEN]]),
    )
    filler = evaluator._filler(kept)
    assert filler.length.tolist() == [[2, 2, 2, 3]] and (filler.stub == OPEN).all()


@pytest.mark.parametrize(
    ("token", "start"),
    [(b">\\", ">"), (b">\n\n", ">"), (b">", ""), (b"think>", ""), (b"think>\\", "think>"), (b"x</think>y", "x</think>"),
     (b"</think>", ""), (b"a>b", ""), (b"", ""), (b">>", ">")],
)  # fmt: skip
def test_a_token_that_runs_past_the_mark(token, start):
    assert start_past_close(token) == start


def test_calibration_by_hand():
    # Bins [.2, .3): one right of two at .25, gap .25; [.9, 1]: three right of three at .95 and 1, gap .1 / 3.
    confidence, correct = np.array([0.25, 0.25, 0.95, 0.95, 1.0]), np.array([1.0, 0, 1, 1, 1])
    got = calibration_error(confidence, correct)
    assert got["n"] == 5 and np.isclose(got["value"], (abs(0.5) + abs(0.1)) / 5)
    rng = np.random.default_rng(0)
    p = rng.random(40_000)
    assert calibration_error(p, (rng.random(40_000) < p).astype(float))["value"] < 0.01
    assert calibration_error(np.full(1000, 0.9), np.zeros(1000))["value"] == pytest.approx(0.9)
