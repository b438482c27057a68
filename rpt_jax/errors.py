"""Errors for bad user input, raised before the first compile whenever possible.

A message has three parts: what was received, what is required, what to change.
"""


class ConfigError(ValueError):
    """A configuration that cannot run: unknown, inconsistent or indivisible."""


class DataError(ValueError):
    """An unusable corpus, tokenizer or task; names the file and the line or key."""


class CheckpointError(RuntimeError):
    """A run directory or checkpoint that cannot be resumed."""


class RewardError(RuntimeError):
    """A reward function that raised, hung or returned a non-finite value; names the sample."""


class Interrupted(RuntimeError):
    """The run received a stop signal; its notes say what is kept, and the same command resumes it."""
