"""Probes: `(model, batch) -> arrays`, without changing the model."""

from postformer.probe.load import Load, load

__all__ = ["Load", "load"]
