"""Reinforcement pre-training (RPT, arXiv:2506.08007) in JAX.

Importing this package starts no JAX backend. Read `train/loop.py` first: it is the whole method on one page.
"""

__version__ = "0.1.0"

import os

# transformers warns that PyTorch is absent; none is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
