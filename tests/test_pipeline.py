"""Recipes: runs in sequence, each from the final policy of the previous run; exact after any interruption."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_interruption import on_call, terminate
from test_system import corpus, evaluated_at_the_ends, run_hashes, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.config import LoraConfig, MeshConfig
from rpt_jax.errors import CheckpointError, ConfigError, DataError, Interrupted
from rpt_jax.models.hf import save_hf
from rpt_jax.models.lora import merge
from rpt_jax.parallel.interruption import watching
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl import trainer
from rpt_jax.train import pipeline
from rpt_jax.train.policies import start_params
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.run_directory import read_config
from rpt_jax.train.stages import supervised
from rpt_jax.train.stages.warm_start import warm_start

pytestmark = pytest.mark.usefixtures("few_programs")


def recipe(corpus):  # noqa: F811
    """A warm start and RL with adapters, then RL of all parameters from the resulting policy."""
    base = evaluated_at_the_ends(tiny_run(corpus, "set by the recipe"))
    base = dataclasses.replace(base, run=dataclasses.replace(base.run, control=False, num_steps=2))
    base = dataclasses.replace(base, eval=dataclasses.replace(base.eval, every_steps=2))
    second = dataclasses.replace(
        base,
        supervised=dataclasses.replace(base.supervised, num_steps=0),
        run=dataclasses.replace(base.run, num_steps=2, seed=5),
    )
    return (("first", dataclasses.replace(base, lora=LoraConfig(rank=2))), ("second", second))


def reopened(directory):
    config = read_config(Path(directory), say=False)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)))
    return prepare(config, read_only=True)


def hashes(directories):
    runs = [reopened(directory) for directory in directories]
    return [run_hashes(run, newest_state(run, warm_start(run))[0]) for run in runs]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):  # noqa: F811
    """Run the recipe without interruption; return the directories of its runs and their hashes."""
    directory, ran = tmp_path_factory.mktemp("recipe"), []
    directories = pipeline.run_recipe(recipe(corpus), directory, after_each=lambda path: ran.append(path.name))
    assert ran == ["first", "second"]
    return directories, hashes(directories)


def test_each_run_starts_from_the_one_before(straight):
    (first, second), _ = straight
    run = reopened(first)
    state, frozen, step = newest_state(run, warm_start(run))
    assert step == 2
    ended = merge(frozen, state.params)
    following = read_config(second, say=False)
    assert following.policy.path == str(first) and following.model == run.config.model
    jax.tree.map(np.testing.assert_array_equal, start_params(following, run.mesh), ended)
    # Its first evaluation, at step 0, is of that policy.
    records = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["stage"] == "evaluation"] == [0, 2]


def test_a_finished_recipe_is_not_run_again(corpus, straight):  # noqa: F811
    (first, _), before = straight
    ran, kept = [], [(path / "times.jsonl").read_text() for path in straight[0]]
    pipeline.run_recipe(recipe(corpus), first.parent, after_each=ran.append)
    assert ran == straight[0] and hashes(straight[0]) == before
    assert [(path / "times.jsonl").read_text() for path in straight[0]] == kept
    changed = [
        (n, dataclasses.replace(c, loss=dataclasses.replace(c.loss, clip_eps_low=0.1))) for n, c in recipe(corpus)
    ]
    with pytest.raises(CheckpointError, match="another config.*loss.clip_eps_low"):
        pipeline.run_recipe(changed, first.parent)


def test_a_policy_on_other_weights_than_it_was_made_with(straight, tmp_path):
    (_, second), _ = straight
    shutil.copytree(second, tmp_path / "second")
    kept = json.loads((second / "policy.json").read_text())
    (tmp_path / "second" / "policy.json").write_text(json.dumps(kept | {"checksum": "0-0"}))
    config = read_config(second, say=False)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, path=str(tmp_path / "second")))
    with pytest.raises(CheckpointError, match="whose weights have changed"):
        start_params(config, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("place", "name", "number"),
    [
        pytest.param(supervised, "update", 3, marks=pytest.mark.slow, id="in the first warm start"),
        pytest.param(trainer, "update", 2, marks=pytest.mark.slow, id="in the first RL"),
        pytest.param(trainer, "update", 4, id="in the second run"),
    ],
)
def test_an_interruption_anywhere_changes_nothing(corpus, straight, tmp_path, monkeypatch, place, name, number):  # noqa: F811
    on_call(monkeypatch, place, name, number, terminate)
    with watching(0), pytest.raises(Interrupted):
        pipeline.run_recipe(recipe(corpus), tmp_path)
    monkeypatch.undo()
    with watching(0):
        directories = pipeline.run_recipe(recipe(corpus), tmp_path)
    arrays = [(h[0], h[2]) for h in hashes(directories)]
    assert arrays == [(h[0], h[2]) for h in straight[1]]


def test_invalid_recipes_are_refused(corpus, straight, tmp_path, monkeypatch):  # noqa: F811
    (name, first), (_, second) = recipe(corpus)
    with pytest.raises(ConfigError, match="each needs a unique name"):
        pipeline.run_recipe(((name, first), (name, second)), tmp_path)
    elsewhere = dataclasses.replace(second, policy=dataclasses.replace(second.policy, path="somewhere"))
    with pytest.raises(ConfigError, match="must be a directory or an earlier step"):
        pipeline.run_recipe(((name, first), ("other", elsewhere)), tmp_path)

    # Before the first run; files that an earlier step may make are not looked for.
    def learns(path):
        return dataclasses.replace(second, supervised=dataclasses.replace(second.supervised, path=str(path)))

    monkeypatch.setattr(pipeline, "run_stages", lambda step: pytest.fail("a run began"))
    with pytest.raises(DataError, match="supervised.path='/nowhere.jsonl' matches no file"):
        pipeline.run_recipe(((name, first), ("other", learns("/nowhere.jsonl"))), tmp_path)
    with pytest.raises(pytest.fail.Exception, match="a run began"):
        pipeline.run_recipe(((name, first), ("other", learns(tmp_path / "made" / "x.jsonl"))), tmp_path)
    # A run without a policy yet.
    prepare(dataclasses.replace(first, run=dataclasses.replace(first.run, directory=str(tmp_path / "begun"))))
    (tmp_path / "begun" / "checkpoints").mkdir()
    begun = dataclasses.replace(second, policy=dataclasses.replace(second.policy, path=str(tmp_path / "begun")))
    with pytest.raises(CheckpointError, match="without a checkpoint of rpt"):
        start_params(begun, make_mesh(MeshConfig()))


def copy_weights(directory, *, run, scale):
    """A step that makes files: a model directory with the scaled weights of a run."""
    opened = reopened(run)
    params = jax.tree.map(lambda p: p * scale, start_params(from_run(opened.config, run), opened.mesh))
    save_hf(directory, opened.config.model, params, tokenizer=opened.tokenizer)


def from_run(config, path):
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, path=str(path)))


def test_steps_that_make_files(corpus, straight, tmp_path, monkeypatch):  # noqa: F811
    """They are made whole or not at all, once; runs may start from any earlier step."""
    (first, _), _ = straight
    (_, second) = recipe(corpus)[1]
    shutil.copytree(first, tmp_path / "first")
    moved = dataclasses.replace(recipe(corpus)[0][1])
    made = pipeline.Files(copy_weights, {"run": str(tmp_path / "first"), "scale": 0.5})
    last = from_run(dataclasses.replace(second, run=dataclasses.replace(second.run, num_steps=0)), tmp_path / "scaled")
    steps = (("first", moved), ("scaled", made), ("last", last))

    def fails(directory, **settings):
        (directory / "half").write_text("")
        raise Interrupted("here")

    ran = []
    with pytest.raises(Interrupted):
        pipeline.run_recipe((steps[0], ("scaled", pipeline.Files(fails, made.settings)), steps[2]), tmp_path)
    assert not (tmp_path / "scaled").exists()
    directories = pipeline.run_recipe(steps, tmp_path, after_each=lambda path: ran.append(path.name))
    assert ran == ["first", "scaled", "last"] and not (tmp_path / "scaled" / "half").exists()
    run = reopened(directories[2])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b * 0.5),
        run.start_params(),
        start_params(from_run(run.config, tmp_path / "first"), run.mesh),
    )
    # Again: nothing is made; other settings are refused.
    pipeline.run_recipe((steps[0], ("scaled", pipeline.Files(fails, made.settings)), steps[2]), tmp_path)
    other = pipeline.Files(copy_weights, {"run": str(tmp_path / "first"), "scale": 2.0})
    with pytest.raises(CheckpointError, match="'scale': 0.5.*'scale': 2.0"):
        pipeline.run_recipe((steps[0], ("scaled", other), steps[2]), tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="on 2 processes"):
        pipeline.run_recipe(steps, tmp_path)
