"""Reinforcement pre-training (RPT, arXiv:2506.08007) in JAX.

Importing this package starts no JAX backend. Start reading at `train/loop.py`, the training loop.
"""

__version__ = "0.2.0"

import os
from typing import Any

# transformers warns that PyTorch is missing; it is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str) -> Any:
    """Import `load` at its first use, because it needs JAX."""
    if name == "load":
        from rpt_jax.policy import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
