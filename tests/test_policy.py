"""rpt_jax.load: every figure of a loaded policy against whole logits of plain sequences."""

import dataclasses

import jax
import numpy as np
import pyarrow.parquet
import pytest
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

import rpt_jax
from experiments import sample as sample_script
from experiments.presets import preset
from rpt_jax.errors import CheckpointError, ConfigError
from rpt_jax.models import decoder
from rpt_jax.train.pipeline import run_stages

pytestmark = pytest.mark.usefixtures("few_programs")

TEXT = "It rained all day on the hill. The dial on the safe shows 6. Dan winds it on by 4."


@pytest.fixture(scope="module")
def directory(corpus, tmp_path_factory):  # noqa: F811
    """A run that is a warm start only."""
    config = tiny_run(corpus, tmp_path_factory.mktemp("policy") / "run")
    run_stages(dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=0)))
    return config.run.directory


@pytest.fixture(scope="module")
def policy(directory):
    return rpt_jax.load(directory)


@pytest.fixture(scope="module")
def probabilities(policy):
    """Return the next token's probabilities after ids, f64 [V]."""
    logits_fn = jax.jit(lambda tokens: decoder.logits(policy.config.model, policy.params, tokens))

    def after(ids):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(logits_fn(padded), np.float64)[0, len(ids) - 1]
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    return after


def test_next_tokens_are_those_of_the_logits(policy, probabilities):
    expected = probabilities(policy.tokenizer.encode(TEXT))
    found = policy.next_token(TEXT, 5)
    assert [token.id for token in found] == np.argsort(-expected)[:5].tolist()
    np.testing.assert_allclose([token.probability for token in found], np.sort(expected)[::-1][:5], rtol=1e-4)
    assert all(policy.tokenizer.token_bytes(token.id).decode() == token.text for token in found)


def test_samples_carry_their_probabilities(policy, probabilities):
    samples = policy.sample(TEXT, 3, max_tokens=6, temperature=0.7, seed=1)
    assert samples == policy.sample(TEXT, 3, max_tokens=6, temperature=0.7, seed=1)
    assert samples != policy.sample(TEXT, 3, max_tokens=6, temperature=0.7, seed=2)
    context = policy.tokenizer.encode(TEXT)
    for one in samples:
        ids = list(context)
        for token in one.tokens:
            p = probabilities(ids) ** (1 / 0.7)
            np.testing.assert_allclose(token.probability, p[token.id] / p.sum(), rtol=1e-3)
            ids.append(token.id)
        assert one.is_finished == (one.tokens[-1].id in policy.config.rollout.stop_ids)
        assert one.text == "".join(token.text for token in one.tokens if token.id not in policy.config.rollout.stop_ids)


def test_scores_with_and_without_a_thought(policy, probabilities):
    tokenizer, tail = policy.tokenizer, policy.template.tail.tolist()
    continuation, thought = " Dan winds it", " 6, Dan+ 4 0,"
    for given in (None, thought, ""):
        ids = tokenizer.encode(TEXT)
        if given is not None:
            ids = [*ids, *tail, *tokenizer.encode(given), *tokenizer.encode("</think>\\boxed{")]
        expected = []
        for token in tokenizer.encode(continuation):
            expected.append(np.log(probabilities(ids)[token]))
            ids.append(token)
        score = policy.score(TEXT, continuation, thought=given)
        np.testing.assert_allclose(score.logprob, sum(expected), rtol=1e-4)
        np.testing.assert_allclose([np.log(t.probability) for t in score.tokens], expected, rtol=1e-4)


def test_thinking_averages_the_answers_after_its_thoughts(policy, probabilities):
    tokenizer, tail = policy.tokenizer, policy.template.tail.tolist()
    found = policy.think(TEXT, 3, max_tokens=8)
    mark, box = tokenizer.encode("</think>"), tokenizer.encode("\\boxed{")
    answers = []
    for thought in found.thoughts:
        written = tokenizer.encode(thought.text)
        answers.append(probabilities([*tokenizer.encode(TEXT), *tail, *written, *mark, *box]))
        assert thought.sample.text.startswith(thought.text)
    mixture = np.mean(answers, axis=0)
    np.testing.assert_allclose(found.probabilities[0].probability, mixture.max(), rtol=1e-4)
    assert [t.probability for t in found.probabilities] == sorted(
        (t.probability for t in found.probabilities), reverse=True
    )


def test_rewards_are_those_of_training(policy):
    completions = [f" 6,</think>\\boxed{{{text}}}" for text in (" Dan", " Dan winds", " Da", "")] + [" Dan"]
    assert policy.reward(TEXT, " Dan winds it on by 4.", completions) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert policy.reward(TEXT, " Dan winds", completions, terms=("first_token",))[:2] == [1.0, 1.0]


def test_unusable_input_is_named(policy, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json.*run directory or a Hugging Face"):
        rpt_jax.load(tmp_path)
    for call in (policy.next_token, policy.think, policy.sample):
        with pytest.raises(ConfigError, match="the text is empty"):
            call("")
    with pytest.raises(ConfigError, match="the continuation is empty"):
        policy.score(TEXT, "")
    with pytest.raises(ConfigError, match="positions; the model has 32768"):
        policy.sample(TEXT, max_tokens=40_000)
    with pytest.raises(ConfigError, match="one token; sampling needs at least two"):
        policy.sample(" Dan")


def test_the_script_prints_thoughts_and_probabilities(directory, capsys):
    sample_script.main(["--policy", directory, "--prompt", TEXT, "-n", "2", "--max-tokens", "8", "--think"])
    printed = capsys.readouterr().out
    assert "thought 1" in printed and "thought 2" in printed and "next token" in printed


def test_training_from_python_with_a_function_as_reward(corpus, tmp_path):  # noqa: F811
    """A closure as reward: its values are those of the records of completions, and no command line is needed."""
    config = tiny_run(corpus, tmp_path / "run")
    config = dataclasses.replace(
        evaluated_at_the_ends(config),
        run=dataclasses.replace(config.run, num_steps=2, control=False, completions_every_steps=1),
        eval=dataclasses.replace(config.eval, every_steps=2),
    )
    offset = 0.5
    trained = rpt_jax.train(config, reward=lambda completion, prediction, columns: len(completion) + offset)
    assert trained.config.policy.path == str(tmp_path / "run")
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "step_000002.parquet").to_pylist()
    assert rows and all(
        row["reward"] == sum(len(trained.tokenizer.token_bytes(i)) for i in row["completion_tokens"]) + offset
        for row in rows
    )
    assert (tmp_path / "run" / "report.html").exists()


def test_presets_from_python():
    config = preset("tiny_text", {"data.path": "my.txt", "rollout.group_size": 4, "supervised.optimizer.b1": 0.8})
    assert (config.data.path, config.rollout.group_size, config.supervised.optimizer.b1) == ("my.txt", 4, 0.8)
    assert config.run.directory == "runs/tiny_text" and config.rollout.num_trunks == 12
    with pytest.raises(ConfigError, match=r"no setting 'rollout.groupsize'. Did you mean 'rollout.group_size'"):
        preset("tiny_text", {"rollout.groupsize": 4})
    with pytest.raises(ConfigError, match="group_size=1"):
        preset("tiny_text", {"rollout.group_size": 1})
    with pytest.raises(ConfigError, match="must be one of tiny_worked"):
        preset("tiny")
