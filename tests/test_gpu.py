"""Programs of a step compile for an H100, on a machine without a GPU. Skipped without the compiler."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from rpt_jax.config import Config, DataConfig, DecoderConfig, MeshConfig, RolloutConfig
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning import programs
from rpt_jax.planning.traffic import _arrays, _computations

pytest.importorskip("jax_plugins.xla_cuda13", reason="no compiler for GPUs: pip install -e '.[gpu-aot]'")
pytestmark = pytest.mark.skipif(not shutil.which("ptxas"), reason="ptxas, of the CUDA toolkit, is not on the PATH")

TARGET = (Path(__file__).parent / "golden" / "h100.txtpb").read_text()
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
# Operations of a compiled program that are no kernel.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def compiled(num_layers: int, monkeypatch) -> dict[str, str]:
    """Return {program: text} of a policy with this many layers."""
    texts = []
    jax.config.update("jax_enable_compilation_cache", False)  # such programs cannot be read back without a GPU
    monkeypatch.setattr(programs, "read_traffic", lambda text, *_, **__: texts.append(text) or [])
    device = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET).devices
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=num_layers))
    try:
        names = [p.name for p in programs.compile_programs(config, make_mesh(config.mesh, device), E)]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    return dict(zip(names, texts, strict=True))


_TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'


def kernels_of_a_token(text: str):
    """Yield (kind, bytes of the results) of each kernel of the decode loop."""
    (lines,) = (lines for lines in _computations(text)[0].values() if any(_TRITON in line for line in lines))
    for line in lines:
        found = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ([\w\-]+)\(", line)
        if found and found[2] not in _FREE:
            yield found[2], sum(_arrays(found[1]))


def test_a_token_takes_few_kernels_and_copies_no_cache(monkeypatch):
    counts = {}
    for layers in (2, 3):
        text = compiled(layers, monkeypatch)["decode"]
        assert text.count(_TRITON) == 2 * layers
        body = list(kernels_of_a_token(text))
        counts[layers] = len(body)
        cache = U * M * G * 2 * C * 64 * 2
        assert not [size for kind, size in body if kind == "copy" and size >= cache]
    assert counts[3] - counts[2] <= 14


def test_the_update_takes_the_fused_kernels_and_keeps_no_scores(monkeypatch):
    text = compiled(2, monkeypatch)["gradients"]
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward", "fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        assert f'__cudnn${name}"' in text
    # The scores of all heads would have 12 times the elements of the bias.
    bias = M * G * C * (L + M * E)
    largest = max(np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text))
    assert bias <= largest < 12 * bias
