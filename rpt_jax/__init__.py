"""Reinforcement pre-training (RPT, arXiv:2506.08007) in JAX.

Importing this package starts no JAX backend. Start reading at `train/loop.py`, the training loop.
"""

__version__ = "0.2.0"

import os

# transformers warns that PyTorch is missing; it is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
