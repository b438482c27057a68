"""Two processes of four devices do what one process of eight does, and leave a checkpoint that it can read."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rpt_jax.config import Config, DistributedConfig, LossConfig, MeshConfig, RolloutConfig
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder
from rpt_jax.parallel import distributed
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import local_trunks, make_mesh, shard_batch
from rpt_jax.rewards.answer import Predictions
from rpt_jax.rewards.base import Reward
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.trainer import Trainer
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.recorder import to_floats
from rpt_jax.types import Earned
from tests.processes import ROOT, finish
from tests.test_rollout import make_tasks


def trunks_of(process: int) -> list[int]:
    """Of four trunks on a mesh of 2 x 2 x 2, four devices a process."""
    return [0, 1] if process == 0 else [2, 3]


def first_step():
    """One rollout and update on 2 x 2 x 2 devices, from tasks that each process makes its own part of."""
    config = decoder.DecoderConfig(
        vocab_size=64, num_layers=2, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_size=8
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rollout = RolloutConfig(num_trunks=4, prompts_per_trunk=2, group_size=4, max_completion_tokens=12, stop_ids=(1,))
    settings = Config(model=config, rollout=rollout, loss=LossConfig(), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    whole = make_tasks(config, U=4)
    mine = local_trunks(mesh, 4)
    tasks = shard_batch(mesh, jax.tree.map(lambda x: np.asarray(x)[mine], whole), num_trunks=4)

    def odd_tokens(evidence):
        shape = evidence.tasks.prompts.row_ids.shape
        rewards = (evidence.rollouts.tokens[..., 0] % 2).reshape(shape).astype(np.float32)
        return Earned(rewards=rewards, faults=rewards < 0, metrics={})

    def read(rollouts, width):
        shape = rollouts.mask.shape[:2]
        nothing = np.zeros(shape, np.int32)
        return Predictions(
            bytes=np.zeros((*shape, 1), np.uint8), lengths=nothing, found=nothing > 0, think_end_tokens=nothing
        ), None

    optimizer = make_optimizer(settings.optimizer, 10)
    trainer = Trainer(
        config=settings, mesh=mesh, tokenizer=SimpleNamespace(bos_id=None, vocab_size=61), header_length=0,
        reward=Reward(odd_tokens, read=read), optimizer=optimizer, columns=None,
    )  # fmt: skip
    state = init_state(decoder.init_params(config, mesh, jax.random.key(3)), optimizer, mesh)
    experience = trainer.roll_out(trainer.policies(state), 0, tasks, 0)
    state, [metrics] = trainer.learn(state, experience)
    return state, to_host(experience.rollouts.tokens), to_floats(metrics), mesh


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosts")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.host_for_tests", coordinator]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    logs = [directory / f"{number}.log" for number in (0, 1)]
    processes = []
    for number, log in enumerate(logs):
        with log.open("wb") as file:
            arguments = [*command, str(number), str(directory)]
            processes.append(subprocess.Popen(arguments, stdout=file, stderr=file, env=environment, cwd=ROOT))
    statuses = finish(processes, 240)
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return directory


def test_two_processes_sample_and_update_as_one(two_hosts):
    """Tokens equal; metrics and parameters within what sums in another order may change."""
    state, tokens, metrics, _ = first_step()
    found = np.load(two_hosts / "results.npz")
    np.testing.assert_array_equal(found["tokens"], tokens)
    assert set(metrics) <= set(found.files)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    checkpoints = Checkpoints(two_hosts / "checkpoints", keep=1)
    restored, record = checkpoints.restore(state)
    assert record == {"step": 1}
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_alone_nothing_is_waited_for():
    distributed.start(DistributedConfig())
    assert distributed.is_main() and distributed.from_main(3) == 3 and not distributed.any_process(False)
    assert distributed.gathered(np.arange(2)).tolist() == [[0, 1]]
    with distributed.main_first("nothing"):
        pass


@pytest.mark.skipif(os.cpu_count() < 2, reason="a device is a core, and there is one")
def test_a_cpu_is_as_many_devices_as_the_mesh_asks_for():
    code = """
from rpt_jax.config import DistributedConfig, MeshConfig
from rpt_jax.parallel.distributed import split_cpu
split_cpu(MeshConfig(data=10**6), DistributedConfig())  # more than there are cores
split_cpu(MeshConfig(data=2), DistributedConfig(coordinator="a:1", num_processes=2))
import jax
assert jax.config.jax_num_cpu_devices == -1
split_cpu(MeshConfig(data=2), DistributedConfig())
assert jax.device_count() == 2
split_cpu(MeshConfig(), DistributedConfig())
split_cpu(MeshConfig(data=2), DistributedConfig())  # the backend has started
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(ROOT)), "XLA_FLAGS": ""}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert ended.returncode == 0, ended.stderr


def test_processes_that_cannot_join_are_named():
    with pytest.raises(ConfigError, match="distributed.process_id=2 of distributed.num_processes=2"):
        Config(distributed=DistributedConfig(coordinator="a:1", num_processes=2, process_id=2)).validate()
    code = (
        "from rpt_jax.config import DistributedConfig as D; from rpt_jax.parallel.distributed import start\n"
        "start(D(join=True))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(ROOT))}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert "ConfigError: the processes of this run could not join" in ended.stderr
