"""Probes: `(model, batch) -> arrays`, without changing the model."""

from postformer.probe.load import Load, load
from postformer.probe.variance import variance

__all__ = ["Load", "load", "variance"]
