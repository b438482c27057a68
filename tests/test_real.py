"""SmolLM2-135M-Instruct, a real pretrained policy: against PyTorch, through chat prompts, two steps of RPT, and back.

`make real` fetches the model to runs/smollm2 and runs these tests; they skip without it.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_chat import TEMPLATES, check_prompts, tokenizer_with

from experiments import convert_hf, train
from experiments.fetch_smollm2 import NEXT, PROBE, check, to_rotary_halves
from rpt_jax.config import MeshConfig
from rpt_jax.models.decoder import logits
from rpt_jax.models.hf import load_hf, save_hf
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.tokenizer import load_tokenizer

DIRECTORY = Path(__file__).parent.parent / "runs" / "smollm2"
needs_model = pytest.mark.skipif(
    not (DIRECTORY / "config.json").exists(), reason="SmolLM2 is not in runs/smollm2; make real fetches it"
)


def test_interleaved_rotary_pairs_become_halves():
    """Rows of one head: pair i is rows 2i and 2i + 1 in GGUF, and rows i and half + i in halves."""
    rows = np.arange(12)[:, None]  # two heads of size 6
    assert to_rotary_halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@needs_model
def test_it_completes_the_capitals():
    figures = check(DIRECTORY)
    assert figures["next"] == NEXT and abs(figures["mean_nll_nats"] - 1.445) < 1e-3


@needs_model
def test_logits_and_greedy_text_equal_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; make real installs it")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float64)
    config, params = load_hf(DIRECTORY, make_mesh(MeshConfig()), dtype="float32")
    texts = (PROBE, "def add(a, b):\n    return", "1 + 1 = 2, 12 + 30 = 42, naïve 数学 🙂")
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == load_tokenizer(DIRECTORY).encode(text)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.numpy()
        # PyTorch's own float32 differs from its float64 by up to 7e-5. XLA's CPU products sum in longer chains: 4e-5
        # without its YNN kernels, 1.8e-4 with them.
        np.testing.assert_allclose(logits(config, params, jnp.asarray([ids])), expected, atol=2e-4)
    ids = tokenizer(PROBE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    continued = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    own = ids[0].tolist()
    for _ in range(6):
        own.append(int(logits(config, params, jnp.asarray([own]))[0, -1].argmax()))
    assert own == continued


@needs_model
@pytest.mark.parametrize("style", [*TEMPLATES, "its own"])
def test_chat_prompts_are_the_rendered_text(style):
    check_prompts(tokenizer_with(DIRECTORY, TEMPLATES.get(style)))


@needs_model
def test_two_steps_of_rpt_and_back(tmp_path):
    corpus = tmp_path / "capitals.jsonl"
    lines = [{"text": f"{PROBE}{NEXT}. " * (2 + i % 3)} for i in range(12)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    flags = {
        "--preset": "text", "--run.directory": run, "--policy.path": DIRECTORY, "--data.path": corpus,
        "--data.trunk-length": 256, "--data.window-stride": 64, "--data.template": "minimal", "--run.num-steps": 2,
        "--rollout.num-trunks": 2, "--rollout.prompts-per-trunk": 1, "--rollout.group-size": 2,
        "--rollout.max-completion-tokens": 8, "--mesh.microbatch-trunks": 1, "--eval.every-steps": 2,
        "--eval.num-positions": 2, "--eval.final-num-positions": 2, "--eval.num-samples": 1, "--eval.batch-trunks": 2,
        "--positions.selector": "random", "--lora.rank": 2, "--optimizer.learning-rate": "1e-4",
    }  # fmt: skip
    train.main([*(str(word) for pair in flags.items() for word in pair), "--run.no-control", "--run.no-tensorboard"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["stage"] == "rpt"] == [1, 2]
    assert all(np.isfinite(r["loss"]) and r["sampler_mismatch_max"] < 1e-3 for r in records if r["stage"] == "rpt")
    convert_hf.main(["--run", str(run), "--out", str(tmp_path / "out")])
    assert check(tmp_path / "out")["next"] == NEXT
    config, params = load_hf(DIRECTORY)
    save_hf(tmp_path / "copy", config, params)
    again = load_hf(tmp_path / "copy")[1]
    np.testing.assert_array_equal(params["embedding"], again["embedding"])
