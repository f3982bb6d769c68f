"""Studies: many runs, one record. So far the demo; it needs torch only in its worker processes."""

from postformer.study.demo import run_demo

__all__ = ["run_demo"]
