"""Choices among completions, and search through thoughts."""
