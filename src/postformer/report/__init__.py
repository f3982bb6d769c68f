"""What people look at: one self-contained page from the files that a demo or a training run left behind."""

from postformer.report.page import render

__all__ = ["render"]
