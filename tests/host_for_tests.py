"""One of two hosts of four devices: python -m tests.host_for_tests COORDINATOR NUMBER DIRECTORY."""

import os
import sys
from pathlib import Path

# The last of the test's flags is its number of devices; the last one counts.
os.environ |= {"JAX_PLATFORMS": "cpu"}
os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"

import jax
import numpy as np

from rpt_jax.config import DistributedConfig
from rpt_jax.parallel import distributed
from rpt_jax.parallel.interruption import watching
from rpt_jax.parallel.mesh import local_trunks
from rpt_jax.train.checkpoint import Checkpoints
from tests.test_distributed import first_step, trunks_of


def main(coordinator: str, number: int, directory: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    distributed.start(DistributedConfig(coordinator=coordinator, num_processes=2, process_id=number))
    assert jax.process_count() == 2 and len(jax.devices()) == 8 and distributed.is_main() == (number == 0)
    with watching(120):
        assert distributed.any_process(number == 1) and not distributed.any_process(False)
        assert distributed.from_main(5 + number) == 5
        np.testing.assert_array_equal(distributed.gathered(np.array([number, 7])), [[0, 7], [1, 7]])
        order = directory / "order"
        with distributed.main_first("test"):
            assert order.exists() == (number == 1)
            order.touch()
        state, tokens, metrics, mesh = first_step()
        held = local_trunks(mesh, 4).tolist()
        assert sorted(held) == trunks_of(number)
        with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(1, state, {"step": 1})
        if distributed.is_main():
            np.savez(directory / "results.npz", tokens=tokens, **metrics)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
