"""Programs of a step compile for an H100, on a machine without a GPU. Skipped without the compiler."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from rpt_jax.config import Config, DataConfig, DecoderConfig, MeshConfig, RolloutConfig
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning import programs
from rpt_jax.planning.topologies import describe_topology

pytest.importorskip("jax_plugins.xla_cuda13", reason="no compiler for GPUs: pip install -e '.[gpu-aot]'")
pytestmark = pytest.mark.skipif(not shutil.which("ptxas"), reason="ptxas, of the CUDA toolkit, is not on the PATH")

U, M, G, L, E, C = 2, 4, 4, 192, 8, 128
CONFIG = Config(
    data=DataConfig(trunk_length=L),
    model=DecoderConfig(
        vocab_size=2048, width=256, mlp_width=512, num_heads=12, num_kv_heads=2, head_size=64,
        qkv_bias=True, qk_norm=False, activation_dtype="bfloat16", platform="gpu",
    ),
    rollout=RolloutConfig(num_trunks=U, prompts_per_trunk=M, group_size=G, max_completion_tokens=C),
    mesh=MeshConfig(microbatch_trunks=1),
)  # fmt: skip


def compiled(num_layers: int, monkeypatch, topology: str = "h100:1") -> tuple[dict, dict]:
    """Return {name: program} and {name: its text} of a policy with this many layers."""
    texts, read = [], programs.read_kernels
    monkeypatch.setattr(programs, "read_kernels", lambda text, **trips: texts.append(text) or read(text, **trips))
    devices = describe_topology(topology)[1]
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_layers=num_layers),
        mesh=MeshConfig(fsdp=len(devices), microbatch_trunks=len(devices)),
    )
    jax.config.update("jax_enable_compilation_cache", False)  # such programs cannot be read back without a GPU
    try:
        found = {p.name: p for p in programs.compile_programs(config, make_mesh(config.mesh, devices), E)}
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        monkeypatch.undo()
    return found, dict(zip(found, texts, strict=True))


def test_a_token_takes_few_kernels_and_copies_no_cache(monkeypatch):
    found = {layers: compiled(layers, monkeypatch) for layers in (2, 3)}
    counts = {layers: of_layers["decode"].token_kernels for layers, (of_layers, _) in found.items()}
    for layers, (_, texts) in found.items():
        assert texts["decode"].count('custom_call_target="__gpu$xla.gpu.triton"') == 2 * layers
        assert counts[layers].largest_copy < 2**20
    assert counts[3].count - counts[2].count <= 14
    # A layer writes at most 16 splits of the stem's partial sums and the output, in 16 bits, and numbers of each query.
    rows, heads, head_size = U * M * G, CONFIG.model.num_heads, CONFIG.model.head_size
    assert 0 < counts[3].by_attention - counts[2].by_attention < 16 * rows * heads * head_size * 4


def test_the_update_takes_the_fused_kernels_and_keeps_no_scores(monkeypatch):
    text = compiled(2, monkeypatch)[1]["gradients"]
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward", "fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        assert f'__cudnn${name}"' in text
    # The scores of all heads would have 12 times the elements of the bias.
    bias = M * G * C * (L + M * E)
    largest = max(np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text))
    assert bias <= largest < 12 * bias


def test_two_gpus_gather_weights_and_reduce_gradients(monkeypatch):
    found, _ = compiled(2, monkeypatch, "a100:2")
    assert {t.axes for p in found.values() for t in p.traffic} == {"fsdp"}
    kinds = {name: {t.kind for t in p.traffic} for name, p in found.items()}
    assert "all-gather" in kinds["gather weights"] and kinds["gradients"] & {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("topology", ["h100:0", "h100:16", "h100:2x2", "b300:1"])
def test_an_unknown_host_is_refused(topology):
    with pytest.raises(ConfigError, match=f"--topology {topology}"):
        describe_topology(topology)
