"""Objectives: `loss(model, batch, generator) -> (scalar, metrics)`; they never know which sampler will run."""

from postformer.objective.batch import IGNORE, Batch
from postformer.objective.next_token import NextToken

__all__ = ["IGNORE", "Batch", "NextToken"]
