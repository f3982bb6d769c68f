"""Depth: how often the branch of a residual sublayer is run at each token. One file per kind of `design.depth`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from postformer.block.depth.base import Depth
from postformer.block.depth.loop import Halting
from postformer.block.depth.mod import Skipping
from postformer.block.depth.ode import Continuous
from postformer.contract.mixer import Traits

MODULES: dict[str, type[Depth]] = {"mod": Skipping, "loop": Halting, "ode": Continuous}


def make_depth(design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> Depth | None:
    """What a sublayer's design names around its branch; None: it runs once at every token.

    able: what its mixer can do. needs: the publications that the branch reads.
    """
    made = MODULES.get(design.kind)
    return None if made is None else made(design, site, sublayer, able, needs)


def adapted(able: Traits, design: Any) -> Traits:
    """What a mixer can do under this depth."""
    made = MODULES.get(design.kind)
    return able if made is None else replace(made.adapted(able, design), rereads="no")


@contextmanager
def as_declared(model: nn.Module) -> Iterator[None]:
    """Inside, tokens take the depth at which FLOPs are declared: the capacity's share of a call's tokens, evenly
    spread, or all the steps."""
    found = [m for m in model.modules() if isinstance(m, Depth)]
    for module in found:
        module.declared = True
    try:
        yield
    finally:
        for module in found:
            module.declared = False


__all__ = ["Depth", "adapted", "as_declared", "make_depth"]
