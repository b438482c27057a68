"""Recipes and studies: corpora by hand, the model file in parts, and small whole studies."""

import dataclasses
import functools
import json

import pytest
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

from experiments import fetch_smollm2
from experiments.presets import PRESETS
from experiments.recipes import smollm2_rpt
from experiments.recipes.corpora import gsm8k_document, write_gsm8k, write_python_docs
from experiments.studies import does_the_thought_matter, is_it_the_reward, objectives, without_a_verifier
from rpt_jax.config.schema import with_values
from rpt_jax.data.readers import read_texts
from rpt_jax.errors import CheckpointError, ConfigError, DataError
from rpt_jax.train import pipeline
from rpt_jax.train.run_directory import read_records, read_seconds

pytestmark = pytest.mark.usefixtures("few_programs")


def labelled(document):
    """The text from each labelled byte on, up to the next space or line end."""
    text = document["text"].encode()
    return [(text[at:].split()[0].decode(), name) for at, name in document["position_labels"]]


def test_gsm8k_results_are_labelled_where_the_text_repeats_them():
    document = gsm8k_document(
        "How many é?",
        "She sold 48/2 = <<48/2=24>>24 clips.\nThat is $<<24*50=1200>>1,200 or 1200*.5=<<1200*.5=600>>600.\n"
        "Then 0.2 x 50 = $<<0.2*50=10>>10.\nAlso <<2+2=4>>4.50\n#### 72",
    )
    assert document["text"] == (
        "How many é?\n\nShe sold 48/2 = 24 clips.\nThat is $1,200 or 1200*.5=600.\nThen 0.2 x 50 = $10.\nAlso 4.50\n"
        "#### 72"
    )
    computed = "determined/computed"
    assert labelled(document) == [("24", computed), ("600.", computed), ("10.", computed), ("72", "determined/copied")]


def test_corpora_are_read_back(tmp_path):
    source, out = tmp_path / "train.jsonl", tmp_path / "gsm8k.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    write_gsm8k(source, out)
    (text,) = read_texts(str(out), text_template="{text}")
    assert text.text == "1 + 1?\n\n1+1=2\n#### 2" and [name for _, name in text.labels] == [
        "determined/computed", "determined/copied",
    ]  # fmt: skip
    source.write_text(json.dumps({"problem": "1 + 1?"}) + "\n")
    with pytest.raises(DataError, match="line 1 has fields.*question and answer"):
        write_gsm8k(source, out)
    write_python_docs(tmp_path / "docs.jsonl")
    texts = list(read_texts(str(tmp_path / "docs.jsonl"), text_template="{text}"))
    assert len(texts) > 50 and sum(len(t.text) for t in texts) > 300_000


def test_the_model_file_travels_in_two_parts(tmp_path):
    whole = tmp_path / "whole"
    whole.write_bytes(bytes(range(251)))
    fetch_smollm2.split(whole, tmp_path / "parts")
    first, second, _ = sorted((tmp_path / "parts").iterdir())
    assert {first.stat().st_size, second.stat().st_size} == {126, 125}
    assert fetch_smollm2.join(tmp_path / "parts").read_bytes() == whole.read_bytes()
    second.write_bytes(second.read_bytes()[::-1])
    with pytest.raises(DataError, match="sha256.*must be"):
        fetch_smollm2.join(tmp_path / "parts")
    first.unlink()
    with pytest.raises(DataError, match=r"lacks SmolLM2.*\.0;"):
        fetch_smollm2.join(tmp_path / "parts")
    with pytest.raises(DataError, match="one of --out and --split"):
        fetch_smollm2.main([])


def test_the_recipe_is_a_cold_start_and_a_run_from_it():
    preset = PRESETS["smollm2"]
    (first, start), (second, rpt) = smollm2_rpt.stages(preset)
    assert (first, start.run.num_steps, start.policy.path) == ("cold_start", 0, "runs/smollm2")
    assert (second, rpt.run.num_steps, rpt.supervised.num_steps) == ("rpt", preset.run.num_steps, 0)
    assert start.data.cache == rpt.data.cache and start.rollout == rpt.rollout
    start.validate(), rpt.validate()


@pytest.fixture(scope="module")
def arms(corpus, tmp_path_factory):  # noqa: F811
    """Run three arms of a small study with one seed; return its directory and figures."""
    directory = tmp_path_factory.mktemp("study")
    base = evaluated_at_the_ends(tiny_run(corpus, directory))
    config = dataclasses.replace(base, run=dataclasses.replace(base.run, num_steps=2))
    found = {}
    begun = is_it_the_reward.shared_start(config, directory)
    # This policy is right too rarely: accept any rollout.
    any_rollout = functools.partial(is_it_the_reward.sample_accepted, min_reward=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(is_it_the_reward, "sample_accepted", any_rollout)
        for arm in ("prefix", "random", "rejection", "mixed"):
            found[arm] = is_it_the_reward.run_arm(begun, directory, arm, found)
    return directory, found


def test_arms_share_a_start_and_spend_equal_compute(arms, capsys):
    directory, found = arms
    assert not [r for r in read_records(directory / "cold_start") if r["stage"] != "warm_start"]
    for split, cells in found["prefix"]["before"].items():
        for metric in cells.keys() & found["random"]["before"][split].keys():
            assert cells[metric] == found["random"]["before"][split][metric]
    # A supervised arm ends with the update that reaches the FLOPs of prefix.
    limit = found["prefix"]["flops"][-1]
    for arm in ("rejection", "mixed"):
        per_update = found[arm]["flops"][-1] / max(1, found[arm]["updates"])
        assert limit <= found[arm]["flops"][-1] <= limit + 2 * per_update
    seconds = read_seconds(directory / "prefix", "rpt")
    assert len(seconds) == 2 and min(seconds) > 0
    assert found["prefix"]["seconds"] == [0, pytest.approx(sum(seconds))]
    rows = is_it_the_reward.table({"0": found}, ["all"]).splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["start", "prefix", "random", "rejection", "mixed"]
    is_it_the_reward.plot({"0": found}, ["all", "hard"]).savefig(directory / "arms.png")


def test_a_supervised_arm_needs_the_compute_of_prefix(arms, corpus):  # noqa: F811
    directory, _ = arms
    with pytest.raises(ConfigError, match="arm mixed spends the FLOPs of arm prefix"):
        is_it_the_reward.run_arm(tiny_run(corpus, directory), directory, "mixed", {})


def test_a_run_that_has_begun_rl_is_not_finished_by_asking_for_no_steps(arms, corpus):  # noqa: F811
    directory, _ = arms
    base = evaluated_at_the_ends(tiny_run(corpus, directory / "prefix"))
    begun = is_it_the_reward.shared_start(base, directory)
    none = dataclasses.replace(
        begun, run=dataclasses.replace(base.run, directory=str(directory / "prefix"), num_steps=0, control=False)
    )
    before = (directory / "prefix" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="has done 2 steps"):
        pipeline.run_stages(none)
    assert (directory / "prefix" / "config.json").read_bytes() == before
    assert (directory / "prefix" / "finished.json").exists()


def test_the_study_of_thoughts_keeps_what_it_has(arms, tmp_path, capsys):
    directory, _ = arms
    out = tmp_path / "thought.json"
    command = ["--runs", str(directory / "prefix"), "--out", str(out), "--splits", "all"]
    does_the_thought_matter.main(command)
    first = capsys.readouterr().out
    assert first.count("| all (12) | before RPT |") == first.count("| all (12) | after RPT |") == 5
    assert out.with_suffix(".png").stat().st_size > 0
    written = out.stat().st_mtime_ns
    does_the_thought_matter.main(command)
    assert out.stat().st_mtime_ns == written and capsys.readouterr().out == first


def test_the_study_without_a_verifier_reads_its_arms(tmp_path):
    """Accuracy .5, .7, .9 at 0, 10, 30 FLOPs: .8 is reached half-way between 10 and 30."""

    def figures(value):
        return {"value": value, "standard_error": 0.01, "n": 100}

    def of(values):
        curve = [
            {"all": {metric: figures(v) for _, metric in without_a_verifier.COLUMNS}} for v in values
        ]  # fmt: skip
        return {"flops": [0.0, 10.0, 30.0], "curve": curve, "before": curve[0], "after": curve[-1]}

    assert without_a_verifier.flops_to(0.8, of([0.5, 0.7, 0.9]), "all") == pytest.approx(20)
    assert without_a_verifier.flops_to(0.8, of([0.5, 0.6, 0.7]), "all") is None
    found = {"0": {"prefix": of([0.5, 0.7, 0.9]), "ttrl": of([0.5, 0.6, 0.7])}}
    rows = without_a_verifier.table(found, "all").splitlines()
    assert [row.split()[1] for row in rows if row[1] == " "] == ["all", "start", "prefix", "ttrl"]
    assert rows[3].endswith("| 20 |") and rows[4].endswith("| – |")
    without_a_verifier.plot(found, ["all"]).savefig(tmp_path / "arms.png")
    # Its arms are settings that exist, with the methods' losses.
    for changes in (*without_a_verifier.ARMS.values(), *objectives.ARMS.values()):
        with_values(PRESETS["tiny_worked"], changes).validate()


def test_the_table_of_objectives_names_every_arm_that_ran():
    cells = {"sampled_prefix": {"value": 0.5, "standard_error": 0.01, "n": 100}}
    arm = {"after": {"all": cells, "hard determined": cells}, "flops": [0.0, 2e12]}
    arm |= {
        "clip_fraction": 0.125,
        "grad_norm": 0.5,
        "entropy": 1.0,
        "kl": 0.25,
        "reward": [0.2] * 15 + [0.4] * 15 + [1],
    }
    rows = objectives.table({"0": {"ppo": arm, "gae": arm}, "1": {"ppo": arm}}).splitlines()
    assert [row.split()[1] for row in rows[2:]] == ["ppo", "gae"]
    assert rows[2] == (
        "| ppo | 0.500 / 0.500 ±0.010 | 0.500 / 0.500 ±0.010 | 0.300 / 0.300 | 0.125 / 0.125 | 0.500 / 0.500 | "
        "1.000 / 1.000 | 0.250 / 0.250 | 2e+12 / 2e+12 |"
    )
