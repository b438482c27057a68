"""Imports go one way, and importing the package starts no JAX backend."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Lower layers first; a module imports from its own layer or lower ones.
_RL_FORMULAS = ("rpt_jax.rl.advantages", "rpt_jax.rl.surrogates")
LAYERS = [
    ["rpt_jax", "rpt_jax.config", "rpt_jax.types", "rpt_jax.errors", "rpt_jax.work"],
    ["rpt_jax.tokenizer", "rpt_jax.parallel"],
    ["rpt_jax.sequences", "rpt_jax.models"],
    ["rpt_jax.scoring"],
    ["rpt_jax.data", "rpt_jax.rollout", "rpt_jax.reward_models", "rpt_jax.rewards", *_RL_FORMULAS],
    ["rpt_jax.rl"],
    ["rpt_jax.search"],
    ["rpt_jax.evals", "rpt_jax.planning"],
    ["rpt_jax.train"],
    ["rpt_jax.analysis", "rpt_jax.scaling", "rpt_jax.policy", "rpt_jax.session"],
    ["experiments"],
]


def layer(module: str) -> int:
    known = {name: number for number, names in enumerate(LAYERS) for name in names}
    while module not in known:
        module = module.rpartition(".")[0]
        assert module, "a module outside every layer: give it a place in LAYERS"
    return known[module]


def imported_modules(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = ROOT / Path(*full.split("."))
                is_module = target.with_suffix(".py").exists() or target.is_dir()
                yield full if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    files = [p for d in ("rpt_jax", "experiments") for p in (ROOT / d).rglob("*.py") if p.name != "__init__.py"]
    wrong = []
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imported_modules(path):
            if name.split(".")[0] in ("rpt_jax", "experiments") and layer(name) > layer(module):
                wrong.append(f"{module} imports {name}")
    assert len(files) > 30 and not wrong


def test_importing_starts_no_backend():
    code = (
        "import rpt_jax, rpt_jax.train.pipeline, rpt_jax.analysis.reports, jax._src.xla_bridge as bridge; "
        "assert not bridge._backends, bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
