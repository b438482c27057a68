"""Reinforcement pre-training (RPT, arXiv:2506.08007) in JAX.

Importing this package starts no JAX backend. Start reading at `train/loop.py`, the training loop.
"""

__version__ = "0.2.0"

import importlib
import os
from typing import Any

# transformers warns that PyTorch is missing; it is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str) -> Any:
    """Import `load` and `train` at their first use, because they need JAX."""
    if name == "load":
        return importlib.import_module("rpt_jax.policy").load
    if name == "train":
        return importlib.import_module("rpt_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
