"""A way to a module that is owned elsewhere."""

from __future__ import annotations

from torch import nn


class Reference:
    """A module used here and owned elsewhere: reachable, but neither registered nor saved twice."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
