"""What is raised for bad user input, always before the first compile.

A message has three parts: what was received, what is required, what to change.
"""


class ConfigError(ValueError):
    """A configuration that cannot run: unknown, inconsistent or indivisible."""


class DataError(ValueError):
    """A corpus, tokenizer or task that cannot be used; names the file and the line or key."""


class CheckpointError(RuntimeError):
    """A run directory or checkpoint that cannot be continued from."""
