"""What is raised for bad user input, before the first compile wherever it can be known by then.

A message has three parts: what was received, what is required, what to change.
"""


class ConfigError(ValueError):
    """A configuration that cannot run: unknown, inconsistent or indivisible."""


class DataError(ValueError):
    """A corpus, tokenizer or task that cannot be used; names the file and the line or key."""


class CheckpointError(RuntimeError):
    """A run directory or checkpoint that cannot be continued from."""


class RewardError(RuntimeError):
    """A judge that raised, hung or returned no finite number; names the sample."""


class Interrupted(RuntimeError):
    """The run was told to stop and has saved; the same command goes on."""
