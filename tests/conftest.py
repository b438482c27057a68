"""Tests run on the CPU with eight virtual devices, in full precision, and without the compiler's optimisations."""

import os
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time of a test, and twice as long with optimisations. make trials sets the level to 3.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0",
    # The emitters of this version compile half as fast; later versions do not know the flag.
    "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
])  # fmt: skip

from pathlib import Path

import jax
import numpy as np
import pytest

from rpt_jax.config import DecoderConfig, MeshConfig
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.parallel.programs import drop_programs_if_many
from rpt_jax.rl import packing
from rpt_jax.rollout import engine
from rpt_jax.tokenizer import load_tokenizer, word_level

jax.config.update("jax_default_matmul_precision", "highest")
# Compiled programs are cached for the session, for all its processes.
_CACHE = os.environ.setdefault("RPT_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="rpt_jax_tests_"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# The files that take longest, which start first so that both processes end at the same time.
_FIRST = [
    "paths", "system", "objectives", "pipeline", "rl", "rollout", "distributed", "interruption", "continued_rows",
    "decode_kernel", "programs", "attention", "evals", "fitting", "composition", "scaling", "questions",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort the test files by `_FIRST`."""
    order = {f"test_{name}": number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Drop compiled programs after a test file if there are many; the cache on disk keeps them."""
    yield
    drop_programs_if_many()


@pytest.fixture(scope="module")
def few_programs():
    """Compile one shape of rollouts and one of updates, for tests of what runs leave behind.

    Schedules and packing change no token and no gradient: test_rollout.py and test_rl.py compare them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "chain_of_shapes", lambda *_: [])
        patch.setitem(packing.ROUNDINGS, "many", packing.Rounding(lanes=1, tokens=1, trunks=1))
        yield


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="session")
def tiny_config():
    return DecoderConfig(
        vocab_size=61, num_layers=3, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_size=8, qkv_bias=True
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config, mesh):
    """Parameters with logits of order one; those of an initial model are too flat to tell tokens apart."""
    params = init_params(tiny_config, mesh, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params) | {
        "head": 4 * params["head"]
    }


@pytest.fixture(scope="session")
def letters():
    """A closed vocabulary of single letters and the response marks."""
    return word_level(["<think>", "</think>", "\\boxed{", "}", *"abcdefghijklmnopqrstuvwxyz", " ", "."])


def shared_path(*parts: str) -> Path:
    """Return a file of the shared test data; skip the test if it is missing."""
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"test data {'/'.join(parts)} is not on this machine")
    return path


TOKENIZERS = ("qwen3", "gpt2", "minimind", "mistral_v1")


@pytest.fixture(scope="session")
def real_tokenizer(request):
    return load_tokenizer(shared_path("tokenizers", request.param))
