"""Small whole runs: the corpus, every stage through its script, resuming, the report."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from test_config import as_format_1

import rpt_jax
from experiments import convert_hf, evaluate, quickstart
from experiments.presets import TINY_WORKED
from rpt_jax import session
from rpt_jax.analysis.reports.run import collect_results, write_report
from rpt_jax.config import LoraConfig, MeshConfig
from rpt_jax.data import synthetic
from rpt_jax.data.documents import Document
from rpt_jax.data.examples import document_examples, read_examples
from rpt_jax.data.templates import make_template
from rpt_jax.errors import CheckpointError, ConfigError, DataError
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.policies import fresh_state
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.run_directory import read_config
from rpt_jax.train.stages.supervised import make_batch
from rpt_jax.train.stages.warm_start import warm_start

pytestmark = pytest.mark.usefixtures("few_programs")

DIGITS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    synthetic.write_corpus(directory, seed=0, num_train=60, num_heldout=30, short_sequences=40, long_sequences=40)
    return directory


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_thoughts_and_results_are_right(corpus):
    """Recompute every thought from its text, and check that every label points at the result."""
    rng = random.Random(1)
    for _ in range(300):
        puzzle = synthetic.make_puzzle(rng, max_steps=4)
        first, *steps = puzzle.thought.strip(" ,").split(", ")
        value = int(first)
        for step in steps:
            op, operand, result = re.fullmatch(r"\w+([+*-]) (\d) (\d)", step).groups()
            value = DIGITS[op](value, int(operand)) % 10
            assert value == int(result)
        assert puzzle.text[puzzle.answer_offset :].startswith(f" {value}.") and len(steps) == len(puzzle.steps)
    for record in read(corpus / "heldout.jsonl"):
        ((offset, label),) = record["position_labels"]
        assert re.match(r" \d\.", record["text"][offset:]) and re.fullmatch(r"determined/[1-4]", label)


def test_corpus_is_reproducible_closed_and_disjoint(corpus, tmp_path):
    synthetic.write_corpus(tmp_path, seed=0, num_train=60, num_heldout=30, short_sequences=40, long_sequences=40)
    for name in ("train.jsonl", "heldout.jsonl", "warm_start.jsonl"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()
    tokenizer = synthetic.make_tokenizer()
    asked = {r["text"][: r["position_labels"][0][0]] for r in read(corpus / "heldout.jsonl")}
    for name in ("train.jsonl", "warm_start.jsonl"):
        for record in read(corpus / name):
            for text in (record["text"], record.get("completion", "")):
                assert tokenizer.decode(tokenizer.encode(text)) == text
            assert not any(record["text"].startswith(question) for question in asked)


def tiny_run(corpus, directory, **changes):
    """The quickstart's config, shrunk until a run takes seconds."""
    c = TINY_WORKED
    small = dataclasses.replace
    config = small(
        c,
        run=small(c.run, directory=str(directory), num_steps=4, completions_every_steps=2, tensorboard=False),
        data=small(
            c.data,
            path=str(corpus / "train.jsonl"),
            heldout_path=str(corpus / "heldout.jsonl"),
            tokenizer=str(corpus / "tokenizer"),
        ),
        positions=small(c.positions, entropy_threshold=0.5),
        model=small(c.model, num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=2, head_size=16),
        supervised=small(c.supervised, path=str(corpus / "warm_start.jsonl"), num_steps=4, batch_size=20),
        rollout=small(c.rollout, num_trunks=8, group_size=4, max_completion_tokens=30),
        mesh=MeshConfig(microbatch_trunks=4),
        checkpoint=small(c.checkpoint, every_steps=2),
        eval=small(c.eval, every_steps=1, num_positions=10, final_num_positions=12, num_samples=2, batch_trunks=16),
    )  # fmt: skip
    return small(config, **changes)


def evaluated_at_the_ends(config):
    """Evaluate at the first and last step only: each evaluation samples new lengths and compiles programs for them."""
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every_steps=4))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    config = tiny_run(corpus, tmp_path_factory.mktemp("runs") / "straight")
    session.run(config)
    return Path(config.run.directory)


def prefixes(pieces):
    return [pieces[: n + 1] for n in range(len(pieces))]


def test_a_run_leaves_everything_behind(finished):
    for name in (
        "config.json",
        "versions.json",
        "corpus.json",
        "results.json",
        "report.html",
        "plots/learning.png",
    ):
        assert (finished / name).stat().st_size > 0, name
    # A plot without a fit would be empty.
    scaling = json.loads((finished / "results.json").read_text())["scaling"]
    assert (finished / "plots" / "scaling.png").exists() == any("A" in fit for fit in scaling.values())
    records = read(finished / "metrics.jsonl")
    assert [r["step"] for r in records if r["stage"] == "rpt"] == [1, 2, 3, 4]
    assert [r["step"] for r in records if r["stage"] == "evaluation"] == [0, 1, 2, 3, 4]
    rows = pyarrow.parquet.read_table(finished / "completions" / "step_000003.parquet").to_pylist()
    assert len(rows) == 8 * 4
    for row in rows:
        # Tokens of this corpus are words: a correct prediction ends at the end of a word.
        ends = [len("".join(pieces)) for pieces in prefixes(synthetic._PIECES.findall(row["truth"]))]
        right = row["prediction"] is not None and row["truth"].startswith(row["prediction"])
        assert row["reward"] == float(right and len(row["prediction"]) in ends)
        assert "".join(row["completion_pieces"]) == row["completion"]
        assert len(row["logprobs"]) == len(row["completion_pieces"]) == row["tokens"] and max(row["logprobs"]) <= 0
    page = (finished / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and page.count("data:image/png") >= 4


def test_the_completions_of_an_evaluation_give_its_figures(finished):
    (figures,) = [r for r in read(finished / "metrics.jsonl") if r["stage"] == "evaluation" and r["step"] == 4]
    rows = pyarrow.parquet.read_table(finished / "completions" / "evaluation_000004.parquet").to_pylist()
    for split, metrics in figures["splits"].items():
        for style, samples in (("sampled", 2), ("greedy", 1)):
            own = [r for r in rows if split in r["splits"] and r["style"] == style]
            assert len(own) == samples * metrics["sampled_prefix"]["n"]
            assert np.mean([r["reward"] for r in own]) == pytest.approx(metrics[f"{style}_prefix"]["value"])
            assert np.mean([r["tokens"] for r in own]) == pytest.approx(metrics[f"{style}_thought_tokens"]["value"])
    # The page shows them all.
    page = (finished / "report.html").read_text()
    assert "logged completions" in page and page.count("id='completion-data'") == 1


def test_results_carry_n_and_errors(finished):
    results = json.loads((finished / "results.json").read_text())
    # The curve uses the same positions at every step; the tables use more.
    assert {c["all"]["sampled_prefix"]["n"] for c in results["curve"]} == {10}
    assert results["after"]["all"]["sampled_prefix"]["n"] == 12
    for figures in (results["before"], results["after"], results["control"]):
        for split, metrics in figures.items():
            for metric, f in metrics.items():
                assert set(f) == {"value", "standard_error", "n"} and f["n"] >= 1, (split, metric)
    assert {"all", "easy", "determined"} <= set(results["after"])
    assert results["flops"] == sorted(results["flops"]) and results["flops"][0] == 0
    # The control stops within one update of the same compute.
    control = results["control_flops"][-1]
    assert results["flops"][-1] <= control < 1.5 * results["flops"][-1]


def test_a_run_that_is_continued_takes_its_control_along(corpus, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "longer")
    config = tiny_run(corpus, tmp_path / "longer")
    session.run(dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=6)))
    before, after = (read(path / "metrics.jsonl") for path in (finished, tmp_path / "longer"))

    def of(records, stage):
        return [r for r in records if r["stage"] == stage]

    (control,) = [r for r in of(after, "control_evaluation") if r.get("final")]
    (earlier,) = [r for r in of(before, "control_evaluation") if r.get("final")]
    assert control["flops"] >= of(after, "rpt")[-1]["flops"] > earlier["flops"] and control["step"] > earlier["step"]
    steps = [r["step"] for r in of(after, "control")]
    assert steps == sorted(set(steps)) and steps[-1] == control["step"]


def test_compute_is_counted_in_tokens_actually_run(finished):
    """FLOPs of a step by hand from its logged token counts."""
    records = [r for r in read(finished / "metrics.jsonl") if r["stage"] == "rpt"]
    params = synthetic.make_tokenizer().vocab_size * 32 * 2 + 32 + 2 * (32 * 2 + 2 * 16 + 4 * 32 * 32 + 3 * 32 * 48)
    steps = np.diff([0.0] + [r["flops"] for r in records])
    for flops, r in zip(steps, records, strict=True):
        expected = 2 * params * (r["tokens_prefilled"] + r["tokens_sampled"]) + 6 * params * r["tokens_updated"]
        np.testing.assert_allclose(flops, expected)
        assert r["tokens_if_prompts_repeated"] > r["tokens_updated"]


def run_hashes(run, state):
    """Return a digest of the parameters and optimizer state, the logged metrics, and a digest of the completions."""
    arrays = hashlib.sha256()
    for leaf in jax.tree.leaves((state.step, state.params, state.opt_state)):
        arrays.update(np.asarray(leaf).tobytes())
    lines = [r for r in read(run.directory.path / "metrics.jsonl") if r["stage"] in ("rpt", "evaluation")]
    tokens = hashlib.sha256()
    for path in sorted((run.directory.path / "completions").glob("*.parquet")):
        tokens.update(repr(pyarrow.parquet.read_table(path).to_pydict()).encode())
    return arrays.hexdigest(), json.dumps(lines, sort_keys=True), tokens.hexdigest()


def rpt_only(config, stop_at_step=None):
    """Run all stages but the control, up to `stop_at_step` if given; return the run and its last state."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, control=False))
    run = run_stages(config, stop_at_step=stop_at_step)
    return run, newest_state(run, warm_start(run))[0]


@pytest.mark.parametrize("dynamic_from", [-1, 1])
def test_stopping_anywhere_and_resuming_equals_an_uninterrupted_run(corpus, tmp_path, dynamic_from):
    """Compare parameters, optimizer, completions and metrics; with dynamic sampling the data cursor runs ahead."""

    def config(name):
        base = evaluated_at_the_ends(tiny_run(corpus, tmp_path / name))
        return dataclasses.replace(
            base, rollout=dataclasses.replace(base.rollout, dynamic_sampling_from_step=dynamic_from)
        )

    straight = run_hashes(*rpt_only(config("straight")))
    for k in (1, 3):
        rpt_only(config(f"stopped{k}"), stop_at_step=k)
        assert run_hashes(*rpt_only(config(f"stopped{k}"))) == straight


@pytest.mark.slow
def test_adapters_bands_and_mixtures_resume_exactly(corpus, tmp_path):
    """The state has adapters only; the checkpoint restores pass rates and the mixture's cursor."""

    def config(name):
        base = evaluated_at_the_ends(tiny_run(corpus, tmp_path / name, lora=LoraConfig(rank=2)))
        parts = (f"3={corpus / 'train.jsonl'}", f"1={corpus / 'heldout.jsonl'}")
        return dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, path="", mixture=parts),
            positions=dataclasses.replace(base.positions, selector="pass_rate_band", pass_rate_band=(0.1, 0.9)),
        )

    run, state = rpt_only(config("straight"))
    assert set(state.params) == {"layers"} and all("_lora_" in name for name in state.params["layers"])
    rpt_only(config("stopped"), stop_at_step=2)
    assert run_hashes(*rpt_only(config("stopped"))) == run_hashes(run, state)


def test_a_run_directory_keeps_its_config(corpus, finished):
    config = tiny_run(corpus, finished)
    changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=0.5))
    with pytest.raises(CheckpointError, match=r"rollout.temperature: 1.0 -> 0.5"):
        prepare(changed)
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=6))
    prepare(longer)
    prepare(config)


def test_a_run_of_the_first_format_opens_and_reports_moved_settings(corpus, finished, tmp_path, capsys):
    """Settings are read from their former names; values resolved at the first start are reused."""
    shutil.copytree(finished, tmp_path / "old")
    kept = read_config(finished, say=False)
    (tmp_path / "old" / "config.json").write_text(json.dumps(as_format_1(kept)))
    run = prepare(tiny_run(corpus, tmp_path / "old"))
    said = " ".join(capsys.readouterr().err.split())  # the console breaks lines
    assert "made by an earlier version" in said and "loss.microbatch_trunks is mesh.microbatch_trunks=4" in said
    assert run.config.rollout.stop_ids == (run.tokenizer.eos_id,) == kept.rollout.stop_ids
    assert read_config(tmp_path / "old", say=False) == run.config
    # The data cursor of a checkpoint of that format is restored under the key that the loop reads.
    with Checkpoints(tmp_path / "stage", keep=3) as checkpoints:
        state, _ = fresh_state(run.config, run.mesh, run.start_params(), "rpt")
        for step, old in ((1, {"tasks": {"next": 3, "passed_over": 0}}), (2, {"position": 7})):
            checkpoints.save(step, state, {"step": step, "flops": 1.0} | old)
            _, record = checkpoints.restore(state)
            assert record == {"step": step, "flops": 1.0, "cursor": old.get("tasks", {"position": 7})}


def test_resolved_values_are_kept_with_the_run(corpus, finished, tmp_path):
    """Stop ids given at the first start apply to every resume; others are refused."""
    config = tiny_run(corpus, tmp_path / "run")
    given = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, stop_ids=(0, 3)))
    prepare(given)
    # What a later preset leaves to the machine is that of the first start as well.
    left_open = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, activation_dtype=""),
        mesh=dataclasses.replace(config.mesh, microbatch_trunks=-1),
        rollout=dataclasses.replace(config.rollout, slots_per_trunk=-1),
    )
    for again in (config, left_open):
        resolved = prepare(again).config
        assert resolved.rollout.stop_ids == (0, 3) and resolved.model.activation_dtype == "float32"
        assert resolved.mesh.microbatch_trunks == config.mesh.microbatch_trunks > 2
        assert resolved.rollout.slots_per_trunk == config.rollout.slots_per_trunk
    other = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, stop_ids=(3,)))
    with pytest.raises(CheckpointError, match=r"rollout.stop_ids: \(0, 3\) -> \(3,\)"):
        prepare(other)
    beyond = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, stop_ids=(10**6,)))
    with pytest.raises(ConfigError, match="they must be ids of the tokenizer"):
        prepare(beyond)


def tree_of(directory):
    return {str(p): p.stat().st_mtime_ns for p in directory.rglob("*")}


def test_a_run_lives_on_without_its_corpus(tmp_path, capsys):
    """Corpus, examples, tokenizer, prompt are gone: reading, exporting and judging work, and do not touch the run."""
    synthetic.write_corpus(tmp_path / "c", seed=3, num_train=40, num_heldout=20, short_sequences=20, long_sequences=20)
    other = tmp_path / "other.jsonl"
    shutil.copy(tmp_path / "c" / "heldout.jsonl", other)
    config = evaluated_at_the_ends(tiny_run(tmp_path / "c", tmp_path / "run"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=2, control=False))
    (tmp_path / "c" / "prompt.txt").write_text("{context}<think>\n")
    prompt = str(tmp_path / "c" / "prompt.txt")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=prompt))
    session.run(dataclasses.replace(config, eval=dataclasses.replace(config.eval, every_steps=2)))
    shutil.move(tmp_path / "c", tmp_path / "away")
    run, before = str(tmp_path / "run"), tree_of(tmp_path / "run")
    capsys.readouterr()
    evaluate.main(["--run", run])
    first = capsys.readouterr().out
    assert first.startswith("step 2:") and "\nall " in first
    evaluate.main(["--run", run, "--eval.max-documents", "5", "--rollout.temperature", "0.5"])
    assert "\nall " in capsys.readouterr().out
    evaluate.main(["--run", run, "--data.heldout-path", str(other)])
    # The same documents, from another file: the same figures.
    assert capsys.readouterr().out == first
    assert tree_of(tmp_path / "run") == before
    convert_hf.main(["--run", run, "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 RL steps of 8 trunks x 1 prompts x\n  4 rollouts" in card and "(40 documents" in card
    assert (
        "On all held-out positions (n=12), thinking is right in" in card
        and "Prompts are those of the template `'{context}<think>'`" in card
    )
    assert "{" not in card.replace("boxed{}", "").replace("{context}", "")
    assert rpt_jax.load(run).next_token("It rained", 1) == rpt_jax.load(tmp_path / "out").next_token("It rained", 1)
    write_report(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another config.*model.num_layers"):
        evaluate.main(["--run", run, "--model.num-layers", "3"])


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(CheckpointError, match="0 evaluation"):
        collect_results(tmp_path)


def test_warm_start_lines_that_do_not_fit_are_named(corpus, tmp_path):
    config = tiny_run(corpus, tmp_path / "run")
    tokenizer = synthetic.make_tokenizer()
    template = make_template(tokenizer, config.data)
    path = tmp_path / "warm.jsonl"
    for line, message in (
        ('{"text": "' + " Ana" * 200 + '"}', "line 1: the text takes"),
        ('{"text": " Ana", "completion": "' + " 1" * 40 + '"}', "line 1: the completion takes 41"),
        ('{"completion": " 1"}', "needs a string 'text'"),
        ("", "contains no sequence"),
    ):
        path.write_text(line)
        with pytest.raises(DataError, match=message):
            read_examples(str(path), tokenizer, template, config)


def test_supervised_batches_by_hand(corpus, tmp_path):
    config = tiny_run(corpus, tmp_path / "run")
    tokenizer = synthetic.make_tokenizer()
    template = make_template(tokenizer, config.data)
    path = tmp_path / "warm.jsonl"
    path.write_text('{"text": " Ana 1", "completion": " 2"}\n{"text": " Ben 3 4", "text_weight": 0.5}\n')
    batch = make_batch(read_examples(str(path), tokenizer, template, config), config, template.tail)
    # Weights: 0.2 on one predicted context token, 1 on the completion's digit and stop token, 0.5 on two plain tokens.
    total = 0.2 * 1 + 2 * 1 + 0.5 * 2
    np.testing.assert_allclose(
        batch.trunk_weights[:, :4], np.array([[0, 0.2, 0, 0], [0, 0.5, 0.5, 0]]) / total, rtol=1e-6
    )
    np.testing.assert_allclose(batch.likelihood_weights.sum((1, 2)), [2 / total, 0], rtol=1e-6)
    assert batch.sequences.cuts.tolist() == [[2], [1]]
    own = batch.sequences.branch_tokens[0, 0][batch.sequences.branch_mask[0, 0]]
    assert batch.sequences.tail_tokens[0, 0].tolist() == tokenizer.encode("<think>")
    assert own.tolist() == [*tokenizer.encode(" 2"), tokenizer.eos_id]


@pytest.mark.parametrize("length", [2, 10, 19, 20, 21, 23])
def test_long_documents_become_windows_that_predict_every_token_once(length):
    tokens = np.arange(2, 2 + length, dtype=np.int32)
    sequences = document_examples([Document(id="d", tokens=tokens)], synthetic.make_tokenizer(), 10)
    assert [t for s in sequences for t in s.trunk[s.first :]] == tokens[1:].tolist()
    assert all(len(s.trunk) <= 10 for s in sequences)


def test_a_run_directory_keeps_its_corpus(corpus, finished, tmp_path):
    config = tiny_run(corpus, finished)
    lines = (corpus / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:-1]))
    original = json.loads((finished / "config.json").read_text())
    original["data"]["path"] = str(tmp_path / "train.jsonl")
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    (moved / "config.json").write_text(json.dumps(original))
    data = dataclasses.replace(config.data, path=str(tmp_path / "train.jsonl"))
    run = dataclasses.replace(config.run, directory=str(moved))
    with pytest.raises(CheckpointError, match="made from other data"):
        prepare(dataclasses.replace(config, data=data, run=run))


def test_quickstart_dry_run_prints_the_run(capsys, tmp_path):
    quickstart.main(["--dry-run", "--run.directory", str(tmp_path / "q")])
    out = capsys.readouterr().out
    assert "384 rollouts" in out and '"num_steps"' in out and not (tmp_path / "q").exists()
