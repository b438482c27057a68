"""Parts of the recipes: puzzles, pairs by length, leaks, scripts, and a small recipe judged after every step."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

from experiments.presets import PRESETS
from experiments.recipes import base_start, common, inverse_incentive, kimi, puzzles, r1, ravr, rpt_then_rl
from experiments.recipes.judging import Judge
from rpt_jax.config import Config
from rpt_jax.config.schema import with_values
from rpt_jax.data.questions import read_questions
from rpt_jax.errors import ConfigError
from rpt_jax.tokenizer import load_tokenizer
from rpt_jax.train.pipeline import Files, chained, run_recipe
from rpt_jax.train.run_directory import read_json

DIGITS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * 2}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def worked_value(thought: str) -> int:
    """The result of a worked thought, recomputed step by step."""
    first, *steps = [part for part in thought.replace(" check", "").strip(" ,").split(", ")]
    value = int(first)
    for step in steps:
        if re.fullmatch(r"\d", step):
            value = int(step)  # the check begins again
            continue
        op, operand, result = re.fullmatch(r"\w+([+*-]) (\d) (\d)", step).groups()
        value = DIGITS[op](value, int(operand)) % 10
        assert value == int(result)
    return value


WRITERS = {
    puzzles.write_two_scripts: {"num_cold": 12},
    puzzles.write_long_chains: {"num_long": 12},
    puzzles.write_with_questions: {"num_questions": 12},
    puzzles.write_with_hints: {},
    puzzles.write_without_format: {"num_cold": 12, "formatted": 0.1},
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_corpora_are_closed_reproducible_and_hold_out(write, tmp_path):
    sizes = {"seed": 4, "num_train": 40, "num_heldout": 30, "num_base": 60} | WRITERS[write]
    write(tmp_path / "a", **sizes)
    write(tmp_path / "b", **sizes)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.jsonl"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    heldout = {r["text"][: r["text"].rfind(" ", 0, -1)] for r in lines(tmp_path / "a" / "heldout.jsonl")}
    for name in files:
        for record in lines(tmp_path / "a" / name):
            text = record.get("text", record.get("question")) + record.get("completion", "")
            assert tokenizer.unk_id not in tokenizer.encode(text), text
            assert name == "heldout.jsonl" or record.get("text") not in heldout
    for name in ("cold_start.jsonl", "long.jsonl"):
        for record in lines(tmp_path / "a" / name) if name in files else ():
            thought, answer = re.fullmatch(r"(.*)</think>\\boxed\{ (\d)\}", record["completion"]).groups()
            assert worked_value(thought) == int(answer)
            # The long ones work the puzzle twice.
            assert (" check" in thought) == (name == "long.jsonl")


def test_questions_have_the_result_as_their_answer(tmp_path):
    puzzles.write_with_questions(tmp_path, seed=1, num_train=5, num_heldout=40, num_base=200, num_questions=40)
    for name in ("questions.jsonl", "heldout_questions.jsonl"):
        found = read_questions(str(tmp_path / name))
        assert len(found) == 40 and all(q.answers[0] in "0123456789" and q.category for q in found)
    asked = [r["text"] for r in lines(tmp_path / "base.jsonl") if "?" in r["text"]]
    assert len(asked) == 40
    for text in asked:
        _, thought, answer = re.fullmatch(r"(.*\?)\n<think>\n(.*)</think>\\boxed\{ (\d)\}", text).groups()
        assert thought == " A guess." or worked_value(thought) == int(answer)


def test_a_fifth_of_the_names_mix_scripts_only_in_the_base(tmp_path):
    puzzles.write_two_scripts(tmp_path, seed=0, num_train=20, num_heldout=5, num_base=400, num_cold=40)

    def mixed(record):
        return r1.is_mixed({"context": record["text"], "completion": record["completion"]})

    thoughts = [r for r in lines(tmp_path / "base.jsonl") if "completion" in r]
    assert 0.4 < np.nanmean([mixed(r) for r in thoughts]) < 0.8
    assert not any(mixed(r) for r in lines(tmp_path / "cold_start.jsonl"))


def test_scripts_by_hand():
    latin, cyrillic = "Dan picks 4.", "Глеб выбирает 4."
    assert r1.is_mixed({"context": latin, "completion": " 4, Dan+ 1 5,</think>x"}) == 0
    assert r1.is_mixed({"context": latin, "completion": " 4, Глеб+ 1 5,</think>x"}) == 1
    assert r1.is_mixed({"context": cyrillic, "completion": " 4, Глеб+ 1 5,</think>Dan"}) == 0
    assert np.isnan(r1.is_mixed({"context": latin, "completion": " 4,</think>x"}))


def test_pairs_by_length_by_hand():
    def row(prompt, size, reward, truncated=False):
        tokens = list(range(size)) if reward > 0.5 else [9] * size
        return {"trunk_tokens": [prompt], "completion_tokens": tokens, "reward": reward, "truncated": truncated}

    rows = [
        row(1, 4, 1.0), row(1, 6, 0.95), row(1, 7, 0.95), row(1, 3, 0.0), row(1, 3, 0.0),  # 6 is not over 1.5 times 4
        row(2, 5, 0.0), row(3, 2, 1.0, truncated=True), row(4, 2, 1.0),
    ]  # fmt: skip
    pairs = list(kimi.length_pairs(rows))
    assert [(p["trunk_tokens"], len(p["chosen_tokens"]), p["rejected_tokens"]) for p in pairs] == [
        ([1], 4, list(range(7))), ([1], 4, [9, 9, 9])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("thought", "answer", "expected"),
    [
        (" 6, Dan+ 4 0,", " 0", False),
        (" 0, so it is 0,", " 0", True),  # the answer comes first
        ("It must be 7. The answer is 7.", "7", True),
        ("\\boxed{ 0} it was", " 0", True),
        ("As given above, we add.", "3", True),
        ("3 and 4 make 7", "7", False),
    ],
)
def test_leaks(thought, answer, expected):
    assert ravr.leaks(thought, answer) is expected


def test_the_accuracy_of_a_judge_by_hand():
    """Truth 0, 1, 1: two pairs differ. A tie of the guess counts half."""
    found = inverse_incentive.pair_accuracy(np.array([0, 1, 1]), np.array([0.2, 0.9, 0.2]))
    np.testing.assert_allclose(found, [0.75, 1.0, 0.5])


TINY = PRESETS["tiny_worked"]
MODULES = {
    r1: ({"cold_start": "", "zero": True, "without_language": True, "language_weight": 0.5, "cold_steps": 1,
          "sft_steps": 1, "batches": 1, "texts": 1}, 9),
    kimi: ({"cold_start": "", "length_weight": 0.1, "shorten": "rl", "cold_steps": 1, "sft_steps": 1, "dpo_steps": 1,
            "dpo_rate": 1e-4, "batches": 1}, 11),
    rpt_then_rl: ({"questions": "", "heldout_questions": "", "mixed": "", "rl_steps": 1}, 9),
    ravr: ({"rounds": 2, "batches": 1, "sft_steps": 1, "unfiltered": True}, 12),
    base_start: ({"cold_start": "", "cold_steps": 1, "formatted": 0.0}, 9),
    inverse_incentive: ({"cold_start": "", "cold_steps": 1, "ranking_loss": 1.0}, 4),
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_step_is_a_valid_run_or_makes_files(module, tmp_path):
    own, number = MODULES[module]
    config = common.on_puzzles(with_values(TINY, {"run.directory": str(tmp_path)}))
    steps = chained(module.recipe(config, argparse.Namespace(**own), is_tiny=True), tmp_path)
    assert len(steps) == number
    for name, step in steps:
        if isinstance(step, Config):
            step.validate()
            assert step.run.directory == str(tmp_path / name) and (step.policy.path or name in ("base", "judge"))
        else:
            json.dumps(dict(step.settings))


def test_a_pretrained_policy_needs_its_files():
    parser = argparse.ArgumentParser(add_help=False)
    with pytest.raises(ConfigError, match="without texts"):
        common.parse_recipe(["--policy.path", "somewhere"], parser, ())
    with pytest.raises(ConfigError, match="no --cold-start"):
        common.need_file("", "--cold-start", "what it begins with")


PRETRAINED = ("--policy.path", "nowhere", "--data.path", "x.jsonl")


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        (kimi, ["--reward.terms", "exact"], "--reward.terms; .* do nothing"),
        (kimi, ["--loss.num_minibatches=1"], "--loss.num-minibatches; "),
        (kimi, ["--rollout.new-tokens-per-step", "3"], "--rollout.new-tokens-per-step; "),
        (r1, ["--supervised.path", "x"], "--supervised.path; "),
        (r1, ["--data.path", "x"], "--data.path; .* in tiny form .* set --policy.path"),
        (r1, [*PRETRAINED, "--supervised.num-steps", "3"], "--supervised.num-steps; .* of a pretrained policy"),
        (base_start, ["--cold-start", "x"], "--cold-start; .* in tiny form"),
        (base_start, [*PRETRAINED, "--formatted", "0.1"], "--formatted; .* of a pretrained policy"),
        (base_start, ["--formatted", "2"], "--formatted 2.0; it must be a share"),
        (base_start, ["--policy.path", "nowhere", "--questions.path", "q"], "questions have none"),
        (rpt_then_rl, ["--mixed", "x"], "--mixed; .* in tiny form"),
        (rpt_then_rl, [*PRETRAINED, "--questions.path", "q"], "--questions.path; "),
        (rpt_then_rl, [*PRETRAINED, "--questions", "q", "--mixed", "/nowhere"], "--mixed /nowhere matches no file"),
        (inverse_incentive, ["--cold-steps", "3"], "--cold-steps; .* in tiny form"),
        (ravr, ["--reward.terms", "exact"], "--reward.terms; "),
    ],
)
def test_flags_that_would_do_nothing_are_refused(module, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run_followed", lambda *_: pytest.fail("the recipe began"))
    with pytest.raises(ConfigError, match=message):
        module.main(argv)


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "some"])
def test_counts_are_whole_numbers_above_zero(word, capsys):
    with pytest.raises(SystemExit):
        ravr.main(["--rounds", word])
    assert "at least 1" in capsys.readouterr().err


def test_a_recipe_is_judged_after_every_step(corpus, tmp_path):  # noqa: F811
    """A warm start, its own samples, SFT on them and the mean of both policies, on the same held-out positions."""
    base = evaluated_at_the_ends(tiny_run(corpus, tmp_path))
    base = with_values(base, {"run.num_steps": 0, "run.control": False})
    wanted = {"run": str(tmp_path / "base"), "num_batches": 1, "per_prompt": 2, "min_reward": -1.0, "num_texts": 3}
    examples = str(tmp_path / "samples" / "examples.jsonl")
    mean = {"runs": [str(tmp_path / "sft"), str(tmp_path / "base")], "weights": [0.5, 0.5]}
    recipe = [
        ("base", base),
        # The policy's completions are all truncated; they are accepted by a copy of the rule without that.
        ("samples", Files(accept_all, wanted)),
        ("sft", common.supervised_step(base, examples, 2)),
        ("average", Files(common.average_policies, mean)),
    ]
    judge = Judge(
        config=base, split="all", title="A <recipe>", about="Four steps.",
        measures={"letters": lambda row: float(len(row["completion"]))},
    )  # fmt: skip
    run_recipe(recipe, tmp_path, after_each=judge)
    found = read_json(tmp_path / "results.json")
    assert [step["name"] for step in found] == ["base", "samples", "sft", "average"]
    assert [bool(step["figures"]) for step in found] == [True, False, True, True]
    assert found[0]["figures"]["letters"]["value"] > 0 and found[1]["flops"] > 0 and "kept" in found[1]["what"]
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;recipe&gt;" in page and page.count("class='position'") == 4 and "2 supervised updates" in page
    # Judged once: the same call later reads what it has.
    again = dataclasses.replace(judge, steps=[], first=None)
    before = (tmp_path / "sft" / "judged.json").stat().st_mtime_ns
    run_recipe(recipe, tmp_path, after_each=again)
    assert (tmp_path / "sft" / "judged.json").stat().st_mtime_ns == before


def accept_all(directory, **settings):
    with pytest.MonkeyPatch.context() as patch:
        rows = common.sample_accepted.__globals__["sample_rows"]

        def finished(*arguments, **keywords):
            found = rows(*arguments, **keywords)
            return dataclasses.replace(found, rows=[row | {"truncated": False} for row in found.rows])

        patch.setitem(common.sample_accepted.__globals__, "sample_rows", finished)
        common.write_accepted(directory, **settings)
