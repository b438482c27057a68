"""Scripts on a published checkpoint, as a user runs them: filter, train, export, fine-tune, evaluate, cold-start."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from experiments import convert_hf, evaluate, filter_positions, rejection_sample, train, zero_shot
from experiments.presets import METHODS
from rpt_jax.analysis.reports import REPORTS
from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.data import positions as positions_lib
from rpt_jax.errors import CheckpointError, ConfigError, DataError, RewardError
from rpt_jax.models import decoder
from rpt_jax.models.hf import load_hf, save_hf
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.tokenizer import load_tokenizer, train_byte_level

pytestmark = pytest.mark.usefixtures("few_programs")

SENTENCES = ("the cat sat on the mat. ", "one and one is two. ", "a dog ran to the house. ")
TINY = {
    "--run.num-steps": 2, "--run.completions-every-steps": 1, "--rollout.num-trunks": 4, "--rollout.group-size": 2,
    "--rollout.max-completion-tokens": 10, "--mesh.microbatch-trunks": 2, "--checkpoint.every-steps": 1,
    "--eval.every-steps": 2, "--eval.num-positions": 6, "--eval.final-num-positions": 6, "--eval.num-samples": 2,
    "--eval.batch-trunks": 4,
}  # fmt: skip
TINY = ["--run.no-tensorboard", *(str(word) for pair in TINY.items() for word in pair)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny Qwen3-shaped checkpoint and its tokenizer, a corpus, and questions."""
    root = tmp_path_factory.mktemp("home")
    tokenizer = train_byte_level(["".join(SENTENCES)] * 5, 320)
    config = DecoderConfig(
        family="qwen3", vocab_size=328, num_layers=2, width=32, mlp_width=48, num_heads=4, num_kv_heads=2,
        head_size=10, tie_embeddings=True, max_positions=512,
    )  # fmt: skip
    params = decoder.init_params(config, make_mesh(MeshConfig()), jax.random.key(0))
    # Sharper predictions than those of a new model, so that entropies differ.
    params = params | {"embedding": 3 * params["embedding"]}
    generation = {"eos_token_id": [tokenizer.eos_id, 5], "temperature": 0.6}
    save_hf(root / "policy", config, params, tokenizer=tokenizer, generation=generation)
    rng = np.random.default_rng(0)
    with (root / "corpus.jsonl").open("w") as file:
        for _ in range(40):
            text = "".join(SENTENCES[i] for i in rng.integers(0, 3, 6))
            file.write(json.dumps({"problem": text, "solution": "So it was."}) + "\n")
    questions = [{"question": f"What is {i} and {i}?", "answer": f"sum\n#### {2 * i}"} for i in range(20)]
    (root / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    choices = [
        {"question": f"Which is {i}?", "options": ["one", "two"], "answer": "AB"[i % 2], "category": "xy"[i % 2]}
        for i in range(8)
    ]
    (root / "choices.jsonl").write_text("".join(json.dumps(q) + "\n" for q in choices))
    return root


def text_flags(home, run, *extra):
    return [
        "--preset", "tiny_text", "--run.directory", str(run), "--data.path", str(home / "corpus.jsonl"),
        "--data.text-template", "{problem}\\n\\n{solution}", "--policy.path", str(home / "policy"),
        "--data.trunk-length", "48", "--data.window-stride", "24", "--positions.entropy-threshold", "0.2",
        "--supervised.num-steps", "2", "--supervised.batch-size", "4", "--rollout.prompts-per-trunk", "2",
        *TINY, *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(home):
    """Filter positions twice into a shared cache, then train a LoRA run; return its directory and both reports."""
    shared = ("--data.cache", str(home / "cache"), "--proxy.path", str(home / "policy"))
    filter_positions.main(text_flags(home, home / "filtered", *shared))
    first = json.loads((home / "filtered" / "positions.json").read_text())
    filter_positions.main(text_flags(home, home / "filtered", *shared))
    again = json.loads((home / "filtered" / "positions.json").read_text())
    add_scores, scored = positions_lib.add_scores, set()

    def recorded(table, documents, *args, **kwargs):
        scored.update(documents[int(number)].id for number in np.unique(table.document))
        return add_scores(table, documents, *args, **kwargs)

    positions_lib.add_scores = recorded
    try:
        train.main(text_flags(home, home / "run", *shared, "--lora.rank", "2", "--loss.kl-coef", "0.1"))
    finally:
        positions_lib.add_scores = add_scores
    # Training reads the cached scores of 36 documents and scores only the 4 held-out ones.
    assert 0 < len(scored) <= 4 and first["documents"] == 36
    return home / "run", first, again


def test_windows_leave_every_position_its_context(home, tmp_path):
    flags = text_flags(home, tmp_path / "run", "--data.window-stride", "48", "--positions.min-context-tokens", "8")
    with pytest.raises(ConfigError, match="as few as .* tokens of context in its window"):
        train.main([*flags, "--data.template", "minimal"])


def test_filtering_is_cached_and_drawn(home, trained):
    _, first, again = trained
    assert first["scored_now"] and not again["scored_now"]
    for name in ("documents", "tokens", "positions", "selected", "threshold_nats"):
        assert first[name] == again[name], name
    assert first["documents"] == 36 and 0 < first["selected"] < first["positions"] < first["tokens"]
    assert first["peak_memory_bytes"] > 1e8 and first["tokens_per_second"] > 0
    page = (home / "filtered" / "positions.html").read_text()
    assert page.count("class=kept") > 0 and "nats" in page
    assert (home / "filtered" / "positions.png").stat().st_size > 10_000


def test_lora_run_trains_adapters_and_exports(home, trained, tmp_path):
    run, *_ = trained
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["stage"] == "rpt"]
    assert len(steps) == 2 and steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (run / "report.html").exists()
    convert_hf.main(["--run", str(run), "--out", str(tmp_path / "out")])
    config, params = load_hf(tmp_path / "out")
    start_config, start = load_hf(home / "policy")
    assert config == start_config and "lora" not in json.dumps(jax.tree.map(lambda _: 0, params))
    # Adapted weights moved; all others equal the checkpoint's bit for bit.
    for name in ("embedding", "final_norm"):
        np.testing.assert_array_equal(params[name], start[name])
    for name in ("attention_norm", "q_norm"):
        np.testing.assert_array_equal(params["layers"][name], start["layers"][name])
    assert not np.array_equal(params["layers"]["q_proj"], start["layers"]["q_proj"])
    with pytest.raises(ConfigError, match="adapters sit on a warm-started policy"):
        convert_hf.main(["--run", str(run), "--out", str(tmp_path / "adapters"), "--adapters"])
    if importlib.util.find_spec("torch"):
        import torch
        from transformers import AutoModelForCausalLM

        ids = np.random.default_rng(0).integers(0, 320, (2, 30))
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(decoder.logits(config, params, jnp.asarray(ids)), expected, atol=1e-4)


def test_readers_leave_a_run_as_it_is(home, trained, tmp_path, capsys):
    """Evaluation and export, also on other meshes, change no byte of the run."""
    run, *_ = trained

    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(run.rglob("*")) if p.is_file()}

    before = state()
    evaluate.main(["--run", str(run), "--mesh.fsdp", "2", "--mesh.tensor", "2", "--eval.num-samples", "2"])
    assert "step 2" in capsys.readouterr().out
    for mesh in ("1", "2"):
        convert_hf.main(["--run", str(run), "--out", str(tmp_path / mesh), "--mesh.tensor", mesh])
    assert state() == before
    (_, one), (_, two) = (load_hf(tmp_path / mesh) for mesh in ("1", "2"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, two)
    with pytest.raises(CheckpointError, match="holds a run with another config .*loss.kl_coef: 0.1 -> 0.3"):
        evaluate.main(["--run", str(run), "--loss.kl-coef", "0.3"])
    with pytest.raises(ConfigError, match="unknown argument"):
        evaluate.main(["--run", str(run), "--mesh.fdsp", "2"])
    (run / "checkpoints" / "rpt").rename(tmp_path / "rpt")
    with pytest.raises(CheckpointError, match="no checkpoint of RPT yet"):
        evaluate.main(["--run", str(run)])
    (tmp_path / "rpt").rename(run / "checkpoints" / "rpt")


def test_cold_start_from_rollouts(home, trained, tmp_path, capsys):
    """Rollouts with any reward become a file for a warm start; a threshold that no rollout reaches is an error."""
    # Long enough that some rollouts end.
    longer = ("--rollout.max-completion-tokens", "60", "--rollout.temperature", "5")
    flags = text_flags(home, tmp_path / "sampled", "--supervised.num-steps", "0", *longer)
    out = tmp_path / "cold.jsonl"
    rejection_sample.main([*flags, "--out", str(out), "--batches", "4", "--min-reward", "0", "--per-prompt", "1"])
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = out.read_text().splitlines()
    assert counts["kept"] == len(lines) > 0
    assert counts["rollouts"] == sum(v for k, v in counts.items() if k != "rollouts")
    with pytest.raises(DataError, match="rollouts ended with a reward of at least 2.0"):
        rejection_sample.main([*flags, "--out", str(out), "--batches", "1", "--min-reward", "2"])
    with pytest.raises(ConfigError, match="--batches 0"):
        rejection_sample.main([*flags, "--out", str(out), "--batches", "0"])
    cold = (
        "--supervised.path",
        str(out),
        "--supervised.num-steps",
        "3",
        "--supervised.pack",
        "--run.no-control",
        *longer,
    )
    train.main(text_flags(home, tmp_path / "warm", *cold))
    assert (tmp_path / "warm" / "report.html").exists()


def test_a_run_keeps_its_policy(home, tmp_path):
    flags = text_flags(home, tmp_path / "run", "--supervised.num-steps", "0", "--run.no-control")
    config, params = load_hf(home / "policy")
    save_hf(tmp_path / "policy", config, params, tokenizer=load_tokenizer(home / "policy"))
    flags[flags.index("--policy.path") + 1] = str(tmp_path / "policy")
    train.main(flags)
    shutil.rmtree(tmp_path / "policy")
    params["final_norm"] = params["final_norm"].at[0].add(1e-6)
    save_hf(tmp_path / "policy", config, params, tokenizer=load_tokenizer(home / "policy"))
    with pytest.raises(CheckpointError, match="made with another policy"):
        train.main(flags)


def question_flags(home, run, *extra):
    return [
        "--preset", "questions", "--run.directory", str(run), "--questions.path", str(home / "questions.jsonl"),
        "--policy.path", str(home / "policy"), "--data.trunk-length", "160", *TINY, *extra,
    ]  # fmt: skip


def test_fine_tuning_on_questions(home, tmp_path, capsys):
    """A judge that rewards length: rewards are floats, and every rollout is kept with its true answer."""
    run = tmp_path / "run"
    custom = ("--reward.function", "tests/judges_for_tests.py:length")
    train.main(question_flags(home, run, *custom))
    rows = pyarrow.parquet.read_table(run / "completions" / "step_000001.parquet").to_pylist()
    assert len(rows) == 8
    tokenizer = load_tokenizer(run / "tokenizer")
    for row in rows:
        num_bytes = sum(len(tokenizer.token_bytes(i)) for i in row["completion_tokens"])
        assert row["reward"] == pytest.approx(num_bytes / 10 + (row["prediction"] is not None))
        assert "#" not in row["truth"] and "What is" in row["context"]
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["all"]["sampled"]["n"] == 2 and (run / "report.html").exists()
    # A reward of one's own is no share of right answers: the random policy has none, and earns by length.
    assert results["after"]["all"]["sampled"]["value"] == 0 < results["after"]["all"]["reward"]["value"]
    evaluate.main(["--run", str(run)])
    convert_hf.main(["--run", str(run), "--out", str(tmp_path / "out")])
    # Stop ids of the model's generation_config.json: kept with the run and its sources, said, and exported.
    ends = [tokenizer.eos_id, 5]
    assert json.loads((run / "config.json").read_text())["rollout"]["stop_ids"] == ends
    assert json.loads((run / "stop_ids.json").read_text())["5"] == ["generation_config.json"]
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == ends and exported["temperature"] == 0.6
    flags = ["--policy.path", str(tmp_path / "out"), "--data.trunk-length", "160", *TINY]
    zero_shot.main(["--questions.path", str(home / "choices.jsonl"), "--json", str(tmp_path / "f.json"), *flags])
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures) == ["all", "x", "y"] and {"direct", "sampled", "greedy", "pass@2", "majority@2"} <= set(
        figures["x"]
    )
    assert "direct" in capsys.readouterr().out
    # The report of a run with a built-in judge names that judge.
    config = json.loads((run / "config.json").read_text())
    config["reward"] |= {"terms": ["exact"], "function": ""}
    (run / "config.json").write_text(json.dumps(config))
    assert "graded by exact" in REPORTS["questions"](run).read_text()


@pytest.mark.parametrize("method", ["verifree", "rubric", "self_evaluation"])
def test_rewards_without_a_verifier_read_a_questions_answer(home, tmp_path, method):
    """All tokens of the answer behind the thought, or of a rubric or a judge's digit behind the text; in [0, 1]."""
    run = tmp_path / "run"
    flags = question_flags(home, run)
    if method in METHODS:
        train.main(["--preset", f"questions+{method}", *flags[2:]])
    else:
        train.main([*flags, "--reward.terms", method])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["stage"] == "rpt"]
    assert len(steps) == 2 and not any(r["skipped"] for r in steps)
    if method == "self_evaluation":
        assert all(0 < r["reward/self_evaluation/digit_probability"] < 1 for r in steps)
    # Nothing closes its thought in ten tokens of a random policy, so verifree pays nothing.
    assert all(0 <= r["reward"] <= 1 and (r["reward"] > 0 or method == "verifree") for r in steps)
    assert all(r["tokens_scored"] > 0 for r in steps)


def test_a_failing_judge_stops_the_run(home, tmp_path):
    custom = ("--reward.function", "tests.judges_for_tests:only_when_tried")
    with pytest.raises(RewardError, match="LookupError: no answer to this on task"):
        train.main(question_flags(home, tmp_path / "run", *custom))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward.terms", "prefix"], "reads a text's continuation"),
        (["--reward.terms", "custom"], "custom needs a function"),
        (["--reward.terms", "exact", "--reward.function", "a:b"], "no other reward takes one"),
        (["--rollout.prompts-per-trunk", "2"], "every question is a separate trunk"),
        (["--rollout.max-completion-tokens", "400"], "the model has 512"),
        (["--supervised.num-steps", "3"], "needs their solutions"),
        (["--lora.rank", "2", "--lora.targets", "head"], "tied to the embedding"),
        (["--lora.rank", "-1"], "lora.rank=-1"),
        (["--reward.num-workers", "0"], "reward.num_workers=0"),
        (["--data.chat"], "no chat template"),
        (["--model.activation-dtype", "bfloat16"], "Use float32 there"),
        (["--policy.param-dtype", "bfloat16"], "without adapters"),
        (["--reward.terms", "custom", "--reward.function", "no.module:f"], "cannot be used"),
    ],
)
def test_impossible_settings_are_refused_before_anything_compiles(home, tmp_path, flags, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train.main(question_flags(home, tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_tokenizers_do_not_pass(home, tmp_path):
    other = train_byte_level(["something else entirely"] * 5, 400)
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="model.vocab_size=328; the tokenizer has"):
        big = train_byte_level([f"number {i} and {i * i * 7919} " for i in range(2000)] * 2, 400)
        big.save(tmp_path / "big")
        train.main(text_flags(home, tmp_path / "a", "--data.tokenizer", str(tmp_path / "big")))
    with pytest.raises(ConfigError, match="is not the policy's; positions are token indices"):
        own = tmp_path / "proxy"
        config, params = load_hf(home / "policy")
        save_hf(own, config, params, tokenizer=other)
        train.main(text_flags(home, tmp_path / "b", "--proxy.path", str(own), "--supervised.num-steps", "0"))
    with pytest.raises(ConfigError, match="uses no proxy; scoring requires a selector"):
        filter_positions.main(text_flags(home, tmp_path / "c", "--positions.selector", "random"))
    with pytest.raises(ConfigError, match="needs questions"):
        train.main(text_flags(home, tmp_path / "d", "--reward.terms", "math"))
    with pytest.raises(ConfigError, match="Set --policy.path and --questions.path"):
        zero_shot.main(["--questions.path", str(home / "choices.jsonl")])
