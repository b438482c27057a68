"""Companions of the policy: the average by hand, synchronisation, skipped updates, meshes, checkpoints."""

import dataclasses
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import CompanionConfig, MeshConfig, OptimizerConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.update import update
from rpt_jax.scoring.companions import AVERAGE, follow, with_companions
from rpt_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("few_programs")

SGD = make_optimizer(OptimizerConfig(learning_rate=0.1, max_grad_norm=0.0, weight_decay=0.0), 10)


def pull(params, target):
    """A loss whose gradient moves every parameter towards the target; a NaN target spoils it."""
    return sum(jnp.sum((p - target) ** 2) for p in jax.tree.leaves(params)), {}


def steps(state, config, targets):
    for target in targets:
        state, _ = update(state, [jnp.float32(target)], loss_fn=pull, optimizer=SGD)
        state = follow(state, config)
        yield state


def fresh(mesh):
    params = {"w": jnp.arange(4.0), "layers": {"q_proj": jnp.ones((2, 2, 2))}}
    return with_companions(init_state(params, SGD, mesh), {AVERAGE})


def test_the_average_by_hand(mesh):
    expected = np.arange(4.0)
    for state in steps(fresh(mesh), CompanionConfig(decay=0.75), (3.0, -1.0, 2.0)):
        expected = 0.75 * expected + 0.25 * np.asarray(state.params["w"])
        np.testing.assert_allclose(state.companions[AVERAGE]["w"], expected, rtol=1e-6)
    assert not np.allclose(expected, state.params["w"])


def test_a_skipped_update_leaves_it_as_it_is(mesh):
    (state,) = steps(fresh(mesh), CompanionConfig(decay=0.5), (3.0,))
    before = np.asarray(state.companions[AVERAGE]["w"])
    (state,) = steps(state, CompanionConfig(decay=0.5), (np.nan,))
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.companions[AVERAGE]["w"], before)


def test_it_may_be_synchronised_instead(mesh):
    """Every two updates it takes the parameters' own bits; between them it stays."""
    kept = np.arange(4.0)
    for number, state in enumerate(steps(fresh(mesh), CompanionConfig(every_steps=2), (1.0, 5.0, 2.0, 3.0)), start=1):
        if number % 2 == 0:
            kept = np.asarray(state.params["w"])
        np.testing.assert_array_equal(state.companions[AVERAGE]["w"], kept)


def test_it_is_sharded_like_the_parameters_and_survives_a_checkpoint(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, vocab_size=64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.init_params(config, mesh, jax.random.key(0))
    state = with_companions(init_state(params, SGD, mesh), {AVERAGE})
    second = deque(steps(state, CompanionConfig(decay=0.5), (0.5, 1.0)), maxlen=1).pop()
    for p, a in zip(*map(jax.tree.leaves, (second.params, second.companions[AVERAGE])), strict=True):
        assert p.sharding == a.sharding
    with Checkpoints(tmp_path / "rpt", keep=1) as checkpoints:
        checkpoints.save(2, second, {"step": 2})
    restored, _ = Checkpoints(tmp_path / "rpt", keep=1).restore(second)
    jax.tree.map(np.testing.assert_array_equal, restored, second)
    # Resumed, it continues as it would have.
    straight, resumed = (
        next(steps(s, CompanionConfig(decay=0.5), (2.0,))) for s in (jax.tree.map(jnp.copy, second), restored)
    )
    jax.tree.map(np.testing.assert_array_equal, straight.companions, resumed.companions)


def test_a_state_without_companions_is_left_alone(mesh):
    state = init_state({"w": jnp.ones(3)}, SGD, mesh)
    assert follow(state, CompanionConfig()) is state


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_decays_that_are_none(decay):
    from rpt_jax.config import Config
    from rpt_jax.errors import ConfigError

    with pytest.raises(ConfigError, match="companion.decay"):
        Config(companion=CompanionConfig(decay=decay)).validate()
