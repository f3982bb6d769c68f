"""The four choices that say which online learner a memory is (MIRAS, 2504.13173), in words."""

from __future__ import annotations

from typing import NamedTuple


class Choices(NamedTuple):
    memory: str
    """What holds the past: key-value list, matrix, vector, ..."""
    loss: str
    """What each token's inner loss asks for"""
    retention: str
    """What is forgotten, and when"""
    update: str
    """The inner optimiser"""
    equation: str
    """The update and the read, one line"""
